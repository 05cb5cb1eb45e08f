"""S4 and S4D with the compiled kernels for CPU, against float64, and the compact caches of loops over steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compat_torch
from compat_torch.models import original
from compat_torch.models.lti import S4, S4D
from spyx.ops import dispatch


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def in_float64(make, x):
    """The output and the gradient of x, of the same parameters in float64, without the kernels."""
    layer = make()
    with jax.enable_x64(True):
        graph, state = nnx.split(layer)
        wide = nnx.merge(graph, jax.tree.map(lambda v: v.astype(np.float64) if v.dtype == np.float32 else v, state))

        def loss(x):
            y = wide(x)[0]
            return jnp.sum(jnp.sin(y)), y

        g, y = jax.grad(loss, has_aux=True)(jnp.asarray(x, np.float64))
        return np.asarray(y), np.asarray(g)


@pytest.mark.skipif(not dispatch.native_kernels(), reason="numba is not installed, or SPYX_NATIVE=0")
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("L", "channels", "width"), [(1, 1, 3), (67, 2, 66)])
def test_kernels_against_float64(rank, L, channels, width):
    def make():
        options = {"d_state": 8, "channels": channels, "transposed": False, "rngs": nnx.Rngs(0)}
        layer = S4(width, rank=rank, init="legs" if rank == 1 else "legt", **options) if rank else S4D(width, **options)
        layer.eval()
        return layer

    x = np.random.default_rng(1).normal(size=(2, L, width)).astype(np.float32)
    layer = make()

    def loss(x):
        y = layer(x)[0]
        return jnp.sum(jnp.sin(y)), y

    program = jax.jit(jax.grad(loss, has_aux=True))
    assert "spyx_native" in program.lower(x).as_text()
    g, y = program(x)
    y64, g64 = in_float64(make, x)
    assert relative(y, y64) < 2e-6
    assert relative(g, g64) < 1e-5


@pytest.mark.parametrize("cls", [S4, original.S4Block])
def test_loops_carry_half_of_each_pair(cls):
    layer = cls(6, d_state=8, transposed=False, rngs=nnx.Rngs(0))
    layer.eval()
    x = np.random.default_rng(1).normal(size=(2, 9, 6)).astype(np.float32)
    cache = layer.allocate_inference_cache(2)
    if cls is S4:
        assert layer._compact(cache)["lrnn_state"].size * 2 == cache["lrnn_state"].size
    looped, after = compat_torch.decode(layer, x, cache)
    for t in range(x.shape[1]):
        y, cache = layer.step(x[:, t], cache)
        np.testing.assert_allclose(y, looped[:, t], rtol=1e-5, atol=1e-6)
    assert after.keys() == cache.keys()
    for name, leaf in cache.items():
        assert after[name].shape == leaf.shape
        np.testing.assert_allclose(after[name], leaf, rtol=1e-4, atol=1e-6)
