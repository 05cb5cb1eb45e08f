from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for
from jax.experimental.pallas import tpu as pltpu

from spyx.ops import discretize
from spyx.ops.pallas import gpu, tpu
from spyx.ops.pallas.selective import discretizer

KERNELS = {"tpu": (tpu, True), "tpu-threads": (tpu, pltpu.InterpretParams()), "gpu": (gpu, True)}
NAMES = ("y", "h_last", "u", "dt", "A", "B", "C", "h0")


def oracle(u, dt, A, B, C, h0, reset, *, discretization, reverse):
    def step(h, inputs):
        u, dt, B, C, reset = inputs
        if discretization == "mamba":
            decay, weight = jnp.exp(dt[..., None] * A), dt[..., None]
        else:
            decay, weight = getattr(discretize, discretization)(A, dt[..., None])
        h = decay * jnp.where(reset[:, None, None], 0, h) + weight * u[..., None] * B[:, None, :]
        return h, (h * C[:, None, :]).sum(-1)

    h_last, y = jax.lax.scan(step, h0, (u, dt, B, C, reset), reverse=reverse)
    return y, h_last


def random_arguments(T, batch, D, N, *, resets, dtype="float32"):
    rng = np.random.default_rng(T)

    def draw(*shape):
        return rng.normal(size=shape).astype("float32")

    u, B, C, dy = draw(T, batch, D), draw(T, batch, N), draw(T, batch, N), draw(T, batch, D)
    dt, A = np.exp(draw(T, batch, D) - 1), -np.exp(draw(D, N))
    values = (u, dt, A, B, C, draw(batch, D, N))
    reset = rng.random((T, batch)) < (0.3 if resets else 0)
    return [jnp.asarray(v, dtype) for v in values], reset, jnp.asarray(dy, dtype), draw(batch, D, N)


def both_passes(kernel, arguments, reset, dy, dh_last, **kwargs):
    module, interpret = KERNELS[kernel]
    flags = jnp.asarray(reset) if reset.any() else None
    y, h_last, starts = module.selective_scan_forward(*arguments, flags, interpret=interpret, **kwargs)
    gradients = module.selective_scan_backward(
        *arguments[:5], starts, dy, jnp.asarray(dh_last), flags, interpret=interpret, **kwargs
    )
    return y, h_last, *gradients


def expected_passes(arguments, reset, dy, dh_last, **kwargs):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(v, "float64")) for v in arguments]
        outputs, pull = jax.vjp(lambda *args: oracle(*args, reset, **kwargs), *wide)
        cotangents = pull((jnp.asarray(np.asarray(dy, "float64")), jnp.asarray(np.asarray(dh_last, "float64"))))
        return [np.asarray(v) for v in (*outputs, *cotangents)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("shape", "discretization", "reverse", "resets"),
    [
        ((35, 2, 10, 3), "mamba", False, True),
        ((5, 1, 1100, 1), "zoh", True, False),
        ((8, 1, 40, 9), "bilinear", True, True),
        ((1, 3, 2, 2), "dirac", False, True),
    ],
)
def test_values_and_gradients_equal_float64(kernel, shape, discretization, reverse, resets):
    arguments, reset, dy, dh_last = random_arguments(*shape, resets=resets)
    kwargs = {"discretization": discretization, "reverse": reverse}
    got = both_passes(kernel, arguments, reset, dy, dh_last, chunk=16, **kwargs)
    expected = expected_passes(arguments, reset, dy, dh_last, **kwargs)
    for name, ours, theirs in zip(NAMES, got, expected, strict=True):
        bound = 1e-6 * max(1, abs(theirs).max())
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=bound, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kernel", "discretization"),
    [*itertools.product(("tpu", "gpu"), ("mamba", "zoh", "bilinear", "dirac")), ("tpu-threads", "mamba")],
)
@pytest.mark.parametrize(
    ("shape", "reverse", "resets"), [((131, 2, 130, 4), False, True), ((33, 2, 7, 17), True, True)]
)
def test_values_and_gradients_equal_float64_wide(kernel, shape, discretization, reverse, resets):
    test_values_and_gradients_equal_float64(kernel, shape, discretization, reverse, resets)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_bfloat16(kernel):
    arguments, reset, dy, dh_last = random_arguments(20, 2, 8, 2, resets=False, dtype="bfloat16")
    kwargs = {"discretization": "mamba", "reverse": False}
    got = both_passes(kernel, arguments, reset, dy, dh_last, **kwargs)
    expected = expected_passes(arguments, reset, dy, dh_last, **kwargs)
    assert got[0].dtype == got[2].dtype == got[3].dtype == jnp.bfloat16
    for name, ours, theirs in zip(NAMES, got, expected, strict=True):
        bound = (2**-8 if ours.dtype == jnp.bfloat16 else 1e-6) * max(1, abs(theirs).max())
        np.testing.assert_allclose(np.asarray(ours, "float64"), theirs, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_a_nan_row_stays_a_row_and_ends_at_a_reset(kernel):
    (u, *rest), reset, dy, dh_last = random_arguments(6, 2, 3, 2, resets=False)
    reset[4, 0] = True
    u = u.at[2, 0].set(jnp.nan)
    y, h_last, *_, dh0 = both_passes(kernel, [u, *rest], reset, dy, dh_last, discretization="mamba", reverse=False)
    assert np.isnan(y[2:4, 0]).all()
    assert np.isfinite(y[4:, 0]).all()
    assert np.isfinite(y[:, 1]).all()
    assert np.isfinite(h_last).all()
    assert np.isfinite(dh0).all()


@pytest.mark.parametrize("name", ["zoh", "bilinear", "dirac"])
def test_discretizers_equal_those_of_ops(name):
    dt = jnp.asarray([1e-8, 1e-3, 0.4, 0.6, 3.0, 100.0])[:, None]
    A = -jnp.asarray([1e-8, 0.01, 0.9, 1.0, 1.2, 30.0])
    dt, A = jnp.broadcast_arrays(dt, A)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(dt, "float64")), jnp.asarray(np.asarray(A, "float64"))

        def reference(dt, A):
            decay, weight = getattr(discretize, name)(A, dt)
            return decay, jnp.broadcast_to(weight, decay.shape).astype(decay.dtype)

        outputs, pull_wide = jax.vjp(reference, *wide)
        expected = [np.asarray(v) for v in (*outputs, *pull_wide(tuple(map(jnp.ones_like, outputs))))]
    decay, weight, pull = discretizer(name)(dt, A)
    got = (decay, weight, *pull(jnp.ones_like(dt), jnp.ones_like(dt)))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("module", [tpu, gpu])
def test_refuses_what_does_not_fit(module):
    (u, dt, A, B, C, h0), *_ = random_arguments(4, 2, 3, 2, resets=False)
    with pytest.raises(ValueError, match=r"B must have shape \(4, 2, 2\), got \(3, 2, 2\)"):
        module.selective_scan_forward(u, dt, A, B[1:], C, h0)
    with pytest.raises(ValueError, match="discretization must be one of"):
        module.selective_scan_forward(u, dt, A, B, C, h0, discretization="async")
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        module.selective_scan_forward(u.astype(jnp.float16), dt, A, B, C, h0)
    with pytest.raises(ValueError, match="reset must be bool"):
        module.selective_scan_forward(u, dt, A, B, C, h0, jnp.ones((4, 2)))
    if module is tpu:
        with pytest.raises(ValueError, match="chunk must be a multiple of 8"):
            module.selective_scan_forward(u, dt, A, B, C, h0, chunk=12)
    wide = jnp.ones((4, 2, 512))
    assert module.selective_scan_fits(wide, wide, A, B, C, h0)
    assert module.selective_scan_fits(u, dt, A, B, C, h0) is (module is gpu)
    assert not module.selective_scan_fits(wide, wide, jnp.ones((3, 33)), B, C, h0)


def compile_both(chip, T, batch, D, N, *, discretization, dtype=jnp.float32, resets=False):
    """Peak bytes of forward and backward, in units of the size of u."""
    module = gpu if chip.endswith("100") else tpu
    shape = jax.ShapeDtypeStruct
    u, B = shape((T, batch, D), dtype), shape((T, batch, N), dtype)
    A, h0 = shape((D, N), jnp.float32), shape((batch, D, N), jnp.float32)
    reset = shape((T, batch), jnp.bool_) if resets else None

    def forward(*args):
        return module.selective_scan_forward(*args, discretization=discretization)

    def backward(*args):
        return module.selective_scan_backward(*args, discretization=discretization)

    args = (u, u, A, B, B, h0, reset)
    starts = jax.eval_shape(forward, *args)[2]
    first = compile_for(chip, forward, *args)
    second = compile_for(chip, backward, u, u, A, B, B, starts, u, h0, reset)
    size = T * batch * D * jnp.dtype(dtype).itemsize
    return first.peak_bytes / size, second.peak_bytes / size


@pytest.mark.parametrize(("chip", "budget"), [("v5e", (7.2, 9.5)), ("h100", (4.2, 7.5))])
def test_compiles_with_little_memory(chip, budget):
    peaks = compile_both(chip, 2048, 4, 1024, 16, discretization="mamba")
    assert peaks[0] <= budget[0]
    assert peaks[1] <= budget[1]


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_compiles_odd_shapes_and_x64(chip):
    compile_both(chip, 101, 2, 300, 5, discretization="zoh", dtype=jnp.bfloat16, resets=True)
    with jax.enable_x64(True):
        compile_both(chip, 40, 1, 1152, 4, discretization="bilinear", resets=True)


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v4", "v5p", "v6e", "h100", "a100"])
@pytest.mark.parametrize(
    ("discretization", "N", "dtype", "resets"),
    [
        ("mamba", 32, jnp.float32, False),
        ("zoh", 32, jnp.float32, False),
        ("bilinear", 32, jnp.float32, False),
        ("dirac", 32, jnp.float32, False),
        ("zoh", 12, jnp.bfloat16, True),
    ],
)
def test_compiles_everywhere(chip, discretization, N, dtype, resets):
    compile_both(chip, 500, 2, 1536, N, discretization=discretization, dtype=dtype, resets=resets)


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_vmap_compiles(chip):
    module = gpu if chip == "h100" else tpu
    u, B = jax.ShapeDtypeStruct((3, 64, 2, 1024), jnp.float32), jax.ShapeDtypeStruct((3, 64, 2, 4), jnp.float32)
    A, h0 = jax.ShapeDtypeStruct((1024, 4), jnp.float32), jax.ShapeDtypeStruct((3, 2, 1024, 4), jnp.float32)
    f = jax.vmap(module.selective_scan_forward, in_axes=(0, 0, None, 0, 0, 0))
    compile_for(chip, f, u, u, A, B, B, h0)
