"""S4 and S4D: rows are independent, outputs causal, under jit, vmap and grad, in training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compat_torch.models.lti import S4, S4D

BOTH = [S4D, S4]


def make(cls, **kwargs):
    return cls(**{"d_model": 4, "d_state": 4, "transposed": False, "gate": 2, "rngs": nnx.Rngs(3), **kwargs})


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@nnx.jit
def call(layer, x):
    return layer(x)[0]


@pytest.mark.parametrize("cls", BOTH)
def test_rows_are_independent_and_outputs_causal(cls):
    layer, x = make(cls), noise(3, 11, 4)
    y = call(layer, x)
    others = x.at[0].set(jnp.nan).at[2].multiply(7)
    np.testing.assert_allclose(call(layer, others)[1], y[1], atol=2e-6)
    later = call(layer, x.at[:, 7:].add(3.0))
    np.testing.assert_allclose(later[:, :7], y[:, :7], atol=5e-6)
    assert np.abs(later[:, 7:] - y[:, 7:]).max() > 0.01


@pytest.mark.parametrize("cls", BOTH)
def test_vmap_and_finite_differences_in_float64(cls):
    with jax.enable_x64(True):
        layer, x = make(cls, param_dtype=jnp.float64), noise(2, 5, 4, dtype=jnp.float64)
        y = call(layer, x)
        one_by_one = nnx.jit(nnx.vmap(lambda m, v: m(v[None])[0][0], in_axes=(None, 0)))(layer, x)
        np.testing.assert_allclose(one_by_one, y, atol=1e-13)
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        loss = jax.jit(lambda p, v: jnp.sum(nnx.merge(graph, p, rest)(v)[0] ** 3))
        for argument, (slopes, start) in enumerate(zip(jax.grad(loss, (0, 1))(params, x), (params, x), strict=True)):
            direction = jax.tree.map(lambda leaf: noise(*leaf.shape, seed=1, dtype=jnp.float64), start)

            def along(h, start=start, direction=direction, argument=argument):
                moved = jax.tree.map(lambda leaf, d: leaf + h * d, start, direction)
                return loss(moved, x) if argument == 0 else loss(params, moved)

            slope = sum(map(jnp.vdot, jax.tree.leaves(slopes), jax.tree.leaves(direction)))
            expected = (along(1e-6) - along(-1e-6)) / 2e-6
            np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", BOTH)
def test_training_and_evaluation_differ_by_dropout_alone(cls):
    x = noise(2, 5, 4)
    layer = make(cls)
    assert not layer.drop.deterministic
    trained = call(layer, x)
    layer.eval()
    np.testing.assert_array_equal(call(layer, x), trained)
    dropping = make(cls, dropout=0.5)
    dropped = dropping(x, rngs=nnx.Rngs(dropout=0))[0]
    dropping.eval()
    np.testing.assert_array_equal(call(dropping, x), trained)
    assert not np.allclose(dropped, trained)
    dropping.train()
    with pytest.raises(ValueError, match=r"dropout=0\.5 in training mode needs rngs"):
        dropping(x)
