"""No float32 matrix product is left to JAX's default precision, whatever the ambient setting."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compat_torch.architectures.original import S4Model
from compat_torch.layers import MHA
from compat_torch.models import lti, ltv, original
from compat_torch.models.lti import LRU, S5

LAYERS = {"S5": lambda: S5(3, 4, "zoh"), "S5 conj": lambda: S5(3, 4, "zoh", True), "LRU": lambda: LRU(3, 4)}
MORE = {
    "S4D": lambda: lti.S4D(3, d_state=4, transposed=False),
    "S4": lambda: lti.S4(3, d_state=4, transposed=False, l_max=9),
    "Centaurus": lambda: lti.Centaurus(3, 4, 2),
    "Mamba": lambda: ltv.Mamba(3, 2),
    "event S5": lambda: ltv.S5(3, 4),
    "RGLRU": lambda: ltv.RGLRU(3),
    "S7": lambda: ltv.S7(3, 4),
    "MHA": lambda: MHA(3, 1, causal=True),
}
ORIGINAL = {
    "S4Block": lambda **how: original.S4Block(3, d_state=4, l_max=9, transposed=False, gate=2, bottleneck=1, **how),
    "S4Block diag": lambda **how: original.S4Block(3, d_state=4, mode="diag", transposed=False, **how),
    "S4D": lambda **how: original.S4D(3, 4, transposed=False, **how),
    "S5SSM": lambda **how: original.S5SSM(3, 4, **how),
    "S5": lambda **how: original.S5(3, 4, **how),
    "S5Block": lambda **how: original.S5Block(3, 4, False, **how),
    "S4Model": lambda **how: S4Model(3, 2, d_model=4, n_layers=1, **how),
}


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
        y = nnx.merge(graph, params)(x)
        return y[0] if isinstance(y, tuple) else y

    def gradient(params, x):
        return jax.grad(lambda p, x: jnp.sum(forward(p, x) ** 2), argnums=(0, 1), allow_int=True)(params, x)

    def step(params, x):
        layer = nnx.merge(graph, params)
        return layer._advance(x[:, 0], layer.allocate_inference_cache(2, 9))[0]

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


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", MORE)
def test_every_float32_dot_of_the_other_layers_is_highest(name, platform):
    functions, params, x = pure(MORE[name])
    for function in functions:
        lines = dots(function, params, x, platform=platform)
        assert lines
        assert not_highest(lines) == []


def precisions(lines):
    """Of the float32 dots and convolutions; one that states none is computed in JAX's default."""
    stated = [re.findall(r"\b(HIGHEST|HIGH|DEFAULT)\b", line) for line in lines if "f32" in line]
    return {word for words in stated for word in words or ["DEFAULT"]}


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize(("arguments", "wanted"), [({}, "HIGHEST"), ({"precision": "default"}, "DEFAULT")])
def test_the_layers_of_the_original_authors_compute_in_the_precision_asked_for(name, platform, arguments, wanted):
    def make():
        layer = ORIGINAL[name](**arguments)
        layer.eval()
        return layer

    (forward, gradient, step), params, x = pure(make)
    assert precisions(dots(forward, params, x, platform=platform)) == {wanted}
    # JAX differentiates a linear solve, by which S4 finds C from C~, in float32 whatever is asked for.
    solves = {"HIGHEST"} if name == "S4Block" else set()
    assert precisions(dots(gradient, params, x, platform=platform)) - solves == {wanted} - solves
    # The model has no step; that of S4 sums over its states by a product with ones, always in float32.
    if wanted == "HIGHEST" and name != "S4Model":
        assert precisions(dots(step, params, x, platform=platform)) == {wanted}


def test_the_check_sees_a_default_dot_and_precision_is_the_callers():
    x = jnp.ones((3, 3))
    assert not_highest(dots(lambda a, b: a @ b, x, x, platform="tpu"))
    functions, params, x = pure(lambda: LRU(3, 4, precision="default"))
    assert not_highest(dots(functions[0], params, x, platform="tpu"))
