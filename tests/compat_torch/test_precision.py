"""No float32 matrix product is left to JAX's default precision, whatever the ambient setting."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compat_torch.models.lti import LRU, S5

LAYERS = {"S5": lambda: S5(3, 4, "zoh"), "S5 conj": lambda: S5(3, 4, "zoh", True), "LRU": lambda: LRU(3, 4)}


def dots(function, *args, platform):
    """The dot and convolution lines of the program lowered for `platform`."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"stablehlo\.(?:dot_general|dot|convolution)\b.*", text)


def not_highest(lines):
    return [line for line in lines if "f32" in line and "[HIGHEST, HIGHEST]" not in line]


def pure(make):
    graph, params = nnx.split(make())
    x = jnp.ones((2, 9, 3))

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    def gradient(params, x):
        return jax.grad(lambda p, x: jnp.sum(forward(p, x) ** 2), argnums=(0, 1))(params, x)

    def step(params, x):
        layer = nnx.merge(graph, params)
        return layer.step(x[:, 0], layer.allocate_inference_cache(2))[0]

    return (forward, gradient, step), params, x


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ambient", [None, "bfloat16"])
def test_every_float32_dot_is_highest(name, platform, ambient):
    functions, params, x = pure(LAYERS[name])
    with jax.default_matmul_precision(ambient):
        for function in functions:
            lines = dots(function, params, x, platform=platform)
            assert lines
            assert not_highest(lines) == []


def test_the_check_sees_a_default_dot_and_precision_is_the_callers():
    x = jnp.ones((3, 3))
    assert not_highest(dots(lambda a, b: a @ b, x, x, platform="tpu"))
    functions, params, x = pure(lambda: LRU(3, 4, precision="default"))
    assert not_highest(dots(functions[0], params, x, platform="tpu"))
