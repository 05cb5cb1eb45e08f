"""The compiled CPU kernels of the state-space dual scan: "auto" where they fit, against float64."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.ssd import ssd as oracle
from threads import check_calls_at_once

from spyx.ops.ssd import ssd

OPTIONAL = ("D", "z", "dt_bias", "h0")


def case(T, batch, heads, P, N, groups=1, seed=0, optional=OPTIONAL):
    rng = np.random.default_rng(seed)

    def real(*shape):
        return rng.normal(size=shape).astype(np.float32)

    c = {"x": real(T, batch, heads, P), "dt": real(T, batch, heads), "A": -np.exp(real(heads))}
    c |= {name: real(T, batch, groups, N) for name in ("B", "C")}
    more = {"D": real(heads), "z": real(T, batch, heads, P), "dt_bias": real(heads), "h0": real(batch, heads, P, N)}
    return c | {name: more[name] for name in optional}


def evaluation(method, **fixed):
    def loss(c, weights):
        y, h = ssd(**c, **fixed, dt_softplus=True, method=method, return_state=True)
        return jnp.vdot(y, weights[0]) + jnp.vdot(h, weights[1]), (y, h)

    return jax.jit(jax.grad(loss, has_aux=True))


def weights(c):
    (T, batch, heads, P), N = c["x"].shape, c["B"].shape[3]
    rng = np.random.default_rng(9)
    return rng.normal(size=(T, batch, heads, P)).astype("f4"), rng.normal(size=(batch, heads, P, N)).astype("f4")


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def in_kernel(c, **fixed):
    return "spyx_native" in jax.jit(lambda c: ssd(**c, **fixed)).lower(c).as_text()


def check(c, **fixed):
    assert in_kernel(c, **fixed)
    y, h = oracle(**c, **fixed, dt_softplus=True)
    g, (y32, h32) = evaluation("auto", **fixed)(c, weights(c))
    of_plain, (y_plain, h_plain) = evaluation("sequential", **fixed)(c, weights(c))
    plain = max(relative(y_plain, y), relative(h_plain, h))
    assert max(relative(y32, y), relative(h32, h)) <= max(1e-6, 2 * plain)
    exact = {name: v.astype(np.float64) for name, v in c.items()}
    with jax.enable_x64(True):
        wanted = evaluation("sequential", **fixed)(exact, tuple(w.astype(np.float64) for w in weights(c)))[0]
    for name, v in g.items():
        limit = max(1e-5, 2 * relative(of_plain[name], wanted[name]))
        if name == "dt_bias":  # a sum of the gradients of dt, which may cancel
            terms = np.abs(wanted["dt"]).sum((0, 1)).max()
            limit = max(limit, 1e-7 * terms / max(np.abs(wanted[name]).max(), 1e-30))
        assert relative(v, wanted[name]) < limit, name


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 1, 1), 1), ((2, 3, 2, 64, 3), 1), ((37, 2, 4, 3, 2), 2), ((67, 1, 3, 130, 7), 1),
        ((50, 3, 6, 24, 5), 2), ((131, 1, 4, 64, 16), 1), ((17, 2, 8, 32, 33), 4),
    ],
)  # fmt: skip
def test_values_and_gradients(shape, groups):
    check(case(*shape, groups))


@settings(max_examples=4, deadline=None)
@given(
    T=st.sampled_from([5, 23, 64]),
    groups=st.sampled_from([1, 2, 4]),
    optional=st.sets(st.sampled_from(OPTIONAL)),
    reverse=st.booleans(),
    resets=st.sampled_from([None, "T", "TB"]),
    lengths=st.booleans(),
    dt_limit=st.sampled_from([(0.0, np.inf), (0.1, 1.0)]),
)
def test_any_combination(T, groups, optional, reverse, resets, lengths, dt_limit):
    fixed = {"reverse": reverse, "dt_limit": dt_limit}
    if resets:
        fixed["reset"] = np.random.default_rng(1).random((T,) if resets == "T" else (T, 2)) < 0.3
    if lengths:
        fixed["lengths"] = np.array([T // 2, T])
    check(case(T, 2, 4, 3, 2, groups, optional=sorted(optional)), **fixed)


def test_a_gradient_whose_terms_cancel():
    check(case(99, 1, 1, 56, 8), reverse=True)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination_widely(data):
    draw = data.draw
    T, batch, groups = draw(st.integers(1, 140)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, P, N = groups * draw(st.integers(1, 4)), draw(st.integers(2, 90)), draw(st.integers(2, 40))
    c = case(T, batch, heads, P, N, groups, optional=sorted(draw(st.sets(st.sampled_from(OPTIONAL)))))
    fixed = {"reverse": draw(st.booleans())}
    if draw(st.booleans()):
        fixed["reset"] = np.random.default_rng(1).random((T, batch)) < 0.2
    if draw(st.booleans()):
        fixed["lengths"] = np.array([draw(st.integers(0, T)) for _ in range(batch)])
    check(c, **fixed)


def test_non_finite_values_stay_in_their_row():
    c = case(30, 3, 4, 40, 2, 2)
    clean = evaluation("auto")(c, weights(c))
    for name in ("x", "dt", "B", "C", "z"):
        bad = {**c, name: c[name].copy()}
        bad[name][4, 1] = np.nan
        g, (y, h) = evaluation("auto")(bad, weights(c))
        assert np.isnan(y[:, 1]).any(), name
        assert np.isfinite(y[:4]).all(), name
        for got, expected in ((y, clean[1][0]), (g["x"], clean[0]["x"]), (g["B"], clean[0]["B"])):
            np.testing.assert_array_equal(got[:, ::2], expected[:, ::2])
        np.testing.assert_array_equal(h[::2], clean[1][1][::2])


def test_what_was_before_a_reset_does_not_count():
    c = case(20, 2, 3, 6, 3)
    c["x"][:7] = np.nan
    reset = np.zeros(20, bool)
    reset[7] = True
    weigh = weights(c)
    weigh[0][:7] = 0
    g, (y, h) = evaluation("auto", reset=reset)(c, weigh)
    assert np.isfinite(y[7:]).all()
    assert np.isfinite(h).all()
    assert np.isfinite(g["x"][7:]).all()
    assert not np.any(g["h0"])


def test_bfloat16_in_and_out():
    c = case(33, 2, 2, 6, 4)
    low = {k: jnp.asarray(v, jnp.bfloat16 if k in ("x", "dt", "B", "C", "z") else None) for k, v in c.items()}
    assert in_kernel(low)
    y = ssd(**low)
    assert y.dtype == jnp.bfloat16
    exact = ssd(**{k: v.astype(jnp.float32) for k, v in low.items()})
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    g = jax.grad(lambda c: ssd(**c).astype(jnp.float32).sum())(low)
    assert {k: v.dtype for k, v in g.items()} == {k: v.dtype for k, v in low.items()}


def test_vmap():
    c = case(9, 2, 2, 4, 3)
    many = {k: np.stack([v, 2 * v]) for k, v in c.items()}
    y = jax.vmap(lambda c: ssd(**c, dt_softplus=True))(many)
    for i in range(2):
        np.testing.assert_array_equal(y[i], ssd(**{k: v[i] for k, v in many.items()}, dt_softplus=True))


def test_many_threads_at_once():
    cases = [case(50, 2, 4, 70, 4, 2, seed=seed) for seed in range(8)]
    check_calls_at_once(evaluation("auto"), [(c, weights(c)) for c in cases])


def test_memory_grows_with_the_states_of_a_core_alone():
    """XLA's temporary bytes, of the gradients of everything, beside copies of inputs: two states, no more."""

    def temp(T):
        shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in case(1, 1, 4, 32, 32).items()}
        steps = ("x", "dt", "B", "C", "z")
        shapes |= {name: jax.ShapeDtypeStruct((T, *shapes[name].shape[1:]), jnp.float32) for name in steps}
        program = jax.jit(lambda c, dy: jax.vjp(lambda c: ssd(**c), c)[1](dy)).lower(shapes, shapes["x"]).compile()
        inputs = sum(v.size * 4 for name, v in shapes.items() if name in steps)
        return program.memory_analysis().temp_size_in_bytes - 2 * inputs

    assert temp(1 << 14) < 8 * 4 * 4 * 32 * 32


def test_where_the_kernels_do_not_apply():
    c = case(20, 2, 2, 4, 3)
    assert not in_kernel(c, method="chunked")
    assert not in_kernel(c, precision=jax.lax.DotAlgorithmPreset.F32_F32_F32)
    with jax.enable_x64(True):
        assert not in_kernel({k: v.astype(np.float64) for k, v in c.items()})
    exported = jax.export.export(jax.jit(jax.grad(lambda c: ssd(**c).sum())), platforms=("cpu",))(c)
    assert "spyx_native" not in exported.mlir_module()
    with pytest.raises(ValueError, match="none for CPU"):
        ssd(**c, method="pallas")


def test_switched_off_by_the_environment():
    program = """
import numpy as np, jax
from spyx.ops.ssd import ssd
one = np.ones((20, 1, 2, 3), np.float32)
f = jax.jit(lambda x: ssd(x, x[..., 0], -x[0, 0, :, 0], x, x))
print("spyx_native" in f.lower(one).as_text(), float(f(one).sum()))
"""

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split()

    (used, y), (unused, y_plain) = run(SPYX_NATIVE="1"), run(SPYX_NATIVE="0")
    assert (used, unused) == ("True", "False")
    np.testing.assert_allclose(float(y), float(y_plain), rtol=1e-6)
