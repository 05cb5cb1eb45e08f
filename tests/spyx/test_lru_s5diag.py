"""spyx.ssm.LRU and S5Diag: published figures, streaming, masks, dtypes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.lti import diagonal_layer

from spyx.ssm import LRU, S5Diag

LAYERS = [LRU, S5Diag]


def make(cls, d_model=3, d_state=5, **kwargs):
    return cls(d_model, d_state, rngs=nnx.Rngs(7), **kwargs)


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_published_lru_training_run():
    u = jax.random.normal(jax.random.PRNGKey(1), (32, 16, 4))
    model = LRU(4, 16, rngs=nnx.Rngs(0))
    magnitudes = jnp.abs(model._complex_matrices()[0])
    assert (f"{magnitudes.min():.3f}", f"{magnitudes.max():.3f}") == ("0.268", "0.888")
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(u) - u) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(150)]
    assert (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") == ("1.4408", "0.0020")
    magnitudes = jnp.abs(model._complex_matrices()[0])
    assert (f"{magnitudes.min():.3f}", f"{magnitudes.max():.3f}") == ("0.203", "0.847")


def test_published_s5diag_eigenvalues():
    magnitudes = jnp.abs(S5Diag(8, 32, rngs=nnx.Rngs(2))._complex_matrices()[0])
    assert (f"{magnitudes.min():.4f}", f"{magnitudes.max():.4f}") == ("0.9523", "0.9995")


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 2), (2, 1), (0, 2)])
def test_matches_the_float64_loop(cls, shape):
    layer, u = make(cls), noise(*shape, 3)
    y, state = layer(u, return_state=True)
    expected, last = diagonal_layer(u, *layer._complex_matrices(), layer.D[...])
    assert y.shape == u.shape
    np.testing.assert_allclose(y, expected.reshape(u.shape), atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_whole_equals_parts_equals_steps(cls):
    layer, u = make(cls), noise(11, 2, 3)
    whole, last = layer(u, return_state=True)
    for cut in (0, 1, 5, 11):
        first, state = layer(u[:cut], layer.initial_state(2), return_state=True)
        second, state = layer(u[cut:], state, return_state=True)
        np.testing.assert_allclose(jnp.concatenate([first, second]), whole, atol=1e-6)
        np.testing.assert_allclose(state, last, atol=1e-6)
    state, steps = layer.initial_state(2), []
    for u_t in u:
        y_t, state = layer.step(u_t, state)
        steps.append(y_t)
    np.testing.assert_allclose(jnp.stack(steps), whole, atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_equal_unpadded_rows(cls, reverse):
    layer, u, lengths = make(cls, reverse=reverse), noise(9, 4, 3), jnp.array([0, 1, 5, 9])
    padded = jnp.where(jnp.arange(9)[:, None, None] < lengths[:, None], u, jnp.nan)
    y, state = layer(padded, lengths=lengths, return_state=True)
    for row, length in enumerate(lengths.tolist()):
        alone, last = layer(u[:length, row : row + 1], return_state=True)
        np.testing.assert_allclose(y[:length, row], alone[:, 0], atol=1e-6)
        np.testing.assert_array_equal(y[length:, row], 0)
        np.testing.assert_allclose(state[row], last[0], atol=1e-6)
    grads = nnx.grad(lambda m: jnp.sum(m(padded, lengths=lengths) ** 2))(layer)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("cls", LAYERS)
def test_reset_starts_a_new_sequence(cls):
    layer, u = make(cls), noise(9, 2, 3)
    reset = jnp.zeros((9, 2), bool).at[4, 0].set(True)
    y = layer(u, layer.initial_state(2) + 1, reset=reset)
    np.testing.assert_allclose(y[4:, 0], layer(u[4:])[:, 0], atol=1e-6)
    np.testing.assert_allclose(y[:, 1], layer(u, layer.initial_state(2) + 1)[:, 1], atol=1e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_reverse_is_flipped(cls):
    forward, backward, u = make(cls), make(cls, reverse=True), noise(9, 2, 3)
    np.testing.assert_allclose(backward(u), forward(u[::-1])[::-1], atol=1e-6)
    with pytest.raises(ValueError, match="no step"):
        backward.step(u[0], backward.initial_state(2))


@pytest.mark.parametrize("cls", LAYERS)
def test_causal_and_rows_independent(cls):
    layer, u = make(cls), noise(9, 3, 3)
    y = layer(u)
    np.testing.assert_allclose(layer(u.at[5:].set(9.0))[:5], y[:5], atol=1e-6)
    np.testing.assert_allclose(layer(u.at[:, 1].set(jnp.nan))[:, ::2], y[:, ::2], atol=1e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_dtypes(cls):
    u = noise(9, 2, 3)
    exact = make(cls)(u)
    y, state = make(cls)(u.astype(jnp.bfloat16), return_state=True)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.complex64
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=3e-2 * float(jnp.abs(exact).max()))
    assert make(cls, dtype=jnp.bfloat16)(u).dtype == jnp.bfloat16
    assert make(cls, param_dtype=jnp.bfloat16).C_re.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        layer, u = make(cls, param_dtype=jnp.float64), noise(9, 2, 3, dtype=jnp.float64)
        y, state = layer(u, return_state=True)
        assert (y.dtype, state.dtype) == (jnp.float64, jnp.complex128)
        np.testing.assert_allclose(y, diagonal_layer(u, *layer._complex_matrices(), layer.D[...])[0], atol=1e-12)


@pytest.mark.parametrize("cls", LAYERS)
def test_without_skip(cls):
    layer, u = make(cls, use_skip=False), noise(5, 2, 3)
    assert layer.D is None
    np.testing.assert_allclose(layer(u), diagonal_layer(u, *layer._complex_matrices())[0], atol=2e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_jit_vmap_grad_remat(cls):
    layer, u = make(cls), noise(4, 5, 2, 3)
    np.testing.assert_allclose(nnx.jit(lambda m, u: m(u))(layer, u[0]), layer(u[0]), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(layer)(u), jnp.stack([layer(v) for v in u]), atol=1e-6)
    plain = nnx.grad(lambda m: jnp.sum(m(u[0]) ** 2))(layer)
    remat = nnx.grad(lambda m: jnp.sum(nnx.remat(lambda m, u: m(u))(m, u[0]) ** 2))(layer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, remat)


def test_s5diag_stays_stable_for_any_parameters():
    layer = make(S5Diag)
    layer.A_re_raw.set_value(jnp.array([-100.0, -5, 0, 5, 100]))
    layer.log_dt.set_value(jnp.array([-20.0, 0, 5, -5, 3]))
    assert np.all(np.abs(layer._complex_matrices()[0]) <= 1)


def test_s5diag_finite_at_zero_eigenvalue():
    layer = make(S5Diag)
    layer.A_re_raw.set_value(jnp.full(5, -200.0))
    layer.A_im.set_value(jnp.zeros(5))
    grads = nnx.grad(lambda m: jnp.sum(m(noise(5, 2, 3)) ** 2))(layer)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("cls", LAYERS)
def test_errors_name_layer_layout_and_what_came(cls):
    layer = make(cls)
    with pytest.raises(ValueError, match=rf"{cls.__name__} expects \[T, B, d_model\].*\(9, 3\)"):
        layer(noise(9, 3))
    with pytest.raises(ValueError, match=r"d_model=3; got shape \(9, 2, 4\)"):
        layer(noise(9, 2, 4))
    with pytest.raises(TypeError, match="int32"):
        layer(jnp.ones((9, 2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"\[B, d_model\]"):
        layer.step(noise(9, 2, 3), layer.initial_state(2))
    with pytest.raises(ValueError, match="h0 must have shape"):
        layer(noise(9, 2, 3), layer.initial_state(1))
    with pytest.raises(ValueError, match="d_state must be a positive integer, got 0"):
        make(cls, d_state=0)


@pytest.mark.parametrize(
    ("cls", "kwargs"), [(LRU, {"r_min": 0.9, "r_max": 0.5}), (LRU, {"r_max": 2.0}), (S5Diag, {"dt_min": 0.0})]
)
def test_bad_ranges(cls, kwargs):
    with pytest.raises(ValueError, match="needs"):
        make(cls, **kwargs)
