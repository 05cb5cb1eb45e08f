"""Gradients of torch modules computed by JAX, against torch's own autograd and against jax.grad."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import torch_models

from compat_torch import interop, nn
from compat_torch.nn.lti import LRU, S5, CentaurusNeck
from compat_torch.nn.ltv import Mamba


def pair(d_model=3, d_state=4):
    """Our LRU and the definition in torch, with the same parameters."""
    ours = LRU(d_model, d_state)
    theirs = torch_models.LRU(d_model, d_state)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def by_rows(theirs, x):
    return torch.stack([theirs(row) for row in x])


@pytest.mark.parametrize(("B", "L"), [(1, 1), (2, 7), (1, 13)])
def test_gradients_are_those_of_torch(B, L):
    ours, theirs = pair()
    x = torch.randn(B, L, 3)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    w = torch.randn(B, L, 3)
    (ours(x1) * w).sum().backward()
    (by_rows(theirs, x2) * w).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, atol=1e-5, rtol=1e-4)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-5 * max(1, scale), rtol=1e-4)


def test_finite_differences_in_float64():
    with jax.enable_x64(True):
        layer = S5(2, 2, "zoh").double()
        names, values = zip(*layer.named_parameters(), strict=True)

        def function(x, *values):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x, *values))


def test_complex_parameters_and_outputs_follow_torchs_convention():
    with jax.enable_x64(True):
        layer = CentaurusNeck(2, 2, 2).double()
        layer.A = torch.nn.Parameter(layer.A.detach().to(torch.complex128))

        def function(A, x):
            return torch.func.functional_call(layer, {"A": A}, (x,))

        x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (layer.A, x))

        class Power(nnx.Module):
            def __call__(self, z):
                return z**3 * (1 + 2j)

        z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
        assert torch.autograd.gradcheck(nn.wrap(Power()), (z,))


def test_event_times_have_gradients():
    layer = Mamba(3, d_state=2, d_conv=2)
    x, dt = torch.randn(2, 5, 3), torch.rand(2, 5, requires_grad=True)
    layer(x, integration_timesteps=dt).square().sum().backward()
    module = layer.to_jax()

    def loss(dt):
        return jnp.sum(jnp.square(module(jnp.asarray(x.numpy()), dt)))

    expected = jax.grad(loss)(jnp.asarray(dt.detach().numpy()))
    np.testing.assert_allclose(dt.grad.numpy(), expected, rtol=1e-4, atol=1e-9)
    assert float(dt.grad.abs().max()) > 0


class Costly(nnx.Module):
    """Counts which of its parameters are differentiated when it is traced."""

    differentiated: set = set()  # noqa: RUF012

    def __init__(self):
        self.a, self.b = nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))

    def __call__(self, x):
        for name in ("a", "b"):
            if isinstance(getattr(self, name).get_value(), jax.core.Tracer):
                kind = type(getattr(self, name).get_value()).__name__
                Costly.differentiated |= {name} if kind in ("JVPTracer", "LinearizeTracer") else set()
        return jnp.sin(self.a[...] * x) + jnp.cos(self.b[...] * x)


def test_frozen_parameters_cost_nothing():
    model = nn.wrap(Costly())
    model.b.requires_grad_(False)
    Costly.differentiated = set()
    y = model(torch.ones(3))
    assert Costly.differentiated == {"a"}
    y.sum().backward()
    assert model.b.grad is None
    torch.testing.assert_close(model.a.grad, torch.cos(torch.ones(3)))
    model.requires_grad_(False)
    assert model(torch.ones(3)).grad_fn is None


def saved_tensors(function):
    """What torch keeps for the backward pass of `function`."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


def test_residuals_are_torchs_to_keep_and_to_free():
    layer, x = nn.wrap(Costly()), torch.randn(3)
    kept = saved_tensors(lambda: layer(x))
    assert kept
    with torch.no_grad():
        assert not saved_tensors(lambda: layer(x))
    own = {parameter.data_ptr() for parameter in layer.parameters()} | {x.data_ptr()}
    assert any(tensor.data_ptr() in own for tensor in kept)
    dense = nn.wrap(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
    weight = saved_tensors(lambda: dense(torch.ones(2, 5, requires_grad=True)))
    assert any(tensor is dense.weight or tensor.data_ptr() == dense.weight.data_ptr() for tensor in weight)
    assert sum(tensor.numel() == 20 for tensor in weight) == 1
    y = layer(x)
    residuals = [weakref.ref(tensor) for tensor in saved_tensors(lambda: layer(x)) if tensor.data_ptr() not in own]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    del y, kept
    gc.collect()
    assert not any(ref() is not None for ref in residuals)


def test_retain_graph_and_in_place_edits():
    layer, x = LRU(3, 4), torch.randn(2, 9, 3)
    y = layer(x)
    y.sum().backward(retain_graph=True)
    first = layer.D.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(layer.D.grad, 2 * first)
    y = layer(x)
    y.mul_(2).add_(x)
    y.sum().backward()
    torch.testing.assert_close(layer.D.grad, 4 * first)
    layer = nn.wrap(Costly())
    y = layer(torch.ones(3, requires_grad=True))
    with torch.no_grad():
        layer.a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_raises():
    layer, x = LRU(3, 4), torch.randn(1, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])
    with pytest.raises(NotImplementedError, match=r"double backward.*jax.grad"):
        gradient.square().sum().backward()


def test_gradients_flow_through_a_cache():
    layer, x = LRU(3, 4), torch.randn(2, 5, 3)
    layer(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    cache = layer.allocate_inference_cache(2)
    loss = 0
    for t in range(5):
        y, cache = layer.step(x[:, t], cache)
        loss = loss + y.square().sum()
    loss.backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("L", [0, 1])
def test_short_and_empty_sequences(L):
    layer, x = LRU(3, 4), torch.randn(2, L, 3, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, L, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.C_re.grad.shape == (3, 4)


def test_inputs_of_any_layout_give_the_same():
    layer, base = LRU(3, 4), torch.randn(4, 6, 3)
    views = {
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": base.repeat_interleave(2, 1)[:, ::2],
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view(4, 6, 3),
    }
    y = layer(base)
    for view in views.values():
        before = view.clone()
        torch.testing.assert_close(layer(view), y)
        assert torch.equal(view, before)
    torch.testing.assert_close(layer(base[:1].expand(4, 6, 3)), y[:1].expand(4, 6, 3))
    gradient = torch.ones(1).expand(4, 6, 3)
    y.backward(gradient)
    mixed = torch.randn(3, 6, 4, requires_grad=True)
    layer(mixed.permute(2, 1, 0)).sum().backward()
    assert mixed.grad.shape == (3, 6, 4)


def test_results_do_not_hang_on_the_callers_memory():
    layer, x = LRU(3, 4), torch.randn(2, 300, 3)
    with torch.no_grad():
        expected = layer(x.clone())
        y = layer(x)
        x.zero_()
        layer.D.zero_()
    assert torch.equal(y, expected)


def test_arrays_of_numpy_and_jax_are_taken_too():
    layer, x = LRU(3, 4), torch.randn(2, 5, 3)
    with torch.no_grad():
        y = layer(x, lengths=torch.tensor([5, 2]))
        for given in (x.numpy(), interop.to_jax(x)):
            assert torch.equal(layer(given, lengths=np.array([5, 2])), y)
        assert torch.equal(layer(x, lengths=torch.tensor([5, 2], dtype=torch.int32)), y)
    assert torch.equal(y[1, 2:], torch.zeros(3, 3))


def test_a_device_that_jax_lacks():
    layer = LRU(3, 4).to("meta")
    with pytest.raises(ValueError, match=r"got a tensor on meta.*tensor.cpu\(\)"):
        layer(torch.randn(1, 2, 3, device="meta"))
