"""Whose memory it is: nothing of the caller's is written, and nothing is copied that can be shared."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from compat_torch import interop, wrap
from compat_torch.nn.lti import LRU, S4D
from compat_torch.nn.ltv import Mamba


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64"])
def test_memory_is_shared_both_ways(dtype):
    with jax.enable_x64(dtype == "float64"):
        tensor = torch.randn(4, 8, dtype=getattr(torch, dtype))
        array = interop.to_jax(tensor)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        fresh = jnp.ones((4, 8), dtype) + 1
        assert interop.to_torch(fresh).data_ptr() == fresh.unsafe_buffer_pointer()
        assert interop.to_torch(array).data_ptr() == tensor.data_ptr()
        copied = interop.to_jax(tensor[:, ::2])
        assert copied.unsafe_buffer_pointer() != tensor.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: LRU(3, 4),
        lambda: S4D(3, d_state=4, transposed=False, dropout=0.5),
        lambda: Mamba(3, d_state=2, d_conv=2),
    ],
    ids=["LRU", "S4D", "Mamba"],
)
def test_nothing_that_is_passed_in_is_written(make):
    """torch counts the writes to each tensor."""
    layer, x = make(), torch.randn(2, 5, 3, requires_grad=True)
    kwargs = (
        {"integration_timesteps": torch.rand(2, 5)} if isinstance(layer, Mamba) else {"lengths": torch.tensor([5, 3])}
    )
    watched = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), "x": x, **kwargs}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in watched.items()}
    y = layer(x, **kwargs)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    with torch.no_grad():
        cache = layer.allocate_inference_cache(2)
        now = slice(0, 1) if isinstance(layer, Mamba) else 0
        layer.eval().step(x[:, now], cache)
    for name, tensor in watched.items():
        version, value = before[name]
        assert tensor._version == version, name
        assert torch.equal(tensor, value), name
    pointers = {tensor.data_ptr() for tensor in watched.values()}
    assert y.data_ptr() not in pointers
    assert not {leaf.data_ptr() for leaf in cache.values() if leaf.numel()} & pointers


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_empty_inputs(shape):
    layer, x = Mamba(3, d_state=2, d_conv=2), torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


class Handed(nnx.Module):
    """Hands out a parameter as it is."""

    def __init__(self):
        self.a = nnx.Param(jnp.ones(64))

    def __call__(self, x):
        return self.a[...], x + 1


@pytest.mark.parametrize("grad", [True, False])
def test_a_parameter_that_is_handed_out_is_a_copy(grad):
    model, x = wrap(Handed()), torch.zeros(64)
    with torch.set_grad_enabled(grad):
        a, y = model(x)
    with torch.no_grad():
        model.a.zero_()
        x.fill_(5)
    assert torch.equal(a, torch.ones(64))
    assert torch.equal(y, torch.ones(64))
    assert a.data_ptr() != model.a.data_ptr()
