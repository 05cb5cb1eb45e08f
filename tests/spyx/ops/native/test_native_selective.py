"""The compiled CPU kernels of the selective scan: "auto" where they fit, against float64."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles.selective import selective_scan as oracle
from threads import check_calls_at_once

from spyx.ops import selective_scan
from spyx.ops.dispatch import native_kernels

DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "dirac")
OPTIONAL = ("D", "z", "dt_bias", "h0")
QUICK = (("mamba", False), ("zoh", True), ("bilinear", False))
"""The kernels (discretization, event) that are compiled in every test run."""
every_kernel = pytest.mark.parametrize(
    ("discretization", "event"),
    [
        pytest.param(d, event, marks=() if (d, event) in QUICK else pytest.mark.full)
        for d in DISCRETIZATIONS
        for event in (False, True)
    ],
)


def case(T, B, D, N, groups=1, seed=0, optional=OPTIONAL):
    rng = np.random.default_rng(seed)

    def real(*shape):
        return rng.normal(size=shape).astype(np.float32)

    c = {"u": real(T, B, D), "dt": real(T, B, D), "A": -np.exp(real(D, N)), "B": real(T, B, groups, N)}
    c |= {"C": real(T, B, groups, N)}
    more = {"D": real(D), "z": real(T, B, D), "dt_bias": real(D), "h0": real(B, D, N)}
    more["dt_A"] = rng.uniform(0.01, 1, (T, B, D)).astype(np.float32)
    return c | {name: more[name] for name in optional}


def evaluation(method, **fixed):
    def loss(c, weights):
        y, h = selective_scan(**c, **fixed, method=method, return_state=True)
        return jnp.vdot(y, weights[0]) + jnp.vdot(h, weights[1]), (y, h)

    return jax.jit(jax.grad(loss, has_aux=True))


def weights(c):
    (T, B, D), N = c["u"].shape, c["A"].shape[1]
    rng = np.random.default_rng(9)
    return rng.normal(size=(T, B, D)).astype(np.float32), rng.normal(size=(B, D, N)).astype(np.float32)


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def in_kernel(c, **fixed):
    text = jax.jit(lambda c: selective_scan(**c, **fixed)).lower(c).as_text()
    return "spyx_native" in text


def check(c, **fixed):
    assert in_kernel(c, **fixed)
    y, h = oracle(**c, **fixed)
    g, (y32, h32) = evaluation("auto", **fixed)(c, weights(c))
    _, (y_plain, h_plain) = evaluation("sequential", **fixed)(c, weights(c))
    plain = max(relative(y_plain, y), relative(h_plain, h))
    assert max(relative(y32, y), relative(h32, h)) <= max(1e-6, 2 * plain)
    exact = {name: v.astype(np.float64) for name, v in c.items()}
    with jax.enable_x64(True):
        wanted = evaluation("sequential", **fixed)(exact, tuple(w.astype(np.float64) for w in weights(c)))[0]
    for name, v in g.items():
        assert relative(v, np.asarray(wanted[name])) < 1e-5, name


def test_kernels_are_there():
    assert native_kernels()


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 1, 1), 1), ((13, 2, 3, 2), 1), ((67, 1, 130, 3), 1), ((40, 3, 66, 16), 3), ((17, 2, 257, 5), 1)],
)
def test_values_and_gradients(shape, groups):
    check(case(*shape, groups), dt_softplus=True)


@every_kernel
def test_discretizations(discretization, event):
    c = case(19, 2, 66, 3, optional=(*OPTIONAL, "dt_A") if event else OPTIONAL)
    fixed = {"lengths": np.array([19, 7]), "reset": np.random.default_rng(1).random((19, 2)) < 0.2}
    check(c, discretization=discretization, dt_softplus=True, **fixed)


@settings(max_examples=4, deadline=None)
@given(
    T=st.sampled_from([5, 23, 64]),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from(QUICK),
    optional=st.sets(st.sampled_from(OPTIONAL)),
    reverse=st.booleans(),
    resets=st.sampled_from([None, "T", "TB"]),
    lengths=st.booleans(),
    softplus=st.booleans(),
)
def test_any_combination(T, groups, kernel, optional, reverse, resets, lengths, softplus):
    discretization, event = kernel
    c = case(T, 2, 8, 3, groups, optional=sorted(optional | {"dt_A"} if event else optional))
    if not softplus:
        c["dt"] = np.abs(c["dt"])
        c.pop("dt_bias", None)
    fixed = {"discretization": discretization, "dt_softplus": softplus, "reverse": reverse}
    if resets:
        fixed["reset"] = np.random.default_rng(1).random((T,) if resets == "T" else (T, 2)) < 0.3
    if lengths:
        fixed["lengths"] = np.array([T // 2, T])
    check(c, **fixed)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination_widely(data):
    draw = data.draw
    T, B, groups = draw(st.integers(1, 140)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    D, N = groups * draw(st.integers(1, 90)), draw(st.integers(1, 20))
    c = case(T, B, D, N, groups, optional=sorted(draw(st.sets(st.sampled_from([*OPTIONAL, "dt_A"])))))
    fixed = {"discretization": draw(st.sampled_from(DISCRETIZATIONS)), "dt_softplus": draw(st.booleans())}
    if not fixed["dt_softplus"]:
        c["dt"] = np.abs(c["dt"])
        c.pop("dt_bias", None)
    fixed["reverse"] = draw(st.booleans())
    if draw(st.booleans()):
        fixed["reset"] = np.random.default_rng(1).random((T, B)) < 0.2
    if draw(st.booleans()):
        fixed["lengths"] = np.array([draw(st.integers(0, T)) for _ in range(B)])
    # errors are relative to the largest number of an array, a sum: one alone may cancel
    steps = int(np.sum(fixed.get("lengths", B * T)))
    assume(min(B * D * N, steps * groups * N) >= 8)
    check(c, **fixed)


@every_kernel
def test_extreme_steps_are_finite_and_right(discretization, event):
    """Each channel on its own, against its own largest number, or 1e-12, below which lie float64's own errors."""
    scales, rates = np.meshgrid([1e-8, 1e-3, 1.0, 1e2], [0.0, -1e-30, -1e-8, -0.3, -1.0, -50.0])
    c = case(21, 2, scales.size, 2, optional=("D", "z", "h0", "dt_A") if event else ("D", "z", "h0"))
    c["A"] = np.repeat(rates.reshape(-1, 1), 2, 1).astype(np.float32)
    for name in ("dt", "dt_A") if event else ("dt",):
        c[name] = np.abs(c[name]) * scales.reshape(-1).astype(np.float32)
    fixed = {"discretization": discretization}
    assert in_kernel(c, **fixed)
    y, h = oracle(**c, **fixed)
    g, (y32, h32) = evaluation("auto", **fixed)(c, weights(c))
    _, (y_plain, h_plain) = evaluation("sequential", **fixed)(c, weights(c))
    exact = {name: v.astype(np.float64) for name, v in c.items()}
    with jax.enable_x64(True):
        wanted = evaluation("sequential", **fixed)(exact, tuple(w.astype(np.float64) for w in weights(c)))[0]

    def by_channel(name, v):
        axis = {"A": 0, "D": 0, "h0": 1}.get(name, 2)
        return np.moveaxis(np.asarray(v), axis, 0).reshape(scales.size, -1)

    for name, *values in (("y", y32, y_plain, y), ("h0", h32, h_plain, h)):
        for got, plain, true in zip(*(by_channel(name, v) for v in values), strict=True):
            assert relative(got, true) <= max(1e-6, 2 * relative(plain, true))
    for name in sorted(g.keys() - {"B", "C"}):
        got, true = by_channel(name, g[name]), by_channel(name, wanted[name])
        errors = np.abs(got - true).max(1) / np.maximum(np.abs(true).max(1), 1e-12)
        assert errors.max() < 1e-5, (name, scales.flat[errors.argmax()], rates.flat[errors.argmax()])


def test_softplus_keeps_small_and_large_steps():
    """The step size itself, through a state that is dt u: over 80 octaves within two units in the last place."""
    x = np.linspace(-60, 40, 4001, dtype=np.float32)
    c = {"u": np.ones_like(x)[None, None], "dt": x[None, None], "A": np.zeros((x.size, 1), np.float32)}
    c |= {"B": np.ones((1, 1, 1), np.float32), "C": np.ones((1, 1, 1), np.float32)}
    y = np.asarray(selective_scan(**c, dt_softplus=True))[0, 0]
    np.testing.assert_allclose(y, np.logaddexp(0, x.astype(np.float64)), rtol=4e-7)


def test_non_finite_values_stay_in_their_row():
    c = case(30, 3, 70, 2)
    clean = evaluation("auto", dt_softplus=True)(c, weights(c))
    for name in ("u", "dt", "B", "C", "z"):
        bad = {**c, name: c[name].copy()}
        bad[name][4, 1] = np.nan
        g, (y, h) = evaluation("auto", dt_softplus=True)(bad, weights(c))
        assert np.isnan(y[:, 1]).any(), name
        for got, expected in ((y, clean[1][0]), (g["u"], clean[0]["u"]), (g["B"], clean[0]["B"])):
            np.testing.assert_array_equal(got[:, ::2], expected[:, ::2])
        np.testing.assert_array_equal(h[::2], clean[1][1][::2])


def test_padding_and_states_before_a_reset_do_not_count():
    c = case(20, 2, 6, 3)
    c["u"][:7] = np.nan
    reset = np.zeros(20, bool)
    reset[7] = True
    run = evaluation("auto", dt_softplus=True, reset=reset)
    w = weights(c)
    w[0][:7] = 0
    _, (y, h) = run(c, w)
    assert np.isfinite(y[7:]).all()
    assert np.isfinite(h).all()

    c = case(20, 2, 6, 3)
    for name in ("u", "dt", "B", "C", "z"):
        c[name][9:, 1] = np.nan
    g, (y, h) = evaluation("auto", dt_softplus=True, lengths=np.array([20, 9]))(c, weights(c))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((g, y, h)))
    assert not np.any(y[9:, 1])
    assert not np.any(g["u"][9:, 1])


def test_bfloat16_in_and_out():
    c = case(33, 2, 6, 4)
    low = {k: jnp.asarray(v, jnp.bfloat16 if k in ("u", "dt", "B", "C", "z") else None) for k, v in c.items()}
    assert in_kernel(low)
    y = selective_scan(**low, dt_softplus=True)
    assert y.dtype == jnp.bfloat16
    exact = selective_scan(**{k: v.astype(jnp.float32) for k, v in low.items()}, dt_softplus=True)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_vmap():
    c = case(9, 2, 4, 3)
    many = {k: np.stack([v, 2 * v]) for k, v in c.items()}
    y = jax.vmap(lambda c: selective_scan(**c, dt_softplus=True))(many)
    for i in range(2):
        np.testing.assert_array_equal(y[i], selective_scan(**{k: v[i] for k, v in many.items()}, dt_softplus=True))


def test_many_threads_at_once():
    cases = [case(50, 2, 200, 4, seed=seed) for seed in range(8)]
    check_calls_at_once(evaluation("auto", dt_softplus=True), [(c, weights(c)) for c in cases])


@pytest.mark.parametrize("batch", [1, 3])
def test_memory_grows_with_the_root_of_the_steps(batch):
    """Of the gradients of everything, beyond what goes in and comes out; any number of steps, whole blocks or not."""
    D, N = 70, 16

    def temp(T):
        shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in case(1, batch, D, N).items()}
        shapes |= {
            name: jax.ShapeDtypeStruct((T, *shapes[name].shape[1:]), jnp.float32) for name in ("u", "dt", "B", "C", "z")
        }
        loss = partial(selective_scan, dt_softplus=True)
        program = jax.jit(lambda c, dy: jax.vjp(lambda c: loss(**c), c)[1](dy))
        return program.lower(shapes, shapes["u"]).compile().memory_analysis().temp_size_in_bytes

    state = 4 * batch * D * N
    assert temp(1 << 17) < (512 + 8) * state
    assert temp((1 << 17) - 1) < (512 + 8) * state
    assert temp(1 << 13) < (128 + 8) * state


def test_exported_programs_stand_alone():
    c = case(20, 2, 4, 3)
    exported = jax.export.export(jax.jit(jax.grad(lambda c: selective_scan(**c).sum())), platforms=("cpu",))(c)
    assert "spyx_native" not in exported.mlir_module()


PROGRAM = """
import numpy as np, jax
from spyx.ops import selective_scan
from spyx.ops.dispatch import native_kernels
one = np.ones((20, 1, 2), np.float32)
args = one, one, -one[0].repeat(2, 0), one, one
print(native_kernels(), "spyx_native" in jax.jit(selective_scan).lower(*args).as_text())
print(float(selective_scan(*args).sum()))
"""


def test_switched_off_by_the_environment_and_without_numba():
    def run(**environment):
        script = environment.pop("before", "") + PROGRAM
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split()

    on, off = run(), run(SPYX_NATIVE="0")
    hidden = run(before="import sys; sys.modules['numba'] = None\n")
    assert [*map(float, (on[2], off[2], hidden[2]))] == pytest.approx([float(off[2])] * 3, rel=1e-6)
    assert (on[:2], off[:2], hidden[:2]) == (["True", "True"], ["False", "False"], ["False", "False"])
