"""The layers of spyx.ssm in small, as pure jitted functions, and what they must equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spyx.ssm import LRU, ChunkedSSM, Mamba, MambaBlock, S5Diag

H, CHUNK = 4, 3


def lru(rngs, **kwargs):
    return LRU(H, 3, rngs=rngs, **kwargs)


def s5(rngs, **kwargs):
    return S5Diag(H, 3, dt_min=0.1, dt_max=1.0, rngs=rngs, **kwargs)


def mamba(rngs, **kwargs):
    return Mamba(H, 3, 2, dt_min=0.1, dt_max=1.0, rngs=rngs, **kwargs)


def block(rngs, **kwargs):
    return MambaBlock(H, 3, 4, dt_min=0.1, dt_max=1.0, rngs=rngs, **kwargs)


def biased(rngs, **kwargs):
    sizes = {"d_state": 2, "d_conv": 1, "expand": 1, "dt_rank": 3, "dt_min": 0.1, "dt_max": 1.0}
    return MambaBlock(H, **sizes, bias=True, conv_bias=False, rngs=rngs, **kwargs)


def chunked(inner, outer, **fixed):
    def make(rngs, reverse=False, dtype=None, **kwargs):
        layers = inner(rngs, **kwargs), outer(rngs, **kwargs)
        return ChunkedSSM(*layers, chunk_size=CHUNK, reverse=reverse, dtype=dtype, **fixed)

    return make


CAUSAL = {
    "LRU": lru,
    "S5Diag": s5,
    "Mamba": mamba,
    "MambaBlock": block,
    "MambaBlock-biased": biased,
    "ChunkedSSM-causal": chunked(lru, s5, causal=True),
    "ChunkedSSM-causal-last": chunked(mamba, block, causal=True, pool="last"),
}
WHOLE = {"ChunkedSSM": chunked(s5, lru), "ChunkedSSM-last": chunked(block, mamba, pool="last")}
ALL = {**CAUSAL, **WHOLE}
QUICK = ("LRU", "MambaBlock", "ChunkedSSM-causal", "ChunkedSSM")
"""These run everywhere: what the others add is their own formula, which `test_ssm_values.py` checks."""


def each(names, quick=QUICK):
    """Parametrise over layers; those not in `quick` only run in full."""
    marked = [name if name in quick else pytest.param(name, marks=pytest.mark.full) for name in names]
    return pytest.mark.parametrize("name", marked)


def length(name):
    """Steps of a test sequence: prime where any length is taken."""
    return 12 if name in WHOLE else 11


def noise(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make(name, seed=0, **kwargs):
    """A layer with every parameter moved, so that no term of it is at a special value."""
    layer = ALL[name](nnx.Rngs(seed), **kwargs)
    state = nnx.state(layer)
    nnx.update(layer, jax.tree.map(lambda v: v + 0.2 * noise(*v.shape, seed=seed + v.size, dtype=v.dtype), state))
    return layer


@partial(jax.jit, static_argnums=0)
def _call(graph, params, u, state, lengths, reset):
    return nnx.merge(graph, params)(u, state, return_state=True, lengths=lengths, reset=reset)


@partial(jax.jit, static_argnums=0)
def _step(graph, params, u, state):
    return nnx.merge(graph, params).step(u, state)


def call(layer, u, state=None, lengths=None, reset=None):
    """`layer(u, state, return_state=True, lengths=lengths, reset=reset)`, compiled once for equal layers."""
    return _call(*nnx.split(layer), u, state, lengths, reset)


def step(layer, u, state):
    """`layer.step(u, state)`, compiled once for equal layers."""
    return _step(*nnx.split(layer), u, state)


def started(layer, name, batch=2, dtype=jnp.float32):
    """The state that some other sequence has left behind."""
    return call(layer, noise(length(name), batch, H, seed=9, dtype=dtype), layer.initial_state(batch))[1]


def row(tree, i):
    return jax.tree.map(lambda v: v[i : i + 1], tree)


def close(a, b, tolerance=3e-6):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


def close_trees(a, b, tolerance=3e-6):
    jax.tree.map(lambda x, y: close(x, y, tolerance), a, b)
