"""Mamba, RGLRU, S7 and the time-varying S5 by the compiled CPU kernels: odd widths and lengths, what stays in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import layers, time_varying
from oracles import mamba as mamba_oracle
from oracles.layers import call, close, intervals, noise

from compat_torch.models.ltv import RGLRU, S5, S7, Mamba
from compat_torch.models.ltv.mamba import MambaMixer
from spyx.ops.dispatch import native_kernels

NATIVE = "spyx_native"


def rglru(d_model, seed=0, **kwargs):
    layer = RGLRU(d_model, **kwargs, rngs=nnx.Rngs(seed))
    return layer, lambda x: time_varying.rglru(layer.state_dict(), x)


def s7(d_model, d_state, seed=0, **kwargs):
    layer = S7(d_model, d_state, **kwargs, rngs=nnx.Rngs(seed))
    return layer, lambda x: time_varying.s7(layer.state_dict(), x, d_state=d_state)


def mamba(d_model, d_state, seed=0, **kwargs):
    layer = Mamba(d_model, d_state, **kwargs, rngs=nnx.Rngs(seed))
    return layer, lambda x: mamba_oracle.mamba(layer.state_dict(), x)


def program(layer, *args):
    graph, params = nnx.split(layer)
    return jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)).lower(params, *args)


def kernels(layer, *args):
    """How many compiled kernels the forward pass calls."""
    return program(layer, *args).as_text().count(NATIVE)


def in_one_kernel(layer, *args):
    """Whether the layer is a kernel from its input to its output."""
    return kernels(layer, *args) > 0 and "dot_general" not in program(layer, *args).as_text()


def test_kernels_are_there():
    assert native_kernels()


@pytest.mark.parametrize(
    ("d_model", "d_state", "kwargs", "B", "L"),
    [
        (1, 1, {"d_conv": 1}, 1, 17),
        (35, 5, {"d_conv": 7, "bias": True}, 1, 97),
        (9, 16, {"conv_bias": False, "dt_rank": 4}, 3, 48),
        (40, 3, {"expand": 4}, 2, 53),
    ],
)
def test_mamba_is_its_definition(d_model, d_state, kwargs, B, L):
    layer, definition = mamba(d_model, d_state, **kwargs)
    x = noise(B, L, d_model, seed=3)
    assert in_one_kernel(layer, x)
    layers.check_equivalence(layer, x, definition(x), L - 18)


def test_mamba_with_norms_is_the_layer_of_xla():
    layer, x = MambaMixer(20, 30, 6, 4, 3, norm_eps=1e-3, rngs=nnx.Rngs(0)), noise(2, 100, 20)
    before = noise(2, 30, 4, seed=1), noise(2, 30, 6, seed=2)
    cache = dict(zip(("conv_state", "lrnn_state"), before, strict=True)) | {"seqlen_offset": jnp.zeros(2, jnp.int32)}
    y, after = call(layer, x, inference_cache=cache)
    assert in_one_kernel(layer, x)
    expected = jax.jit(lambda x: layer._outputs(jnp.swapaxes(x, 0, 1), None, before, None))(x)
    close(jnp.swapaxes(y, 0, 1), expected[0])
    close(after["conv_state"], expected[1])
    close(after["lrnn_state"], expected[2])


@pytest.mark.parametrize(
    ("d_model", "expand", "d_conv", "bias", "B", "L"),
    [(1, 1, 1, False, 1, 17), (33, 2, 7, True, 1, 97), (37, 1, 4, False, 3, 48), (64, 1, 2, True, 2, 53)],
)
def test_rglru_is_its_definition(d_model, expand, d_conv, bias, B, L):
    layer, definition = rglru(d_model, expand=expand, d_conv=d_conv, bias=bias)
    x = noise(B, L, d_model, seed=3)
    assert in_one_kernel(layer, x)
    layers.check_equivalence(layer, x, definition(x), L - 18)


@pytest.mark.parametrize(
    ("d_model", "d_state", "B", "L"), [(1, 1, 1, 17), (33, 5, 1, 97), (6, 70, 3, 48), (65, 17, 2, 53), (140, 3, 1, 19)]
)
def test_s7_is_its_definition(d_model, d_state, B, L):
    layer, definition = s7(d_model, d_state)
    x = noise(B, L, d_model, seed=3)
    assert in_one_kernel(layer, x)
    layers.check_equivalence(layer, x, definition(x), L - 18)


@pytest.mark.parametrize(
    ("d_model", "d_state", "kwargs", "B", "L"),
    [(1, 1, {}, 1, 17), (33, 5, {"conj_sym": True}, 1, 97), (6, 17, {"discretization": "bilinear"}, 3, 48)],
)
@pytest.mark.parametrize("events", [False, True])
def test_s5_is_its_definition(d_model, d_state, kwargs, B, L, events):
    layer = S5(d_model, d_state, **kwargs, rngs=nnx.Rngs(0))
    x, gaps = noise(B, L, d_model, seed=3), intervals(B, L) if events else None
    assert in_one_kernel(layer, x, gaps)
    expected = time_varying.s5(layer.state_dict(), x, timesteps=gaps, **kwargs)
    layers.check_equivalence(layer, x, expected, L - 18, gaps)


@pytest.fixture(params=["Mamba", "RGLRU", "S7", "S5"])
def layer(request):
    if request.param == "S5":
        return S5(20, 6, rngs=nnx.Rngs(0))
    if request.param == "Mamba":
        return mamba(20, 6, bias=True)[0]
    return rglru(20, bias=True)[0] if request.param == "RGLRU" else s7(20, 6)[0]


def test_a_gate_that_hardly_opens_or_closes_keeps_its_accuracy():
    for bias in (-9.0, 9.0):
        layer, definition = rglru(16, a_init_range=(0.999, 0.9999), reference="paper")
        assert layer.recurrent_gate_proj.bias is not None
        layer.recurrent_gate_proj.bias.set_value(jnp.full((16,), bias))
        x = noise(2, 80, 16, seed=5)
        y = definition(x)
        np.testing.assert_allclose(call(layer, x), y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_nan_and_inf_stay_in_their_row_and_after_their_step(layer):
    x = noise(3, 60, 20)
    clean = np.asarray(call(layer, x))
    for value in (np.nan, np.inf):
        y = np.asarray(call(layer, x.at[1, 50].set(value)))
        assert np.isnan(y[1, 50:]).all()
        np.testing.assert_array_equal(y[1, :50], clean[1, :50])
        np.testing.assert_array_equal(y[::2], clean[::2])


def test_it_is_the_same_under_vmap(layer):
    x = noise(2, 3, 51, 20)
    y = jax.jit(jax.vmap(layer))(x)
    for i in range(2):
        close(y[i], call(layer, x[i]), 1e-6)


def test_gradients_are_those_of_float64(layer):
    x, lengths = noise(2, 51, 20), jnp.array([51, 13])
    graph, params = nnx.split(layer)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, lengths=lengths) ** 2)

    g = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (params, x))
        expected = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(*wide))
        direction = noise(*x.shape, seed=4, dtype=jnp.float64)
        step = [loss(wide[0], wide[1] + s * direction) for s in (1e-6, -1e-6)]
        close(jnp.vdot(expected[-1], direction), (step[0] - step[1]) / 2e-6, 1e-7)
    for got, exact in zip(g, expected, strict=True):
        close(got, exact, 5e-6)


def test_the_gradient_of_a_gradient(layer):
    x, direction = noise(1, 19, 20), noise(1, 19, 20, seed=1)

    def slope(v):
        return jnp.vdot(jax.grad(lambda v: jnp.sum(layer(v) ** 2))(v), direction)

    second = jnp.vdot(jax.jit(jax.grad(slope))(x), direction)
    difference = jax.jit(lambda s: slope(x + s * direction) - slope(x - s * direction))(0.01) / 0.02
    close(second, difference, 1e-3)
    assert abs(float(second)) > 0.1


def test_other_dtypes_and_exports_stay_in_xla(layer):
    x = noise(2, 40, 20)
    assert kernels(layer, x) > 0
    exported = jax.export.export(jax.jit(layer), platforms=("cpu", "tpu"))(x)
    assert NATIVE not in exported.mlir_module()
    close(exported.call(x), call(layer, x), 1e-6)
    cls, sizes = type(layer), {} if isinstance(layer, RGLRU) else {"d_state": 6}
    half = cls(20, **sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert "dot_general" in program(half, x.astype(jnp.bfloat16)).as_text()
    close(call(half, x.astype(jnp.bfloat16)).astype(jnp.float32), half(x).astype(jnp.float32), 2e-2)


def test_few_steps_have_forward_mode():
    layer, x = s7(20, 6)[0], noise(2, 16, 20)
    tangent = jax.jvp(layer, (x,), (x,))[1]
    close(tangent, (layer(x + 1e-2 * x) - layer(x - 1e-2 * x)) / 2e-2, 1e-3)


def test_projections_that_are_replaced_are_called():
    """As `spyx.quant` does it: by a subclass with another call."""

    class Doubled(nnx.Linear):
        def __call__(self, inputs, *args, **kwargs):
            return 2 * super().__call__(inputs, *args, **kwargs)

    makers = (lambda: rglru(6)[0], "out_proj"), (lambda: s7(6, 3)[0], "in_proj"), (lambda: mamba(6, 3)[0], "out_proj")
    for make, name in makers:
        layer, x = make(), noise(2, 19, 6)
        plain = np.asarray(call(layer, x))
        getattr(layer, name).__class__ = Doubled
        twice = np.asarray(call(layer, x))
        layer = make()
        getattr(layer, name).kernel.set_value(2 * getattr(layer, name).kernel[...])
        close(twice, call(layer, x), 1e-6)
        assert np.abs(twice - plain).max() > 0.01


def test_weights_that_few_steps_use_are_not_packed():
    for layer, definition in (rglru(128), mamba(300, 2)):
        x = noise(1, 19, layer.d_model)
        assert kernels(layer, x) == 1  # the scan
        close(call(layer, x), definition(x))
