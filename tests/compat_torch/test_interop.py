"""torch tensors in, torch tensors out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from compat_torch import interop
from compat_torch.models.lti import LRU, S5

LAYERS = [S5(3, 4, "zoh"), LRU(3, 4)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (2, 0)])
def test_round_trip_keeps_dtype_shape_and_bits(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(getattr(torch, dtype))
    array = interop.to_jax(tensor)
    assert (str(array.dtype), array.shape) == (dtype, shape)
    back = interop.to_torch(array)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_integers_and_64_bit_values():
    assert interop.to_jax(torch.arange(3)).dtype == jnp.int32
    with pytest.raises(ValueError, match=r"torch.float64.*jax_enable_x64"):
        interop.to_jax(torch.ones(3, dtype=torch.float64))
    with jax.enable_x64(True):
        tensor = torch.randn(3, dtype=torch.float64)
        np.testing.assert_array_equal(interop.to_jax(tensor), tensor.numpy())
        assert interop.to_jax(torch.arange(3)).dtype == jnp.int64


def test_contiguous_memory_is_shared_and_views_are_right():
    tensor = torch.randn(4, 8)
    assert interop.to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    for view in (tensor.T, tensor[:, ::2], tensor[:1].expand(4, 8), torch.complex(tensor, tensor).conj()):
        np.testing.assert_array_equal(interop.to_jax(view), view.resolve_conj().numpy())


@pytest.mark.parametrize("layer", LAYERS, ids=["S5", "LRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_answer_in_torch(layer, dtype):
    x = torch.randn(2, 7, 3).to(dtype)
    before = x.clone()
    y = layer(x)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    expected = layer(jnp.asarray(x.float().numpy()))
    np.testing.assert_allclose(y.float().numpy(), expected, atol=1e-6 if dtype == torch.float32 else 0.1)
    cache, steps = layer.allocate_inference_cache(2), []
    for t in range(7):
        y_t, cache = layer.step(x[:, t], cache)
        steps.append(y_t)
    assert isinstance(cache["lrnn_state"], torch.Tensor)
    assert cache["lrnn_state"].dtype == torch.complex64
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(torch.stack(steps, 1), y, atol=2e-6, rtol=rtol)
    with_lengths = layer(x, lengths=torch.tensor([7, 3]))
    assert torch.equal(with_lengths[1, 3:], torch.zeros(4, 3, dtype=dtype))


def test_the_result_does_not_hang_on_the_callers_memory():
    layer, x = LAYERS[0], torch.randn(2, 400, 3)
    kept = x.clone()
    y = layer(x)
    x.zero_()
    torch.testing.assert_close(y, layer(kept))


def test_caches_handed_back_are_safe_to_edit():
    layer = LAYERS[0]
    cache = layer.allocate_inference_cache(1)
    A_bar = np.array(cache["A_bar"])
    _, torch_cache = layer.step(torch.randn(1, 3), cache)
    torch_cache["A_bar"].zero_()
    np.testing.assert_array_equal(cache["A_bar"], A_bar)
    mine = {name: interop.to_torch(jnp.copy(value)) for name, value in cache.items()}
    _, returned = layer.step(torch.randn(1, 3), mine)
    assert returned["A_bar"] is mine["A_bar"]
    assert torch.equal(mine["lrnn_state"], torch.zeros(1, 4, dtype=torch.complex64))


def test_gradients_are_never_dropped_silently():
    layer, x = LAYERS[0], torch.randn(1, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad.*torch.no_grad\(\)"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (1, 4, 3)
    assert layer(x.detach()).shape == (1, 4, 3)


def test_other_layouts_and_devices():
    with pytest.raises(ValueError, match="only strided"):
        interop.to_jax(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"got a tensor on meta.*tensor.cpu\(\)"):
        interop.to_jax(torch.empty(3, device="meta"))


def test_wrong_shapes_raise_the_same_error_as_in_jax():
    with pytest.raises(ValueError, match=r"got shape \(4, 3\)"):
        LAYERS[0](torch.randn(4, 3))
    with pytest.raises(TypeError, match="int32"):
        LAYERS[0](torch.ones(1, 4, 3, dtype=torch.int32))
