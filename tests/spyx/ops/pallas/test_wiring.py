"""The public functions reach the kernels: one export for all platforms, and compilation for absent chips."""

import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for
from jax import export

from spyx.ops import (
    _selective_kernels,
    _selective_runs,
    _ssd_kernels,
    causal_conv1d,
    diagonal_ssm,
    fft_conv,
    linear_scan,
    selective_scan,
    ssd,
)
from spyx.ops._selective_step import Masks, Options, Steps, Weights
from spyx.ops._ssd_runs import Options as DualOptions
from spyx.ops._ssd_runs import Values
from spyx.ops.pallas import gpu, tpu

PLATFORMS = ("cpu", "cuda", "tpu")
TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def squares(function):
    return lambda *args: jnp.sum(jnp.abs(function(*args)) ** 2)


def real_scan(a, x):
    return linear_scan(a, x)[0]


def masked_complex_scan(a, x):
    reset = jnp.zeros((x.shape[0], x.shape[1]), bool).at[20].set(True)
    return linear_scan(a, x, reset=reset, lengths=jnp.array([3, 37]), reverse=True)[0]


def layer(u, lam, B, C, D):
    return diagonal_ssm(u, lam, B, C, D, precision="highest")


def selective(u, dt, A, B, C, D, z):
    return selective_scan(u, dt, A, B, C, D, z, dt_softplus=True)


def dual(x, dt, A, B, C, D, z, h0):
    reset = jnp.zeros(x.shape[:2], bool).at[20, 1].set(True)
    return ssd(x, dt, A, B, C, D, z, dt_softplus=True, h0=h0, reset=reset, lengths=jnp.array([3, 37]))


T, BATCH, WIDTH, N = 37, 2, 512, 8
CASES = {
    "linear_scan": (real_scan, (jax.nn.sigmoid(noise(T, BATCH, 5)), noise(T, BATCH, 5))),
    "linear_scan complex": (
        masked_complex_scan,
        (jnp.exp(-jnp.arange(1.0, 6) + 1j), noise(T, BATCH, 5) + 1j),
    ),
    "diagonal_ssm": (
        layer,
        (noise(T, BATCH, 3), jnp.exp(-jnp.arange(1.0, 6) + 1j), noise(5, 3) + 1j, noise(3, 5) + 1j, noise(3)),
    ),
    "selective_scan": (
        selective,
        (
            noise(T, BATCH, WIDTH),
            noise(T, BATCH, WIDTH, seed=1),
            -jnp.exp(noise(WIDTH, N)),
            noise(T, BATCH, N),
            noise(T, BATCH, N, seed=2),
            noise(WIDTH),
            noise(T, BATCH, WIDTH, seed=3),
        ),
    ),
    "ssd": (
        dual,
        (
            noise(T, BATCH, 4, 16),
            noise(T, BATCH, 4),
            -jnp.arange(1.0, 5),
            noise(T, BATCH, 2, 16),
            noise(T, BATCH, 2, 16, seed=1),
            noise(4),
            noise(T, BATCH, 4, 16, seed=2),
            noise(BATCH, 4, 16, 16),
        ),
    ),
    "causal_conv1d": (causal_conv1d, (noise(T, BATCH, 5), noise(5, 4), noise(5))),
    "fft_conv": (fft_conv, (noise(T, BATCH, 5), noise(T, 5))),
}
WITH_KERNELS = [name for name in CASES if "conv" not in name]


def close(a, b):
    """What is exported is computed by XLA, what is called here by the kernels for CPU, if they are installed."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(b), initial=0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_one_export_serves_all_platforms(name, gradient):
    function, args = CASES[name]
    program = jax.grad(squares(function), tuple(range(len(args)))) if gradient else function
    exported = export.export(jax.jit(program), platforms=PLATFORMS, disabled_checks=[TRITON])(*args)
    again = export.deserialize(exported.serialize())
    assert again.platforms == PLATFORMS
    jax.tree.map(close, again.call(*args), program(*args))
    text = exported.mlir_module()
    assert ("tpu_custom_call" in text) == (name in WITH_KERNELS)
    assert ("__gpu$xla.gpu.triton" in text) == (name in WITH_KERNELS)


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_gradients_compile_for_absent_chips(name, chip):
    function, args = CASES[name]
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args)
    compiled = compile_for(chip, jax.grad(squares(function), tuple(range(len(args)))), *shapes)
    assert compiled.peak_bytes > 0


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_float32_dot_of_the_layer_is_left_to_the_default_precision(platform):
    function, args = CASES["diagonal_ssm"]
    program = jax.grad(squares(function), tuple(range(len(args))))
    text = jax.jit(program).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    dots = re.findall(r"stablehlo\.dot_general\b.*", text)
    assert dots
    assert all("[HIGHEST, HIGHEST]" in line for line in dots if "f32" in line)


def test_pallas_is_an_error_where_there_is_no_kernel():
    _, (a, x) = CASES["linear_scan"]
    with pytest.raises(ValueError, match="none for CPU"):
        linear_scan(a, x, method="pallas")
    with pytest.raises(ValueError, match="none for CPU"):
        selective_scan(*CASES["selective_scan"][1], method="pallas")
    with pytest.raises(ValueError, match="none for CPU"):
        ssd(*CASES["ssd"][1][:5], method="pallas")
    with jax.enable_x64(True):
        wide = jax.jit(lambda a, x: linear_scan(a, x, method="pallas")[0]).trace(
            jnp.ones((3, 2), jnp.float64), jnp.ones((3, 2), jnp.float64)
        )
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            wide.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_pallas_lowers_to_the_kernel(platform):
    _, (a, x) = CASES["linear_scan"]
    scan = jax.jit(lambda a, x: linear_scan(a, x, method="pallas")[0])
    text = scan.trace(a, x).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in text or "triton" in text


def lower_dual(platform, method, *, P=16, N=16, dtype=jnp.float32, **options):
    def f(x, dt, A, B):
        return ssd(x, dt, A, B, B, method=method, **options)

    shape = jax.ShapeDtypeStruct
    x, dt, A = shape((9, 2, 4, P), dtype), shape((9, 2, 4), dtype), shape((4,), dtype)
    lowered = jax.jit(f).trace(x, dt, A, shape((9, 2, 2, N), dtype)).lower(lowering_platforms=(platform,))
    return any(kernel in lowered.as_text() for kernel in ("tpu_custom_call", "triton"))


@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("cuda", {"P": 65}),
        ("cuda", {"N": 129}),
        ("tpu", {"P": 257}),
        ("tpu", {"N": 257}),
        ("tpu", {"dtype": jnp.float16}),
        ("cuda", {"precision": "F32_F32_F32"}),
    ],
)
def test_what_the_dual_kernels_do_not_take(platform, options):
    assert lower_dual(platform, "pallas")
    assert not lower_dual(platform, "auto", **options)
    with pytest.raises(ValueError, match=r'method="pallas": the (gpu|tpu) kernels take float32 or bfloat16'):
        lower_dual(platform, "pallas", **options)


def test_the_dual_kernels_keep_the_precision_asked_for(monkeypatch):
    asked = []

    def forward(*args, precision, **_):
        asked.append(precision)

    kernels = types.SimpleNamespace(ssd_forward=forward)
    values = Values(*(jnp.ones(1),) * 6)
    given = [None, "bfloat16", "high", jax.lax.Precision.HIGHEST, ("default", "highest")]
    for precision in given:
        _ssd_kernels.forward(kernels, DualOptions(64, False, precision, jnp.float32, "auto"), values, None)
    low, high = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
    assert asked == [low, low, high, high, high]


def test_the_dual_kernels_get_the_ambient_precision_of_the_call(monkeypatch):
    asked, forward = [], tpu.ssd_forward

    def spy(*args, precision, **options):
        asked.append(precision)
        return forward(*args, precision=precision, **options)

    monkeypatch.setattr(tpu, "ssd_forward", spy)
    function, args = CASES["ssd"]
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(lambda *args: function(*args)).trace(*args)
    traced.lower(lowering_platforms=("tpu",))
    assert asked == [jax.lax.Precision.HIGHEST]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_dual_kernels_under_vmap(platform):
    function, args = CASES["ssd"]
    many = jax.vmap(jax.grad(squares(function)), in_axes=(0, *(None,) * 7))
    text = jax.jit(many).trace(jnp.stack([args[0]] * 2), *args[1:]).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in text or "triton" in text


@pytest.mark.parametrize("kernels", [tpu, gpu], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    ("discretization", "reverse", "gated", "segment"),
    [("mamba", False, True, 16), ("mamba", True, False, 32), ("zoh", False, False, 32), ("zoh", True, True, 16)],
)
def test_the_selective_kernels_stand_in_for_the_plain_form(
    kernels, reverse, discretization, gated, segment, monkeypatch
):
    """Bias, softplus, gate, feedthrough, lengths and resets around the kernels, values and cotangents; steps that are
    no whole blocks, and states saved further apart than the kernels' own chunks."""
    T, chunk, block = 27, 16, 32
    monkeypatch.setattr(_selective_kernels, "_CHUNK_STATES", 8 * N)
    names = ("selective_scan_forward", "selective_scan_backward")
    run = types.SimpleNamespace(**{name: partial(getattr(kernels, name), interpret=True) for name in names})
    run.selective_scan_fits = kernels.selective_scan_fits
    options = Options(discretization, True, False, reverse, "auto", chunk, block, segment)
    flat = (noise(T, BATCH * WIDTH, seed=i) for i in range(3))
    vectors = (noise(T, BATCH * N, seed=i) for i in (3, 4))
    u, dt, z = flat
    steps = Steps(u, dt, None, *vectors, z if gated else None)
    weights = Weights(-jnp.exp(noise(N, WIDTH)), noise(WIDTH), noise(WIDTH, seed=7))
    masks = Masks(jnp.arange(T)[:, None] < jnp.array([T, 11]), jnp.zeros((T, BATCH), bool).at[5, 1].set(True))
    h0 = noise(BATCH, N, WIDTH, seed=8)
    assert _selective_kernels.fits(kernels, options, steps, weights, h0)
    expected = _selective_runs.forward_blocked(options, steps, weights, masks, h0)
    got = _selective_kernels.forward(run, options, steps, weights, masks, h0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max())), got, expected)
    cotangents = noise(*expected[0].shape, seed=9), noise(*h0.shape, seed=10)
    expected = _selective_runs.backward_blocked(options, steps, weights, masks, expected[2], *cotangents)
    got = _selective_kernels.backward(run, options, steps, weights, masks, got[2], *cotangents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max())), got, expected)


def test_what_the_selective_kernels_do_not_take():
    steps = Steps(*(noise(8, WIDTH) for _ in range(2)), None, noise(8, N), noise(8, N), None)
    weights, h0 = Weights(-jnp.ones((N, WIDTH)), None, None), jnp.zeros((1, N, WIDTH))
    options = Options("mamba", False, False, False, "auto", 8, 8, 8)

    def fits(kernels=tpu, o=options, s=steps, w=weights, h=h0):
        return _selective_kernels.fits(kernels, o, s, w, h)

    assert fits()
    assert not fits(w=weights._replace(A=weights.A + 0j))
    assert not fits(s=steps._replace(dt_a=steps.dt))
    assert not fits(o=options._replace(chunk=7))
    assert not fits(w=weights._replace(A=weights.A[None]))
    narrow = steps._replace(u=steps.u[:, :64], dt=steps.dt[:, :64])
    assert not fits(s=narrow, w=weights._replace(A=weights.A[:, :64]), h=h0[..., :64])
    assert fits(gpu, s=narrow, w=weights._replace(A=weights.A[:, :64]), h=h0[..., :64])
