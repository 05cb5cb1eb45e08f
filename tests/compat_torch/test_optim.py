"""compat_torch.optim: groups, labels, and what one optimizer step does to each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from compat_torch import Mamba, optim
from compat_torch.core.variables import Buffer, register


class Layer(nnx.Module):
    def __init__(self):
        self.A = register(jnp.ones(3), 0.001, 0.0)
        self.B = register(jnp.ones(2), 0.0)
        self.dt = register(jnp.ones(2), None, 0.0)
        self.W = nnx.Param(jnp.ones(4))


def loss(module):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(nnx.state(module)))


def test_a_learning_rate_of_zero_is_a_buffer():
    layer = Layer()
    assert isinstance(layer.B, Buffer)
    assert not isinstance(layer.B, nnx.Param)
    assert isinstance(layer.A, nnx.Param)


def test_hints_are_static_parts_of_a_compiled_module():
    hash(nnx.split(Layer())[0])
    np.testing.assert_array_equal(nnx.jit(lambda module: module.A[...] + 1)(Layer()), 2)


def test_groups_and_labels():
    layer = Layer()
    assert optim.groups(layer) == {
        "lr=0.001 weight_decay=0.0": {"lr": 0.001, "weight_decay": 0.0},
        "weight_decay=0.0": {"weight_decay": 0.0},
        "default": {},
    }
    tree = optim.labels(layer)
    assert dict(tree) == {"A": "lr=0.001 weight_decay=0.0", "dt": "weight_decay=0.0", "W": "default"}
    assert dict(optim.labels(nnx.state(layer, nnx.Param))) == dict(tree)


def test_each_group_moves_at_its_own_rate():
    layer = Layer()
    tx = optim.grouped(optax.adamw, layer, 0.1, weight_decay=0.5)
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    optimizer.update(layer, nnx.grad(loss)(layer))
    # AdamW's first step is lr * (sign of the gradient + decay * parameter).
    np.testing.assert_allclose(layer.A[...], 1 - 0.001, rtol=1e-5)
    np.testing.assert_allclose(layer.dt[...], 1 - 0.1, rtol=1e-5)
    np.testing.assert_allclose(layer.W[...], 1 - 0.1 * 1.5, rtol=1e-5)
    np.testing.assert_array_equal(layer.B[...], 1)


def test_a_schedule_moves_the_default_group_only():
    layer = Layer()
    tx = optim.grouped(optax.adamw, layer, optax.linear_schedule(0.0, 1.0, 10), b1=0.5)
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    optimizer.update(layer, nnx.grad(loss)(layer))
    np.testing.assert_allclose(layer.W[...], 1.0)
    np.testing.assert_allclose(layer.A[...], 1 - 0.001, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("jit", [False, True])
def test_mamba_trains_with_the_references_groups(jit):
    layer = Mamba(4, 2, rngs=nnx.Rngs(0))
    labels = optim.labels(layer)
    assert labels["A_log"] == labels["D"] == "weight_decay=0.0"
    assert labels["in_proj"]["kernel"] == "default"
    optimizer = nnx.Optimizer(layer, optim.grouped(optax.adamw, layer, 1e-2, weight_decay=0.1), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 8, 4))

    def train(layer, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(layer)
        optimizer.update(layer, grads)
        return value

    train = nnx.jit(train) if jit else train
    losses = [float(train(layer, optimizer)) for _ in range(20 if jit else 2)]
    assert losses[-1] < losses[0]
