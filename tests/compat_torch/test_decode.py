"""compat_torch.decode: the steps of any layer as one loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch import LRU, S5, Mamba, decode

LAYERS = [
    lambda: S5(3, 4, "zoh", rngs=nnx.Rngs(0)),
    lambda: LRU(3, 4, rngs=nnx.Rngs(0)),
    lambda: Mamba(3, 2, rngs=nnx.Rngs(0)),
]


@pytest.mark.parametrize("make", LAYERS, ids=["S5", "LRU", "Mamba"])
def test_it_is_forward_from_a_prompt_on(make):
    layer, x = make(), jax.random.normal(jax.random.key(1), (2, 9, 3))
    whole = layer(x)
    first, cache = layer(x[:, :4], inference_cache=layer.allocate_inference_cache(2))
    kept = jax.tree.map(np.array, cache)
    second, after = decode(layer, x[:, 4:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=3e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, kept)
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), after) == jax.tree.map(
        lambda leaf: (leaf.shape, str(leaf.dtype)), cache
    )
    nothing, same = decode(layer, x[:, :0], cache)
    assert nothing.shape == (2, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


@pytest.mark.parametrize("make", LAYERS, ids=["S5", "LRU", "Mamba"])
def test_it_sees_new_parameters(make):
    layer, x = make(), jnp.ones((1, 3, 3))
    first, _ = decode(layer, x, layer.allocate_inference_cache(1))
    layer.D.set_value(layer.D[...] + 1)
    second, _ = decode(layer, x, layer.allocate_inference_cache(1))
    np.testing.assert_allclose(second, layer(x), atol=3e-6)
    assert not np.allclose(first, second)


def test_torch_tensors_come_back_as_torch_tensors():
    layer, x = LAYERS[0](), torch.ones(1, 5, 3)
    y, cache = decode(layer, x, layer.allocate_inference_cache(1))
    assert isinstance(y, torch.Tensor)
    assert isinstance(cache["lrnn_state"], torch.Tensor)
    np.testing.assert_allclose(y, layer(x), atol=3e-6)


def test_what_it_cannot_do_raises():
    layer, x = LAYERS[1](), jnp.ones((2, 5, 3))
    cache = layer.allocate_inference_cache(2)
    with pytest.raises(TypeError, match="a layer of compat_torch, got Linear"):
        decode(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), x, cache)
    with pytest.raises(ValueError, match=r"inputs \(B, L, H\) for LRU, got shape \(2, 3\)"):
        decode(layer, x[:, 0], cache)
    with pytest.raises(ValueError, match="time-invariant"):
        decode(layer, x, cache, jnp.ones((2, 5)))
    mamba = LAYERS[2]()
    for shape in ((2, 4), (5,), (5, 2), (2, 5, 2)):
        with pytest.raises(ValueError, match=r"\(B, L\) = \(2, 5\)"):
            decode(mamba, x, mamba.allocate_inference_cache(2), jnp.ones(shape))


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 1)])
def test_time_steps_have_the_shapes_that_a_call_takes(shape):
    layer, x = LAYERS[2](), jax.random.normal(jax.random.key(2), (2, 5, 3))
    timesteps = jax.random.uniform(jax.random.key(3), shape)
    y, _ = decode(layer, x, layer.allocate_inference_cache(2), timesteps)
    np.testing.assert_allclose(y, layer(x, timesteps), atol=3e-6)
