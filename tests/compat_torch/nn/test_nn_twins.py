"""Every public class of compat_torch has a torch twin at the mirrored import path."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from flax import nnx

import compat_torch
from compat_torch import nn
from compat_torch.nn.architectures.embedding import TokenEmbedding
from compat_torch.nn.layers.mha import MHA
from compat_torch.nn.layers.mlp import GatedMLP

INNER = {"backbone", "causal_lm", "config"}  # of no path in lrnnx: reached through the models


def mirrored():
    """(JAX module, torch module)."""
    paths = [(f"models.{name}", name) for name in ("lti", "ltv", "original")]
    for package in ("architectures", "layers"):
        for found in pkgutil.iter_modules([f"{compat_torch.__path__[0]}/{package}"]):
            if not found.name.startswith("_") and found.name not in INNER:
                paths.append((f"{package}.{found.name}",) * 2)
    return paths


@pytest.mark.parametrize(("ours", "twins"), mirrored())
def test_every_class_has_a_twin(ours, twins):
    ours, twins = importlib.import_module(f"compat_torch.{ours}"), importlib.import_module(f"compat_torch.nn.{twins}")
    classes = {
        name: value
        for name, value in vars(ours).items()
        if not name.startswith("_") and inspect.isclass(value) and issubclass(value, nnx.Module)
    }
    assert classes
    for name, cls in classes.items():
        twin = getattr(twins, name)
        assert issubclass(twin, torch.nn.Module)
        assert twin.jax_class is cls


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: MHA(4, num_heads=2), torch.randn(2, 5, 4)),
        (lambda: GatedMLP(4, 6), torch.randn(2, 5, 4)),
        (lambda: TokenEmbedding(4, 9), torch.randint(9, (2, 5))),
    ],
    ids=["MHA", "GatedMLP", "TokenEmbedding"],
)
def test_parts_of_models(make, x):
    part = make().eval()
    y = part(x)
    np.testing.assert_allclose(y.detach().numpy(), nn.from_torch(part)(x.numpy()), atol=1e-6, rtol=1e-6)
    y.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
