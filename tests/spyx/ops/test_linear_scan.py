"""linear_scan against the sequential float64 oracle, in every method."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracles.scan import directional
from oracles.scan import linear_scan as oracle

from spyx.ops import linear_scan
from spyx.ops import scan as scan_module

METHODS = ("sequential", "blocked", "associative")
T, B, N = 37, 2, 3


def numbers(rng, *shape, complex_=False, radius=None):
    z = rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_ else 0)
    if radius is not None:
        z = z / np.abs(z) * rng.uniform(0.3, radius, shape)
    return z.astype(np.complex64 if complex_ else np.float32)


KINDS = {
    "real, constant": lambda r: (numbers(r, N, radius=0.99), numbers(r, T, B, N)),
    "real, varying, broadcast": lambda r: (numbers(r, T, 1, N, radius=0.99), numbers(r, T, B, N)),
    "complex, varying": lambda r: (
        numbers(r, T, B, N, complex_=True, radius=1),
        numbers(r, T, B, N, complex_=True),
    ),
    "complex constant, real input": lambda r: (
        numbers(r, B, 1, complex_=True, radius=1),
        numbers(r, T, B, N),
    ),
    "real constant, complex input": lambda r: (numbers(r, N, radius=1), numbers(r, T, B, N, complex_=True)),
}
OPTIONS = {
    "h0": ("h0",),
    "lengths, reverse": ("lengths", "reverse"),
    "reset, h0": ("h0", "reset"),
    "everything": ("h0", "reset in time", "lengths", "reverse"),
}


def example(kind, option, seed=0):
    rng = np.random.default_rng(seed)
    a, x = KINDS[kind](rng)
    names = OPTIONS[option]
    complex_ = np.iscomplexobj(a) or np.iscomplexobj(x)
    h0 = numbers(rng, B, N, complex_=complex_) if "h0" in names else None
    kwargs = {}
    if "reverse" in names:
        kwargs["reverse"] = True
    if "lengths" in names:
        kwargs["lengths"] = np.array([T + 3, 19])
    if "reset" in names:
        kwargs["reset"] = rng.random((T, B)) < 0.1
    if "reset in time" in names:
        kwargs["reset"] = rng.random(T) < 0.1
    return (a, x, h0), kwargs


def real_dot(z, w):
    return (z.real * w.real + z.imag * w.imag).sum()


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)


@pytest.mark.parametrize(
    ("method", "kind", "option"),
    [
        (method, kind, option)
        for method in METHODS
        for kind in KINDS
        for option in OPTIONS
        if method != "associative" or option in ("h0", "everything")
    ],
)
def test_values_and_gradients_match_the_oracle(method, kind, option):
    values, kwargs = example(kind, option)
    truth = oracle(*values, **kwargs)
    single = oracle(*values, **kwargs, real=np.float32)
    rng = np.random.default_rng(1)
    weights = [numbers(rng, *v.shape, complex_=True) for v in truth]

    @jax.jit
    def run(values):
        def loss(values):
            out = linear_scan(*values, method=method, **kwargs)
            return sum(real_dot(o, w) for o, w in zip(out, weights, strict=True)), out

        return jax.value_and_grad(loss, has_aux=True)(values)

    (_, out), grads = run(values)
    for got, want, plain in zip(out, truth, single, strict=True):
        factor = 32 if method == "associative" else 2
        assert relative(got, want) <= max(1e-6, factor * relative(plain, want))

    def loss64(*values):
        return sum(real_dot(o, w) for o, w in zip(oracle(*values, **kwargs), weights, strict=True))

    values64 = [None if v is None else v.astype(np.result_type(v.dtype, np.float64)) for v in values]
    for k, grad in enumerate(grads):
        if grad is None:
            continue
        direction = numbers(rng, *grad.shape, complex_=np.iscomplexobj(grad))
        directions = [0 if i != k else direction for i in range(3)]
        want = directional(loss64, values64, directions)
        got = np.sum(np.asarray(grad, np.complex128) * direction).real
        assert abs(got - want) <= 1e-5 * np.linalg.norm(grad) * np.linalg.norm(direction)


@settings(max_examples=12, deadline=None)
@given(
    T=st.sampled_from([1, 2, 17]),
    features=st.sampled_from([(), (1,), (2, 3), (2, 1, 2)]),
    method=st.sampled_from(METHODS),
    varying=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_rank(T, features, method, varying, reverse, seed):
    rng = np.random.default_rng(seed)
    a, x = numbers(rng, *((T, *features) if varying else features), radius=1.0), numbers(rng, T, *features)
    got = linear_scan(a, x, reverse=reverse, method=method)
    for g, w in zip(got, oracle(a, x, reverse=reverse), strict=True):
        assert relative(g, w) <= 2e-6


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_no_steps(method):
    h0 = np.ones((2, 3), np.float32)
    h, last = linear_scan(np.float32(0.5), np.zeros((0, 2, 3), np.float32), h0, method=method)
    assert h.shape == (0, 2, 3)
    np.testing.assert_array_equal(last, h0)
    h, last = linear_scan(np.complex64(0.5), np.zeros((0, 2), np.float32), method=method)
    assert h.dtype == last.dtype == np.complex64
    np.testing.assert_array_equal(last, [0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method):
    h, last = linear_scan(np.float32(0.5), np.zeros((3, 0, 2), np.float32), method=method)
    assert h.shape == (3, 0, 2)
    assert last.shape == (0, 2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_lengths_of_nothing_all_and_beyond(method, reverse):
    rng = np.random.default_rng(0)
    a, x, h0 = numbers(rng, 3, radius=1), numbers(rng, 5, 3, 3), numbers(rng, 3, 3)
    lengths = np.array([0, 5, 99])
    h, last = linear_scan(a, x, h0, lengths=lengths, reverse=reverse, method=method)
    want, want_last = oracle(a, x, h0, lengths=lengths, reverse=reverse)
    assert relative(h, want) <= 1e-6
    assert relative(last, want_last) <= 1e-6
    np.testing.assert_array_equal(last[0], h0[0])
    np.testing.assert_array_equal(h[:, 0], 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_reset_at_the_first_step_clears_h0(method, reverse):
    rng = np.random.default_rng(0)
    a, x = numbers(rng, 3, radius=1), numbers(rng, 5, 2, 3)
    reset = np.zeros(5, bool)
    reset[-1 if reverse else 0] = True
    h0 = np.full((2, 3), np.nan, np.float32)
    cleared = linear_scan(a, x, h0, reset=reset, reverse=reverse, method=method)
    for got, want in zip(cleared, linear_scan(a, x, reverse=reverse, method=method), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nan_stays_where_it_is(method, varying):
    rng = np.random.default_rng(0)
    L = 19
    a = numbers(rng, L, 4, 2, radius=1) if varying else numbers(rng, 2, radius=1)
    x = numbers(rng, L, 4, 2)
    lengths, reset = np.array([L, 7, L, L]), np.zeros((L, 4), bool)
    reset[9, 2] = True
    dirty = x.copy()
    dirty[7:, 1] = np.nan
    dirty[:9, 2] = np.nan
    dirty[0, 3] = np.nan
    dirty_a = a
    if varying:
        dirty_a = a.copy()
        dirty_a[7:, 1] = np.nan
        dirty_a[3, 2] = np.nan

    @jax.jit
    def run(a, x):
        def loss(a, x):
            h, last = linear_scan(a, x, lengths=lengths, reset=reset, method=method)
            seen = h[:, :2].sum() + h[9:, 2].sum() + last[:3].sum()
            return seen, (h, last)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(a, x)

    clean_grads, (h, last) = run(a, x)
    grads, (dirty_h, dirty_last) = run(dirty_a, dirty)
    np.testing.assert_array_equal(dirty_h[:, :2], h[:, :2])
    np.testing.assert_array_equal(dirty_h[9:, 2], h[9:, 2])
    np.testing.assert_array_equal(dirty_last[:3], last[:3])
    np.testing.assert_array_equal(grads[1][:, :2], clean_grads[1][:, :2])
    np.testing.assert_array_equal(grads[1][9:, 2], clean_grads[1][9:, 2])
    if varying:
        np.testing.assert_array_equal(grads[0][:, :2], clean_grads[0][:, :2])
        np.testing.assert_array_equal(grads[0][9:, 2], clean_grads[0][9:, 2])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_has_a_float32_state(method):
    rng = np.random.default_rng(0)
    a, x = numbers(rng, 40, 2, radius=1), numbers(rng, 40, 2)
    a16, x16 = jnp.asarray(a, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)
    (h, last), pull = jax.vjp(lambda a, x: linear_scan(a, x, method=method), a16, x16)
    want, want_last = oracle(np.asarray(a16, np.float32), np.asarray(x16, np.float32))
    assert h.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert relative(np.asarray(h, np.float32), want) <= 2**-8
    assert relative(last, want_last) <= 1e-5
    assert [g.dtype for g in pull((h, last))] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("method", METHODS)
def test_float64_stays_float64(method):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, x = rng.uniform(-1, 1, (23, 2)), rng.normal(size=(23, 2))
        h, last = linear_scan(a, x, method=method)
        assert h.dtype == last.dtype == np.float64
        assert relative(h, oracle(a, x)[0]) <= 1e-14


@pytest.mark.parametrize(
    ("a", "x", "dtype"),
    [
        (np.float32, np.complex64, np.complex64),
        (np.complex64, np.float32, np.complex64),
        (jnp.bfloat16, np.float32, np.float32),
        (np.float32, np.float16, np.float16),
    ],
)
def test_dtype_of_the_result(a, x, dtype):
    h, last = linear_scan(jnp.ones(2, a), jnp.ones((3, 2), x))
    assert h.dtype == dtype
    assert last.dtype == jnp.result_type(dtype, jnp.float32)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_second_order(method, complex_):
    rng = np.random.default_rng(0)
    L = 5 if method == "associative" else 18
    with jax.enable_x64(True):
        a, x = (numbers(rng, *s, complex_=complex_, radius=1) for s in ((L, 1), (L, 2)))
        wide = np.complex128 if complex_ else np.float64
        args = a.astype(wide), x.astype(wide), numbers(rng, 2).astype(wide)
        reset = rng.random((L, 2)) < 0.1

        @jax.jit
        def loss(a, x, h0):
            h, last = linear_scan(a, x, h0, reset=reset, method=method)
            return jnp.sum(jnp.abs(h) ** 2) + jnp.sum(jnp.abs(last) ** 4)

        check_grads(loss, args, order=2, modes=["rev"], rtol=1e-5)
        if complex_:
            return
        gradient = jax.jit(jax.grad(loss))
        direction = rng.normal(size=a.shape)
        _, forward = jax.jvp(lambda a: gradient(a, *args[1:]), (args[0],), (direction,))
        backward = jax.grad(lambda a: jnp.vdot(gradient(a, *args[1:]), direction))(args[0])
        np.testing.assert_allclose(forward, backward, rtol=1e-9)


def test_second_order_inside_a_loop_over_layers():
    """JAX drops custom rules where it splits the body of a loop: what is left is the derivative of the plain scan."""
    rng = np.random.default_rng(0)
    decays, x = rng.uniform(0.5, 0.9, (3, 32)).astype(np.float32), numbers(rng, 20, 2, 32)

    def hessian_product(method):
        def loss(decays):
            def layer(y, decay):
                return y + 0.01 * y * linear_scan(decay, x, method=method)[0], None

            return jnp.sum(jnp.sin(jax.lax.scan(layer, jnp.ones_like(x), decays)[0]))

        return jax.jit(jax.grad(lambda decays: jnp.sum(jax.grad(loss)(decays))))(decays)

    wanted = hessian_product("sequential")
    np.testing.assert_allclose(hessian_product("auto"), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_forward_mode(method):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, x = rng.uniform(-1, 1, (9, 2)), rng.normal(size=(9, 2))
        check_grads(lambda a, x: linear_scan(a, x, method=method)[0], (a, x), order=1, modes=["fwd"])


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_vmap(method):
    rng = np.random.default_rng(0)
    a, x = numbers(rng, 4, 3, radius=1), numbers(rng, 4, 20, 2, 3)
    scan = jax.jit(lambda a, x: linear_scan(a, x, method=method)[0].sum(0))
    got = jax.vmap(jax.value_and_grad(lambda a, x: scan(a, x).sum()))(a, x)
    want = [jax.value_and_grad(lambda a, x: scan(a, x).sum())(*z) for z in zip(a, x, strict=True)]
    np.testing.assert_allclose(got[0], np.stack([w[0] for w in want]), rtol=1e-5)
    np.testing.assert_allclose(got[1], np.stack([w[1] for w in want]), rtol=1e-4)


def test_auto_is_blocked_here():
    rng = np.random.default_rng(0)
    a, x = numbers(rng, 3, radius=1), numbers(rng, 33, 2, 3)
    np.testing.assert_array_equal(linear_scan(a, x)[0], linear_scan(a, x, method="blocked")[0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("varying", [False, True])
def test_associative_in_chunks(monkeypatch, varying, reverse):
    monkeypatch.setattr(scan_module, "_CHUNK", 8)
    rng = np.random.default_rng(0)
    L = 41
    a, x = numbers(rng, *((L, 1, 2) if varying else (2,)), radius=1), numbers(rng, L, 3, 2)
    kwargs = {"lengths": np.array([41, 12, 0]), "reset": rng.random((L, 3)) < 0.1, "reverse": reverse}
    for options in ({"reverse": reverse}, kwargs):
        got = linear_scan(a, x, numbers(rng, 3, 2) * 0 + 1, method="associative", **options)
        for g, w in zip(got, oracle(a, x, np.ones((3, 2)), **options), strict=True):
            assert relative(g, w) <= 2e-6


def test_repeated_calls_compile_once():
    x = np.ones((21, 2), np.float32)
    linear_scan(np.float32(0.5), x)
    before = scan_module._linear_scan._cache_size()
    for _ in range(3):
        linear_scan(np.float32(0.25), x)
    assert scan_module._linear_scan._cache_size() == before


def test_no_trajectory_is_kept_for_the_backward_pass():
    a, x = jnp.full(64, 0.9), jnp.ones((4096, 1, 64))
    grad = jax.jit(jax.grad(lambda a, x: linear_scan(a, x, method="blocked")[1].sum()))
    temp = grad.lower(a, x).compile().memory_analysis().temp_size_in_bytes
    assert temp < 2.5 * x.nbytes


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"x": np.float32(1)}, ValueError, "leading time axis"),
        ({"a": np.ones(4, np.float32)}, ValueError, "a must broadcast"),
        ({"a": np.ones((1, 2, 3), np.float32)}, ValueError, "a must broadcast"),
        ({"a": np.ones((1, 5, 2, 3), np.float32)}, ValueError, "a must broadcast"),
        ({"a": np.ones(3, np.int32)}, TypeError, "a must be floating point"),
        ({"x": np.ones((5, 2, 3), np.int32)}, TypeError, "x must be floating point"),
        ({"h0": np.ones(3, np.float32)}, ValueError, "h0 must have shape"),
        ({"h0": np.ones((2, 3), bool)}, TypeError, "h0 must be floating point"),
        ({"reset": np.zeros(5, np.int32)}, TypeError, "reset must be bool"),
        ({"reset": np.zeros(4, bool)}, ValueError, "reset must have shape"),
        ({"lengths": np.ones(2, np.float32)}, TypeError, "lengths must be integers"),
        ({"lengths": np.ones(3, np.int32)}, ValueError, "lengths must have shape"),
    ],
)
def test_refuses(change, error, match):
    args = {"a": np.ones(3, np.float32), "x": np.ones((5, 2, 3), np.float32)} | change
    with pytest.raises(error, match=match):
        linear_scan(**args)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", list(KINDS)[1:4])
def test_the_adjoint_of_a_scan_is_a_scan(kind, option):
    """What "auto" does in the backward pass on accelerators, here against differentiated lax.scan."""
    values, kwargs = example(kind, option)
    (a, x, h0), kwargs = values, dict(kwargs)
    a = jnp.asarray(a)
    dtype = np.complex64 if np.iscomplexobj(a) or np.iscomplexobj(x) else np.float32
    h0 = jnp.zeros((B, N), dtype) if h0 is None else jnp.asarray(h0, dtype)
    reset, lengths = kwargs.get("reset"), kwargs.get("lengths")
    if reset is not None:
        reset = jnp.asarray(reset).reshape(reset.shape + (1,) * (3 - reset.ndim))
    masks = reset, None if lengths is None else scan_module.valid_steps(jnp.asarray(lengths), T, 3)
    a = a if a.ndim == 3 else a.reshape((1,) * (2 - a.ndim) + a.shape)
    reverse = kwargs.get("reverse", False)

    values = a, jnp.asarray(x), h0

    def sequential(values):
        return scan_module.plain(scan_module.How(reverse, "sequential"), values, masks)

    outputs, pull = jax.vjp(sequential, values)
    cotangents = jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape).astype(v.dtype), outputs)
    got = jax.jit(partial(scan_module._adjoint_by_scan, reverse))(values, masks, cotangents)
    for g, w in zip(got, pull(cotangents)[0], strict=True):
        assert relative(g, w) <= 1e-5
