import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from oracles.ssd import ssd as oracle

from spyx.ops import _ssd_kernels
from spyx.ops.pallas import gpu, tpu
from spyx.ops.ssd import _ssd, ssd, ssd_state_update

KERNELS = {"tpu": (tpu, True), "tpu-threads": (tpu, pltpu.InterpretParams()), "gpu": (gpu, True)}


def case(T=7, batch=2, heads=4, P=3, N=2, groups=2, dtype=np.float32, matrix_d=False):
    rng = np.random.default_rng(0)

    def real(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "x": real(T, batch, heads, P), "dt": real(T, batch, heads), "A": -np.exp(real(heads)),
        "B": real(T, batch, groups, N), "C": real(T, batch, groups, N),
        "D": real(heads, P) if matrix_d else real(heads), "z": real(T, batch, heads, P),
        "dt_bias": real(heads), "h0": real(batch, heads, P, N), "dt_softplus": True,
    }  # fmt: skip


def arrays(c):
    return {k: v for k, v in c.items() if isinstance(v, (np.ndarray, jax.Array))}


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def loss(c, **fixed):
    y, h = ssd(**c, **fixed, return_state=True)
    weigh = lambda v: jnp.sum(v * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape)))  # noqa: E731
    return weigh(y) + weigh(h)


@settings(max_examples=3, deadline=None)
@given(
    T=st.sampled_from([1, 8, 19]),
    groups=st.sampled_from([1, 2, 4]),
    matrix_d=st.booleans(),
    reverse=st.booleans(),
    resets=st.sampled_from([None, "T", "TB"]),
    lengths=st.booleans(),
    dt_limit=st.sampled_from([(0.0, np.inf), (0.1, 1.0)]),
)
def test_values_and_gradients(T, groups, matrix_d, reverse, resets, lengths, dt_limit):
    c = case(T, groups=groups, matrix_d=matrix_d)
    fixed = {"reverse": reverse, "dt_limit": dt_limit}
    rng = np.random.default_rng(1)
    if resets:
        fixed["reset"] = rng.random((T,) if resets == "T" else (T, 2)) < 0.3
    if lengths:
        fixed["lengths"] = np.array([T, T // 2])
    y, h = oracle(**c, **fixed)
    errors = {}
    for method in ("sequential", "chunked"):
        y32, h32 = ssd(**c, **fixed, chunk=8, method=method, return_state=True)
        errors[method] = max(relative(y32, y), relative(h32, h))
    assert errors["sequential"] < 1e-5
    assert errors["chunked"] <= max(1e-6, 2 * errors["sequential"])
    with jax.enable_x64(True):
        exact = {k: v.astype(np.float64) for k, v in arrays(c).items()}
        wanted = jax.jit(jax.grad(lambda w: loss({**c, **w}, **fixed, method="sequential")))(exact)
    got = jax.jit(jax.grad(lambda w: loss({**c, **w}, **fixed, chunk=8)))(arrays(c))
    for name, g in got.items():
        assert relative(g, np.asarray(wanted[name])) < 1e-5, name


@pytest.fixture
def interpreted(monkeypatch):
    """Makes method="pallas" run the kernels of one platform under an interpreter, on the CPU."""

    def install(platform):
        kernels, interpret = KERNELS[platform]
        names = ("ssd_forward", "ssd_backward")
        run = types.SimpleNamespace(**{name: partial(getattr(kernels, name), interpret=interpret) for name in names})

        def forward(values, reset, *, o):
            assert _ssd_kernels.fits(kernels, o, values)
            return _ssd_kernels.forward(run, o, values, reset)

        def backward(values, reset, cotangents, *, o):
            return _ssd_kernels.backward(run, o, values, reset, cotangents)

        monkeypatch.setattr(_ssd_kernels, "_forward_by_platform", forward)
        monkeypatch.setattr(_ssd_kernels, "_backward_by_platform", backward)
        _ssd.clear_cache()

    yield install
    _ssd.clear_cache()


def check_the_kernels(interpreted, platform, T, groups, fixed):
    interpreted(platform)
    c = case(T, groups=groups)
    y, h = oracle(**c, **fixed)
    c = c | fixed | {"precision": "highest"}
    y32, h32 = ssd(**c, method="pallas", return_state=True)
    assert relative(y32, y) < 2e-6
    assert relative(h32, h) < 2e-6
    floats = {k: v for k, v in arrays(c).items() if v.dtype == np.float32}
    got = jax.jit(jax.grad(lambda w: loss({**c, **w}, method="pallas")))(floats)
    with jax.enable_x64(True):
        exact = {k: v.astype(np.float64) for k, v in floats.items()}
        wanted = jax.jit(jax.grad(lambda w: loss({**c, **w}, method="sequential")))(exact)
    for name, g in got.items():
        assert relative(g, np.asarray(wanted[name])) < 1e-5, name


def masks(T, *, reverse):
    reset = np.random.default_rng(T).random((T, 2)) < 0.1
    return {"reverse": reverse, "reset": reset, "lengths": np.array([T, T // 2 + 1])}


@pytest.mark.parametrize(
    ("platform", "T", "groups", "reverse"),
    [("tpu", 37, 2, False), ("tpu-threads", 131, 4, True), ("gpu", 37, 4, True), ("gpu", 67, 2, False)],
)
def test_the_kernels_give_values_and_gradients(interpreted, platform, T, groups, reverse):
    """Bias, softplus, gate, feedthrough, states, lengths and resets around the kernels."""
    check_the_kernels(interpreted, platform, T, groups, masks(T, reverse=reverse))


@pytest.mark.full
@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize(
    ("T", "groups", "masked", "reverse"), [(1, 2, False, False), (31, 1, True, True), (131, 4, True, False)]
)
def test_the_kernels_give_values_and_gradients_wide(interpreted, platform, T, groups, masked, reverse):
    check_the_kernels(interpreted, platform, T, groups, masks(T, reverse=reverse) if masked else {"reverse": reverse})


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_bfloat16_is_rounded_once(interpreted, platform):
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in arrays(case(19)).items()}
    y, h = oracle(**half)
    interpreted(platform)
    for method in ("pallas", "chunked"):
        y16, h32 = ssd(**half, precision="highest", method=method, return_state=True)
        assert (y16.dtype, h32.dtype) == (jnp.bfloat16, jnp.float32)
        half_ulp = 2.0 ** (np.floor(np.log2(np.abs(y))) - 8)
        assert np.all(np.abs(np.asarray(y16, np.float64) - y) <= half_ulp + 1e-6 * np.abs(y).max())
        assert relative(h32, h) < 2e-6


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_gradients_against_finite_differences(method):
    with jax.enable_x64(True):
        c = case(5, dtype=np.float64)
        gradient = jax.grad(lambda w: loss({**c, **w}, method=method, chunk=2))(arrays(c))
        rng = np.random.default_rng(3)
        for name, g in gradient.items():
            v = rng.normal(size=g.shape)
            high, low = (float(loss({**c, name: c[name] + s * 1e-6 * v}, method=method, chunk=2)) for s in (1, -1))
            np.testing.assert_allclose(np.sum(g * v), (high - low) / 2e-6, rtol=1e-6, atol=1e-7, err_msg=name)


def test_step_agrees_with_scan():
    c = case(5)
    y, h = ssd(**c, return_state=True)
    state, weights = c.pop("h0"), {k: c.pop(k) for k in ("A", "D", "dt_bias", "dt_softplus")}
    for t in range(5):
        y_t, state = ssd_state_update(state, **{k: v[t] for k, v in c.items()}, **weights)
        np.testing.assert_allclose(y_t, y[t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 2, 2, 2, 1), (5, 0, 2, 2, 2, 1), (1, 1, 1, 1, 1, 1), (67, 1, 2, 1, 2, 2)])
def test_edge_shapes(shape):
    c = case(*shape)
    y, h = ssd(**c, chunk=16, return_state=True)
    wanted_y, wanted_h = oracle(**c)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(h, wanted_h, rtol=1e-5, atol=2e-5)


def test_extreme_steps_are_accurate():
    c = case(18)
    c |= {"dt": np.geomspace(1e2, 1e-8, 18 * 8, dtype=np.float32).reshape(18, 2, 4), "dt_softplus": False}
    c["A"][0], c["x"][3] = 0, 0
    del c["dt_bias"]
    y, h = ssd(**c, return_state=True)
    wanted_y, wanted_h = oracle(**c)
    assert relative(y, wanted_y) < 1e-6
    assert relative(h, wanted_h) < 1e-6
    gradient = jax.grad(lambda w: loss({**c, **w}))(arrays(c))
    assert all(bool(jnp.isfinite(g).all()) for g in gradient.values())


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_padding_and_in_its_row(reverse):
    clean, dirty = case(9), case(9)
    fixed = {"lengths": np.array([9, 4]), "reverse": reverse, "chunk": 4}
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name][4:, 1] = np.nan
    np.testing.assert_array_equal(ssd(**dirty, **fixed), ssd(**clean, **fixed))
    gradients = [jax.grad(lambda w, c=c: loss({**c, **w}, **fixed))(arrays(c)) for c in (clean, dirty)]
    for name in gradients[0]:
        np.testing.assert_array_equal(*(g[name] for g in gradients), err_msg=name)
    dirty = case(9)
    dirty["x"][2, 1] = np.nan
    assert bool(jnp.isfinite(ssd(**dirty, reverse=reverse)[:, 0]).all())


def test_dtypes():
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in arrays(case(5)).items()}
    y, h = ssd(**half, return_state=True)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        c = case(5, dtype=np.float64)
        y, h = ssd(**c, return_state=True)
        assert (y.dtype, h.dtype) == (jnp.float64, jnp.float64)
        assert relative(y, oracle(**c)[0]) < 1e-14


def test_memory_does_not_grow_with_steps_times_states():
    c = arrays(case(2048, batch=1, heads=2, P=32, N=32, groups=1))
    program = jax.jit(jax.value_and_grad(lambda c: ssd(**c, dt_softplus=True).sum()))
    temp = program.lower(c).compile().memory_analysis().temp_size_in_bytes
    assert temp < 2048 * 2 * 32 * 32 * 4 / 4


def test_transformations():
    c = case(5)
    x = jnp.stack([c["x"], 2 * c["x"]])
    f = lambda x: ssd(**{**c, "x": x}, chunk=2)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(x)[1], f(x[1]), rtol=1e-5, atol=1e-5)
    plain = lambda x: ssd(**{**c, "x": x}, chunk=2, method="chunked")  # noqa: E731
    _, tangent = jax.jvp(plain, (x[0],), (x[0],))
    np.testing.assert_allclose(tangent, f(2 * x[0]) - f(x[0]), rtol=1e-4, atol=1e-4)
    with jax.enable_x64(True):
        c = case(5, dtype=np.float64)
        A = c["A"]
        gradient = jax.grad(lambda A: loss({**c, "A": A}, chunk=2) ** 2)
        reverse = jax.grad(lambda A: gradient(A).sum())(A)
        np.testing.assert_allclose(jax.jvp(gradient, (A,), (np.ones_like(A),))[1], reverse, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((7, 2, 4))}, ValueError, "x must have shape"),
        ({"x": np.zeros((7, 2, 4, 3), np.complex64)}, TypeError, "x must be real"),
        ({"dt": np.zeros((7, 2, 3))}, ValueError, "dt must have shape"),
        ({"A": np.zeros(3)}, ValueError, "A must have shape"),
        ({"B": np.zeros((7, 2, 3, 2))}, ValueError, "G a divisor of 4"),
        ({"C": np.zeros((7, 2, 1, 2))}, ValueError, "C must have shape"),
        ({"D": np.zeros((4, 2))}, ValueError, "D must have shape"),
        ({"h0": np.zeros((2, 4, 3))}, ValueError, "h0 must have shape"),
        ({"reset": np.zeros(7)}, TypeError, "reset must be bool"),
        ({"lengths": np.zeros(2)}, TypeError, "lengths must be integers"),
        ({"dt_limit": (1.0, 0.0)}, ValueError, "dt_limit must be"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"method": "fast"}, ValueError, "method must be one of"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ssd(**(case() | change))


def test_step_errors():
    c = {k: v[0] if k in ("x", "dt", "B", "C", "z") else v for k, v in case().items()}
    state = c.pop("h0")
    with pytest.raises(ValueError, match="state must have shape"):
        ssd_state_update(state[:1], **c)
