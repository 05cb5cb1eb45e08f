"""torch.nn.utils.parametrize, weight_norm and spectral_norm on torch modules computed by JAX."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, weight_norm

from compat_torch import from_torch
from compat_torch.nn.lti import LRU
from compat_torch.nn.ltv import Mamba


class Twice(torch.nn.Module):
    def forward(self, value):
        return 2 * value


@pytest.fixture
def x():
    return torch.randn(2, 5, 3)


@pytest.mark.parametrize("name", ["D", "B_re"])
def test_a_parameter_of_the_layer_itself(name, x):
    layer = LRU(3, 4)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(plain, name).mul_(2)
    parametrize.register_parametrization(layer, name, Twice())
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    original = layer.parametrizations[name].original
    torch.testing.assert_close(original.grad, 2 * getattr(plain, name).grad, atol=1e-4, rtol=1e-4)
    assert name not in dict(layer.named_parameters())
    np.testing.assert_array_equal(getattr(from_torch(layer), name)[...], getattr(plain, name).detach().numpy())
    with torch.no_grad():
        step, _ = layer.step(x[:, 0], layer.allocate_inference_cache(2))
        torch.testing.assert_close(step, plain.step(x[:, 0], plain.allocate_inference_cache(2))[0])
        original.mul_(3)
        assert not torch.equal(layer(x), y)
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is LRU
    assert name in dict(layer.named_parameters())


def test_weight_norm_of_a_projection(x):
    layer = Mamba(3, d_state=2, d_conv=2)
    with torch.no_grad():
        y = layer(x)
    parametrizations.weight_norm(layer.in_proj, "weight")
    torch.testing.assert_close(layer(x), y)
    layer(x).square().sum().backward()
    magnitude, direction = (
        layer.in_proj.parametrizations.weight.original0,
        layer.in_proj.parametrizations.weight.original1,
    )
    assert magnitude.grad.shape == (12, 1)
    # The gradient of a norm's direction has no part along it.
    np.testing.assert_allclose((direction.grad * direction).sum(1).detach(), np.zeros(12), atol=1e-6)
    average = copy.deepcopy(layer)
    with torch.no_grad():
        torch.testing.assert_close(average(x), y)
        magnitude.mul_(2)
        assert not torch.equal(layer(x), y)
        torch.testing.assert_close(average(x), y)
    other = Mamba(3, d_state=2, d_conv=2)
    parametrizations.weight_norm(other.in_proj, "weight")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_spectral_norm(x):
    layer = Mamba(3, d_state=2, d_conv=2)
    parametrizations.spectral_norm(layer.out_proj, "weight", n_power_iterations=50)
    layer(x).sum().backward()
    assert layer.out_proj.parametrizations.weight.original.grad is not None
    np.testing.assert_allclose(torch.linalg.matrix_norm(from_torch_weight(layer), 2), 1, rtol=1e-4)


def from_torch_weight(layer):
    return torch.from_numpy(np.array(from_torch(layer).state_dict()["out_proj.weight"]))


def test_pickle_is_refused_by_torch():
    layer = LRU(3, 4)
    parametrize.register_parametrization(layer, "D", Twice())
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(layer)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_the_older_weight_norm_with_hooks(x):
    layer = LRU(3, 4)
    with torch.no_grad():
        y = layer(x)
    weight_norm(layer, "B_re")
    torch.testing.assert_close(layer(x), y)
    with torch.no_grad():
        layer.B_re_g.mul_(2)
    layer(x).sum().backward()
    assert float(layer.B_re_g.grad.abs().max()) > 0
    inner = Mamba(3, d_state=2, d_conv=2)
    weight_norm(inner.in_proj, "weight")
    with pytest.raises(TypeError, match="in_proj has hooks, which would never run"):
        inner(x)
