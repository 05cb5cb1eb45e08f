from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for
from jax.experimental.pallas import tpu as pltpu

from spyx.ops.pallas import gpu, tpu
from spyx.ops.pallas.linear import Flags

KERNELS = {
    "tpu": (tpu.linear_scan_forward, True),
    "tpu-threads": (tpu.linear_scan_forward, pltpu.InterpretParams()),
    "gpu": (gpu.linear_scan_forward, True),
}
FLAGS = {
    "forward": Flags(),
    "reverse": Flags(reverse=True),
    "adjoint": Flags().adjoint(),
    "clears": Flags(reverse=True, clears=True),
    "clears-adjoint": Flags(clears=True).adjoint(),
}


def oracle(a, x, h0, flags: Flags):
    a = np.broadcast_to(a.conj() if flags.conj else a, x.shape)
    outputs, carry, h = np.zeros_like(x), h0, h0

    def decay(t, h):
        return np.where(a[t] == 0, 0, a[t] * h) if flags.clears else a[t] * h

    for t in reversed(range(len(x))) if flags.reverse else range(len(x)):
        h = carry + x[t] if flags.lagged else decay(t, carry) + x[t]
        carry = decay(t, h) if flags.lagged else h
        outputs[t] = h
    return outputs, h


def random_arguments(shape, *, is_complex, varying, dtype="float32"):
    rng = np.random.default_rng(0)

    def draw(*shape):
        parts = rng.normal(size=(2 if is_complex else 1, *shape))
        return [part.astype(jnp.dtype(dtype)).astype(np.float64) for part in parts]

    def join(parts):
        return parts[0] + 1j * parts[1] if is_complex else parts[0]

    x, h0, a = draw(*shape), draw(*shape[1:]), draw(*(shape if varying else shape[1:]))
    a = [(0.6 * np.tanh(part)).astype(jnp.dtype(dtype)).astype(np.float64) for part in a]
    if varying:
        for part in a:
            part[shape[0] // 2] = 0
    arguments = [tuple(jnp.asarray(part, dtype) for part in parts) for parts in (a, x, h0)]
    return arguments, [join(parts) for parts in (a, x, h0)]


def join(parts):
    parts = [np.asarray(part, np.float64) for part in parts]
    return parts[0] + 1j * parts[1] if len(parts) == 2 else parts[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("shape", "is_complex", "varying", "flags"),
    [
        ((17, 3, 5), True, True, "forward"),
        ((1, 4), False, False, "reverse"),
        ((9, 9, 130), True, False, "adjoint"),
        ((261, 2), False, True, "clears"),
        ((16, 12, 520), False, True, "clears-adjoint"),
        ((7, 1, 1), True, True, "clears-adjoint"),
        ((11,), False, False, "forward"),
    ],
)
def test_equals_a_loop_in_float64(kernel, shape, is_complex, varying, flags):
    run, interpret = KERNELS[kernel]
    arguments, wide = random_arguments(shape, is_complex=is_complex, varying=varying)
    h, h_last = run(*arguments, FLAGS[flags], interpret=interpret)
    expected, expected_last = oracle(*wide, FLAGS[flags])
    assert h[0].dtype == h_last[0].dtype == jnp.float32
    np.testing.assert_allclose(join(h), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(join(h_last), expected_last, rtol=0, atol=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("shape", "is_complex", "varying"),
    [
        ((17, 3, 5), True, True),
        ((40, 17, 136), False, True),
        ((40, 17, 136), False, False),
        ((300, 4, 3), True, False),
    ],
)
def test_equals_a_loop_in_float64_wide(kernel, shape, is_complex, varying, flags):
    test_equals_a_loop_in_float64(kernel, shape, is_complex, varying, flags)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_keeps_a_float32_state(kernel):
    run, interpret = KERNELS[kernel]
    arguments, wide = random_arguments((65, 2, 6), is_complex=True, varying=True, dtype="bfloat16")
    h, h_last = run(*arguments, Flags(), interpret=interpret)
    expected, expected_last = oracle(*wide, Flags())
    assert h[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(join(h_last), expected_last, atol=2e-6)
    np.testing.assert_allclose(join(h), expected, atol=2**-8 * abs(expected).max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flags", [Flags(clears=True), Flags(clears=True).adjoint()])
def test_clearing_lets_no_nan_through(kernel, flags):
    run, interpret = KERNELS[kernel]
    a, x = jnp.full((6, 2), 0.5).at[3, 0].set(0), jnp.ones((6, 2))
    x = x.at[5 if flags.reverse else 0].set(jnp.nan)
    (h,), (h_last,) = run((a,), (x,), (jnp.zeros(2),), flags, interpret=interpret)
    cleared = h[:3, 0] if flags.reverse else h[3:, 0]
    assert np.isfinite(cleared).all()
    assert np.isnan(h[:, 1]).all()
    assert np.isnan(h_last).tolist() == [False, True]


@pytest.mark.parametrize("run", [tpu.linear_scan_forward, gpu.linear_scan_forward])
def test_refuses_what_does_not_fit(run):
    x, h0 = jnp.ones((4, 3)), jnp.ones(3)
    with pytest.raises(ValueError, match=r"each part of a must have shape .* got \(2,\)"):
        run((jnp.ones(2),), (x,), (h0,))
    with pytest.raises(ValueError, match="1 or 2 parts, got 2, 1, 1"):
        run((h0, h0), (x,), (h0,))
    with pytest.raises(ValueError, match="not be empty"):
        run((h0,), (x[:0],), (h0,))
    with pytest.raises(TypeError, match="float32 or bfloat16, got float16"):
        run((h0.astype(jnp.float16),), (x,), (h0,))
    assert not tpu.linear_scan_fits((h0,), (x[:0],), (h0,))
    assert gpu.linear_scan_fits((h0,), (x,), (h0,))


def compile_both(chip, shape, *, is_complex, varying, dtype=jnp.float32):
    """Compile the scan and its adjoint; peak memory is at most that of arguments and results, padded."""
    run = gpu.linear_scan_forward if chip.endswith("100") else tpu.linear_scan_forward
    parts = 2 if is_complex else 1
    x = (jax.ShapeDtypeStruct(shape, dtype),) * parts
    a = x if varying else (jax.ShapeDtypeStruct(shape[1:], jnp.float32),) * parts
    h0 = (jax.ShapeDtypeStruct(shape[1:], jnp.float32),) * parts
    for flags in (Flags(clears=varying), Flags(clears=varying).adjoint()):
        compiled = compile_for(chip, lambda a, x, h0, flags=flags: run(a, x, h0, flags), a, x, h0)
        size = np.prod(shape) * jnp.dtype(dtype).itemsize * parts
        assert compiled.peak_bytes <= (3 if varying else 2) * size * 1.02 + 2**20


@pytest.mark.parametrize("chip", ["v5e", "h100"])
@pytest.mark.parametrize(("is_complex", "varying"), [(True, True), (False, False)])
def test_compiles(chip, is_complex, varying):
    compile_both(chip, (1024, 8, 512), is_complex=is_complex, varying=varying)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_compiles_bfloat16_and_x64(chip):
    compile_both(chip, (512, 16, 256), is_complex=True, varying=False, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        run = gpu.linear_scan_forward if chip == "h100" else tpu.linear_scan_forward
        x, h0 = jax.ShapeDtypeStruct((77, 5, 200), jnp.float32), jax.ShapeDtypeStruct((5, 200), jnp.float32)
        compile_for(chip, lambda a, x, h0: run(a, x, h0, Flags(reverse=True)), (h0,), (x,), (h0,))


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v4", "v5p", "v6e", "a100"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("is_complex", "varying"), list(itertools.product((False, True), repeat=2)))
def test_compiles_everywhere(chip, dtype, is_complex, varying):
    compile_both(chip, (1024, 16, 512), is_complex=is_complex, varying=varying, dtype=dtype)
