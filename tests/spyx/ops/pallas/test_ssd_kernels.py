from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles.ssd
import pytest
from aot import compile_for
from jax.experimental.pallas import tpu as pltpu

from spyx.ops.pallas import gpu_ssd, tpu_ssd
from spyx.ops.pallas.ssd import cumulated

KERNELS = {"tpu": (tpu_ssd, True), "tpu-threads": (tpu_ssd, pltpu.InterpretParams()), "gpu": (gpu_ssd, True)}
NAMES = ("y", "h_last", "x", "dt", "A", "B", "C", "h0")


def sequential(x, dt, A, B, C, h0, reset, *, reverse):
    heads, groups = x.shape[2], B.shape[2]
    B, C = (jnp.repeat(v, heads // groups, axis=2) for v in (B, C))

    def step(h, inputs):
        x, dt, B, C, reset = inputs
        h = jnp.exp(dt * A)[..., None, None] * jnp.where(reset[:, None, None, None], 0, h)
        h = h + (dt[..., None] * x)[..., None] * B[:, :, None]
        return h, jnp.einsum("bhpn,bhn->bhp", h, C)

    h_last, y = jax.lax.scan(step, h0, (x, dt, B, C, reset), reverse=reverse)
    return y, h_last


def random_arguments(T, batch, heads, P, groups, N, *, resets, dtype="float32"):
    rng = np.random.default_rng(T)

    def draw(*shape):
        return rng.normal(size=shape).astype("float32")

    x, dy = draw(T, batch, heads, P), draw(T, batch, heads, P)
    B, C = draw(T, batch, groups, N), draw(T, batch, groups, N)
    dt, A = np.exp(draw(T, batch, heads) - 2), -np.exp(draw(heads))
    values = (x, dt, A, B, C, draw(batch, heads, P, N))
    reset = rng.random((T, batch)) < (0.1 if resets else 0)
    return [jnp.asarray(v, dtype) for v in values], reset, jnp.asarray(dy, dtype), draw(batch, heads, P, N)


def both_passes(kernel, arguments, reset, dy, dh_last, **kwargs):
    module, interpret = KERNELS[kernel]
    flags = jnp.asarray(reset) if reset.any() else None

    @jax.jit
    def run(arguments, dy, dh_last):
        outputs = module.ssd_forward(*arguments, flags, interpret=interpret, **kwargs)
        return *outputs, *module.ssd_backward(*arguments, dy, dh_last, flags, interpret=interpret, **kwargs)

    return run(arguments, dy, jnp.asarray(dh_last))


def expected_passes(arguments, reset, dy, dh_last, *, reverse=False):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(v, "float64")) for v in arguments]
        _, pull = jax.vjp(lambda *args: sequential(*args, reset, reverse=reverse), *wide)
        cotangents = pull((jnp.asarray(np.asarray(dy, "float64")), jnp.asarray(np.asarray(dh_last, "float64"))))
        loop = oracles.ssd.ssd(*wide[:5], h0=wide[5], reset=reset, reverse=reverse)
        return [*loop, *(np.asarray(v) for v in cotangents)]


def bounds(expected, relative=1e-6):
    """Error allowed in each result; in dA that of the sum over all steps too, which cancel each other."""
    allowed = dict(zip(NAMES, (relative * max(1, abs(v).max()) for v in expected), strict=True))
    return allowed | {"A": 1e-5 * abs(expected[4]).max()}


def assert_equal(got, expected, allowed):
    for name, ours, theirs in zip(NAMES, got, expected, strict=True):
        bound = allowed[name]
        np.testing.assert_allclose(np.asarray(ours, "float64"), theirs, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize(
    ("kernel", "shape", "reverse", "resets"),
    [
        ("tpu", (130, 1, 3, 16, 1, 16), False, True),
        ("tpu", (140, 2, 4, 64, 2, 64), True, False),
        ("tpu-threads", (7, 2, 5, 20, 1, 24), True, True),
        ("tpu-threads", (130, 1, 3, 64, 1, 16), False, True),
        ("gpu", (70, 1, 3, 16, 1, 16), False, True),
        ("gpu", (140, 2, 4, 64, 2, 64), True, False),
        ("gpu", (7, 2, 5, 20, 1, 24), True, True),
    ],
)
def test_values_and_gradients_equal_float64(kernel, shape, reverse, resets):
    arguments, reset, dy, dh_last = random_arguments(*shape, resets=resets)
    got = both_passes(kernel, arguments, reset, dy, dh_last, reverse=reverse)
    expected = expected_passes(arguments, reset, dy, dh_last, reverse=reverse)
    assert_equal(got, expected, bounds(expected))


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("reverse", "resets"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [(300, 2, 6, 64, 2, 128), (129, 1, 2, 16, 2, 64), (33, 3, 9, 48, 3, 100)])
def test_values_and_gradients_equal_float64_wide(kernel, shape, reverse, resets):
    test_values_and_gradients_equal_float64(kernel, shape, reverse, resets)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_bfloat16(kernel):
    arguments, reset, dy, dh_last = random_arguments(20, 2, 3, 16, 1, 16, resets=False, dtype="bfloat16")
    got = both_passes(kernel, arguments, reset, dy, dh_last)
    expected = expected_passes(arguments, reset, dy, dh_last)
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    allowed = bounds(expected)
    for name, theirs in (("y", expected[0]), ("x", expected[2])):
        allowed[name] = 2**-8 * abs(theirs).max()
    assert_equal(got, expected, allowed)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_padded_steps_keep_the_state(kernel):
    (x, dt, A, B, C, h0), reset, dy, dh_last = random_arguments(20, 1, 2, 16, 1, 16, resets=False)
    short = [x[:13], dt[:13], A, B[:13], C[:13], h0]
    padded = [x.at[13:].set(0), dt.at[13:].set(0), A, B, C, h0]
    ours = both_passes(kernel, padded, reset, dy.at[13:].set(0), dh_last)
    theirs = both_passes(kernel, short, reset[:13], dy[:13], dh_last)
    for name, left, right in zip(NAMES, ours, theirs, strict=True):
        left = left[:13] if left.shape[0] == 20 else left
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * max(1, abs(right).max()), err_msg=name)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_extreme_decay_and_reset_stay_finite(kernel):
    (x, dt, A, B, C, h0), reset, dy, dh_last = random_arguments(20, 1, 2, 16, 1, 16, resets=False)
    reset[[4, 5, 19], 0] = True
    dt = dt.at[8].set(1e4).at[9].set(0)
    for v in both_passes(kernel, [x, dt, A, B, C, h0], reset, dy, dh_last):
        assert np.isfinite(v).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_decays_late_in_a_chunk_are_as_accurate_as_early(reverse):
    rng = np.random.default_rng(0)
    dt = rng.uniform(0.5, 3, (64, 1, 1)).astype("float32")
    place, _ = cumulated(jnp.asarray(dt), -jnp.ones(1), None, chunk=64, reverse=reverse)
    high, low = (np.asarray(v).ravel() for v in (place.high, place.low))
    late = (0, 1) if reverse else (63, 62)
    got = (high[late[0]] - high[late[1]]) + (low[late[0]] - low[late[1]])
    np.testing.assert_allclose(got, -dt.ravel()[late[0]], rtol=2e-7)


@pytest.mark.parametrize("module", [tpu_ssd, gpu_ssd])
def test_refuses_what_does_not_fit(module):
    (x, dt, A, B, C, h0), *_ = random_arguments(4, 2, 3, 16, 1, 16, resets=False)
    with pytest.raises(ValueError, match=r"C must have shape \(4, 2, 1, 16\), got \(3, 2, 1, 16\)"):
        module.ssd_forward(x, dt, A, B, C[1:], h0)
    with pytest.raises(ValueError, match="groups of B must divide 3 heads, got 2"):
        module.ssd_forward(x, dt, A, jnp.ones((4, 2, 2, 16)), C, h0)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        module.ssd_forward(x.astype(jnp.float16), dt, A, B, C, h0)
    with pytest.raises(ValueError, match="reset must be bool"):
        module.ssd_forward(x, dt, A, B, C, h0, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="chunk must be a"):
        module.ssd_forward(x, dt, A, B, C, h0, chunk=24)
    assert module.ssd_fits(x, dt, A, B, C, h0)
    assert not module.ssd_fits(x, dt, A, jnp.ones((4, 2, 1, 300)), C, h0)
    assert not module.ssd_fits(x[:0], dt, A, B, C, h0)


def test_the_states_of_a_group_on_tpu_are_at_most_4_mib():
    def fits(heads, P, groups, N):
        shape = jax.ShapeDtypeStruct
        x, dt, A = shape((4, 1, heads, P), "float32"), shape((4, 1, heads), "float32"), shape((heads,), "float32")
        B, h0 = shape((4, 1, groups, N), "float32"), shape((1, heads, P, N), "float32")
        return tpu_ssd.ssd_fits(x, dt, A, B, B, h0)

    assert all(fits(*largest) for largest in LARGEST)
    assert fits(256, 64, 2, 128)
    assert not fits(130, 64, 1, 128)
    assert not fits(17, 256, 1, 256)


LARGEST = [(128, 64, 1, 128), (16, 256, 1, 256)]
"""Heads, P, groups and N of the largest states the TPU kernels take."""


def compile_both(chip, T, batch, heads, P, N, *, groups=1, dtype=jnp.float32, resets=False, reverse=False):
    """Peak bytes of forward and backward, in units of the size of x."""
    module = gpu_ssd if chip.endswith("100") else tpu_ssd
    shape = jax.ShapeDtypeStruct
    x, dt, A = shape((T, batch, heads, P), dtype), shape((T, batch, heads), dtype), shape((heads,), jnp.float32)
    B, h0 = shape((T, batch, groups, N), dtype), shape((batch, heads, P, N), jnp.float32)
    reset = shape((T, batch), jnp.bool_) if resets else None

    def forward(*args):
        return module.ssd_forward(*args, reverse=reverse)

    def backward(*args):
        return module.ssd_backward(*args, reverse=reverse)

    first = compile_for(chip, forward, x, dt, A, B, B, h0, reset)
    second = compile_for(chip, backward, x, dt, A, B, B, h0, x, h0, reset)
    return first.peak_bytes / (x.size * x.dtype.itemsize), second.peak_bytes / (x.size * x.dtype.itemsize)


BUDGETS = {
    "v5e": (5.0, 8.7),
    "v4": (5.0, 8.7),
    "v5p": (5.0, 8.7),
    "v6e": (5.0, 8.7),
    "h100": (6.7, 12.2),
    "a100": (6.7, 12.2),
}
"""Peak memory of forward and backward at (T, B, H, P, N) = (2048, 2, 16, 64, 128), in units of the size of x."""


def assert_little_memory(chip):
    peaks = compile_both(chip, 2048, 2, 16, 64, 128)
    assert peaks[0] <= BUDGETS[chip][0]
    assert peaks[1] <= BUDGETS[chip][1]


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_compiles_with_little_memory(chip):
    assert_little_memory(chip)


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v4", "v5p", "v6e", "a100"])
def test_compiles_with_little_memory_everywhere(chip):
    assert_little_memory(chip)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_compiles_odd_shapes_and_x64(chip):
    with jax.enable_x64(True):
        compile_both(chip, 301, 2, 6, 48, 40, groups=2, dtype=jnp.bfloat16, resets=True, reverse=True)


@pytest.mark.full
@pytest.mark.parametrize("chip", BUDGETS)
@pytest.mark.parametrize(("P", "N", "dtype", "masked"), [(64, 128, jnp.bfloat16, True), (16, 16, jnp.float32, False)])
def test_compiles_everywhere(chip, P, N, dtype, masked):
    compile_both(chip, 500, 2, 8, P, N, groups=2, dtype=dtype, resets=masked, reverse=masked)


@pytest.mark.full
@pytest.mark.parametrize("chip", ["v5e", "v4", "v5p", "v6e"])
@pytest.mark.parametrize(("heads", "P", "groups", "N"), LARGEST)
def test_compiles_the_largest_states(chip, heads, P, groups, N):
    compile_both(chip, 256, 1, heads, P, N, groups=groups)
