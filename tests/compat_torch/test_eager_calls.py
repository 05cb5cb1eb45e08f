"""Eager calls of layers and models compile once, not at every call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spyx.nn
from compat_torch.core.compiled import compiled
from compat_torch.models import lti, ltv, original

H, N = 6, 4
LAYERS = {
    "S5": lambda: lti.S5(H, N, "zoh"),
    "LRU": lambda: lti.LRU(H, N),
    "S4D": lambda: lti.S4D(H, d_state=N, transposed=False),
    "S4": lambda: lti.S4(H, d_state=N, transposed=False),
    "S4 l_max": lambda: lti.S4(H, d_state=N, transposed=False, l_max=7),
    "Centaurus": lambda: lti.Centaurus(H, N, 2),
    "Mamba": lambda: ltv.Mamba(H, N),
    "event S5": lambda: ltv.S5(H, N, "zoh"),
    "RGLRU": lambda: ltv.RGLRU(H),
    "S7": lambda: ltv.S7(H, N),
    "S4Block": lambda: original.S4Block(H, d_state=N, transposed=False),
}
COMPILING = "/jax/core/compile/backend_compile_duration"


def compilations(call) -> int:
    """How many programs one more call compiles, or fetches from the compilation cache."""
    call()
    found = []

    def listen(event: str, duration_secs: float, **kwargs: str | int):
        found.extend([event] * (event == COMPILING))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


def test_a_new_loop_is_a_compilation():
    """The measure itself: JAX knows the body of a loop by identity."""
    assert compilations(lambda: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(()), jnp.ones(3))) > 0


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = LAYERS[name]()
    layer.eval()
    x = np.random.default_rng(0).standard_normal((2, 7, H)).astype(np.float32)
    cache = layer.allocate_inference_cache(2)
    column = x[:, :1] if "ltv" in type(layer).__module__ else x[:, 0]
    assert compilations(lambda: layer(x)) == 0
    assert compilations(lambda: layer(x, inference_cache=cache)) == 0
    assert compilations(lambda: layer.step(column, cache)) == 0


def test_spiking_models():
    model = spyx.nn.Sequential(nnx.Linear(3, H, rngs=nnx.Rngs(0)), spyx.nn.LIF((H,), rngs=nnx.Rngs(0)))
    assert compilations(lambda: spyx.nn.run(model, jnp.ones((5, 2, 3)))) == 0


class Scale(nnx.Module):
    def __init__(self, factor: float):
        self.factor = nnx.Param(jnp.asarray(factor))

    @compiled
    def times(self, x, power: int = 1, then=None):
        y = self.factor[...] ** power * x["value"]
        return y if then is None else then(y)


def test_compiled_methods():
    """Values of the module as they are now, constants, pytrees, functions, transformations."""
    module, x = Scale(3.0), {"value": jnp.arange(4.0)}
    np.testing.assert_array_equal(module.times(x), 3 * np.arange(4))
    module.factor.set_value(jnp.asarray(2.0))
    np.testing.assert_array_equal(module.times(x, power=3), 8 * np.arange(4))
    np.testing.assert_array_equal(module.times(x, then=lambda y: y + 1), 2 * np.arange(4) + 1)
    assert float(nnx.grad(lambda m: jnp.sum(m.times(x, 2)))(module).factor[...]) == 2 * 2 * 6
    np.testing.assert_array_equal(jax.vmap(lambda v: module.times({"value": v}))(x["value"]), 2 * np.arange(4))
    np.testing.assert_array_equal(jax.jit(module.times)(x), 2 * np.arange(4))
