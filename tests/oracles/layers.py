"""What every compat layer promises, checked on one layer and one input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import settings

from compat_torch import decode

QUICK = settings(max_examples=2, deadline=None, derandomize=True)
WIDE = settings(max_examples=25, deadline=None)


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def intervals(*shape, seed=9):
    """Times between events."""
    return jax.random.uniform(jax.random.key(seed), shape, minval=0.1, maxval=3.0)


@partial(jax.jit, static_argnums=0)
def _call(graph, params, x, extra, lengths, cache):
    return nnx.merge(graph, params)(x, *extra, lengths=lengths, inference_cache=cache)


def call(layer, x, *extra, lengths=None, inference_cache=None):
    """`layer(...)` as one program, compiled once for equal layers and shapes."""
    return _call(*nnx.split(layer), x, extra, lengths, inference_cache)


def close(actual, expected, tolerance=3e-6):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


def same_cache(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        close(actual[name], expected[name])


def check_equivalence(layer, x, expected, cut, timesteps=None):
    """Whole == definition == prompt in two pieces == steps; padding, even NaN, changes nothing."""
    B, L, _ = x.shape
    extra = () if timesteps is None else (timesteps,)
    close(call(layer, x, *extra), expected)
    start = layer.allocate_inference_cache(B)
    y, end = call(layer, x, *extra, inference_cache=start)
    close(y, expected)
    if "seqlen_offset" in end:
        np.testing.assert_array_equal(end["seqlen_offset"], np.full(B, L))
        assert end["seqlen_offset"].dtype == jnp.int32

    cut = min(cut, L)
    pieces, cache = [], start
    for part in (slice(0, cut), slice(cut, L)):
        out, cache = call(layer, x[:, part], *(v[:, part] for v in extra), inference_cache=cache)
        pieces.append(out)
    close(jnp.concatenate(pieces, 1), expected)
    same_cache(cache, end)

    before = jax.tree.map(np.array, start)
    out, cache = decode(layer, x, start, *extra)
    close(out, expected)
    same_cache(cache, end)
    jax.tree.map(np.testing.assert_array_equal, start, before)

    lengths = np.array([L - b % (L + 1) for b in range(B)])
    padded = jnp.where(np.arange(L)[:, None] < lengths[:, None, None], x, jnp.nan)
    gaps = tuple(jnp.where(np.arange(L) < lengths[:, None], v, jnp.nan) for v in extra)
    plain = call(layer, padded, *gaps, lengths=lengths)
    out, cache = call(layer, padded, *gaps, lengths=lengths, inference_cache=start)
    for b, n in enumerate(lengths):
        for result in (plain, out):
            close(result[b, :n], expected[b, :n])
            np.testing.assert_array_equal(result[b, n:], 0)
    n = lengths[-1]
    _, short = call(layer, x[:, :n], *(v[:, :n] for v in extra), inference_cache=start)
    states = [name for name in cache if name.endswith("_state") or name == "seqlen_offset"]
    assert "lrnn_state" in states
    same_cache({name: cache[name][0] for name in states}, {name: end[name][0] for name in states})
    same_cache({name: cache[name][-1] for name in states}, {name: short[name][-1] for name in states})


def check_padding_gradients(layer, x, *extra):
    """Gradients are those without the padding, which may be NaN."""
    L = x.shape[1]
    lengths = jnp.array([L, 2, *[0] * (len(x) - 2)])
    padded = x.at[1, 2:].set(jnp.nan)

    def loss(layer, x):
        return jnp.sum(layer(x, *extra, lengths=lengths) ** 2)

    gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1)))
    (g, gx), (g0, gx0) = (gradient(layer, v) for v in (padded, x))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((g, gx)))
    jax.tree.map(close, jax.tree.leaves(g), jax.tree.leaves(g0))
    close(gx, gx0)
    assert float(jnp.abs(gx[0]).max()) > 0


def check_x64(make, oracle, x):
    """float64 in, float64 out, to 13 digits; under jit and vmap; the gradient is the finite difference."""
    with jax.enable_x64(True):
        layer, x = make(param_dtype=jnp.float64), jnp.asarray(np.asarray(x, np.float64))
        y = call(layer, x)
        assert y.dtype == jnp.float64
        close(y, oracle(layer.state_dict(), x), 1e-13)
        close(nnx.jit(nnx.vmap(lambda m, v: m(v[None])[0], in_axes=(None, 0)))(layer, x), y, 1e-13)
        out, cache = decode(layer, x, layer.allocate_inference_cache(len(x)))
        close(out, y, 1e-13)
        assert cache["lrnn_state"].dtype in (jnp.float64, jnp.complex128)
        direction = noise(*x.shape, seed=1, dtype=jnp.float64)
        loss = jax.jit(lambda v: jnp.sum(layer(v) ** 3))
        slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
        close(jnp.vdot(jax.grad(loss)(x), direction), slope, 1e-7)


def check_bfloat16(layer, oracle, x):
    """A layer of dtype bfloat16: its outputs, and what its cache holds."""
    y = call(layer, x)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), oracle(layer.state_dict(), x), 1e-2)
    cache = layer.allocate_inference_cache(len(x))
    assert cache["lrnn_state"].dtype in (jnp.float32, jnp.complex64)
    out, after = decode(layer, x, cache)
    close(out.astype(jnp.float32), y.astype(jnp.float32), 1e-2)
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in cache.items()}


def check_torch(layer, x):
    """torch tensors in, torch tensors out."""
    import torch

    tensor, expected = torch.from_numpy(np.array(x)), call(layer, x)
    y, cache = layer(tensor, inference_cache=layer.allocate_inference_cache(len(x)))
    assert isinstance(y, torch.Tensor)
    assert isinstance(cache["lrnn_state"], torch.Tensor)
    close(y.numpy(), expected)
    out, cache = decode(layer, tensor, layer.allocate_inference_cache(len(x)))
    assert isinstance(cache["lrnn_state"], torch.Tensor)
    close(out.numpy(), expected)


def check_scanned_steps(make, x):
    """A float32 cache keeps its dtypes under float64 steps, so that they can be the body of a scan."""
    with jax.enable_x64(True):
        layer = make(param_dtype=jnp.float32)
        start, x = layer.allocate_inference_cache(x.shape[1]), x.astype(jnp.float64)
        _, y = jax.lax.scan(lambda cache, x_t: layer.step(x_t, cache)[::-1], start, x)
        assert y.dtype == jnp.float64


def check_round_trip(layer, make):
    """A layer that was never initialised gives the same outputs from the state_dict of `layer`."""
    x = noise(2, 4, layer.d_model)
    other = nnx.eval_shape(make)
    other.load_state_dict(layer.state_dict())
    close(call(other, x), call(layer, x), 0)
    assert other.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value)
