"""The compiled CPU kernels of linear_scan against the float64 oracle, called by many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.scan import linear_scan as oracle

from spyx.ops import dispatch, linear_scan

pytestmark = pytest.mark.skipif(not dispatch.native_kernels(), reason="numba is not installed, or SPYX_NATIVE=0")
TARGET = "spyx_native"
SINGLE: dict[str, Any] = {"real": np.float32}


def numbers(rng, *shape, complex_=False, radius=None):
    z = rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_ else 0)
    if radius is not None:
        z = z / np.abs(z) * rng.uniform(0.3, radius, shape)
    return z.astype(np.complex64 if complex_ else np.float32)


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)


def calls(f, *args):
    return jax.jit(f).lower(*args).as_text().count(TARGET)


def uses_kernel(f, *args):
    return calls(f, *args) > 0


def adjoint_oracle(a, x, h0, dh, dh_last, *, reverse=False, reset=None, lengths=None):
    """Gradients, in float64, of Re(sum(conj(dh) h) + sum(conj(dh_last) h_last)) by the steps in the other order."""
    T, shape = x.shape[0], x.shape
    _, rows = shape[:2]
    h, _ = oracle(a, x, h0, reverse=reverse, reset=reset, lengths=lengths)
    full = np.broadcast_to(a if a.ndim == x.ndim else a[None], shape)
    da, dx, dh0 = np.zeros(shape, h.dtype), np.zeros(shape, h.dtype), np.array(dh_last, h.dtype)
    for b in range(rows):
        steps = list(range(T if lengths is None else min(T, int(lengths[b]))))
        steps = steps[::-1] if reverse else steps
        for k in reversed(range(len(steps))):
            t = steps[k]
            before = h[steps[k - 1], b] if k else h0[b].astype(h.dtype)
            g = dx[t, b] = dh0[b] + dh[t, b]
            if reset is not None and (reset[t] if reset.ndim == 1 else reset[t, b]):
                dh0[b] = 0
            else:
                da[t, b], dh0[b] = g * np.conj(before), g * np.conj(full[t, b])
    if a.ndim < x.ndim:
        da = da.sum(0).sum(0, keepdims=True) if a.shape[0] < rows else da.sum(0)
    return da, dx, dh0


KINDS = {"real": (False, False), "complex": (True, True), "complex decay": (True, False), "real decay": (False, True)}
SHAPES = {"prime": (37, 2, 67), "blocks": (40, 1, 64), "four axes": (18, 3, 5, 7), "one column": (19, 1, 1)}


@pytest.mark.parametrize("options", ["", "h0 reset", "lengths reverse", "h0 reset in time lengths reverse"])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_match_the_oracle(kind, varying, options):
    rng = np.random.default_rng()
    names = options.split()
    a_complex, x_complex = KINDS[kind]
    for T, B, *features in SHAPES.values() if kind == "complex" and varying == bool(names) else [SHAPES["prime"]]:
        x = numbers(rng, T, B, *features, complex_=x_complex)
        leading = (T, B) if varying else (1,) if "h0" in names else (B,)
        a = numbers(rng, *leading, *features, complex_=a_complex, radius=0.99)
        either = a_complex or x_complex
        h0 = numbers(rng, B, *features, complex_=either) * (1 if "h0" in names else 0)
        kwargs: dict[str, Any] = {"reverse": "reverse" in names}
        if "lengths" in names:
            kwargs["lengths"] = rng.integers(0, T + 2, B)
        if "reset" in names:
            kwargs["reset"] = rng.random((T,) if "in" in names else (T, B)) < 0.2
        dh, dh_last = numbers(rng, *x.shape, complex_=either), numbers(rng, *h0.shape, complex_=either)
        if either and not x_complex:
            dh = dh.astype(np.complex64)

        run = partial(linear_scan, **kwargs)

        @jax.jit
        def with_gradients(values, cotangents, run=run):
            out, transpose = jax.vjp(run, *values)
            return out, transpose(cotangents)

        got, grads = with_gradients((a, x, h0), (jnp.conj(dh), jnp.conj(dh_last)))
        truth, single = (oracle(a, x, h0, **kwargs, **real) for real in ({}, SINGLE))
        for value, want, plain in zip(got, truth, single, strict=True):
            assert relative(value, want) <= max(1e-6, 2 * relative(plain, want))
        wanted = adjoint_oracle(a, x, h0, dh, dh_last, **kwargs)
        for grad, want in zip(grads, wanted, strict=True):
            want = want if np.iscomplexobj(grad) else want.real
            assert relative(np.conj(grad), want) <= 3e-6
        if features == [67]:
            assert uses_kernel(run, a, x, h0)


def test_what_is_not_a_number_stays_in_its_row_and_in_the_padding():
    rng = np.random.default_rng()
    a, x = numbers(rng, 33, 3, 20, radius=0.9), numbers(rng, 33, 3, 20)
    clean = [np.asarray(v) for v in linear_scan(a, x, lengths=jnp.array([20, 33, 33]))]
    a[20:, 0] = x[20:, 0] = x[5, 1, 3] = np.nan
    f = jax.jit(lambda a, x: linear_scan(a, x, lengths=jnp.array([20, 33, 33])))
    for got, want in zip(f(a, x), clean, strict=True):
        keep = np.ones(want.shape, bool)
        keep[..., 1, 3] = False
        np.testing.assert_array_equal(np.asarray(got)[keep], want[keep])
        assert np.isnan(got)[..., 1, 3].any()
    for grad in jax.grad(lambda a, x: jnp.sum(f(a, x)[0][:, [0, 2]] ** 2), (0, 1))(a, x):
        assert np.isfinite(np.delete(np.asarray(grad).reshape(33, -1), 20 + 3, 1)).all()


def test_what_the_kernel_does_not_take_is_computed_in_xla():
    rng = np.random.default_rng()
    a, x = numbers(rng, 20, 32, radius=0.9), numbers(rng, 20, 32)
    assert uses_kernel(linear_scan, a, x)
    assert not uses_kernel(partial(linear_scan, method="blocked"), a, x)
    assert not uses_kernel(linear_scan, a[:16], x[:16])
    assert not uses_kernel(linear_scan, a[:, :4], x[:, :4])
    assert not uses_kernel(partial(linear_scan, lengths=jnp.arange(32)), a, x)
    assert not uses_kernel(linear_scan, a.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    assert TARGET not in jax.export.export(jax.jit(linear_scan))(a, x).mlir_module()
    with jax.enable_x64(True):
        assert not uses_kernel(linear_scan, a.astype(np.float64), x.astype(np.float64))


def test_transforms():
    rng = np.random.default_rng()
    a, x = numbers(rng, 4, 20, 18, radius=0.9), numbers(rng, 4, 20, 18)
    loss = lambda a, x: jnp.sum(jnp.sin(linear_scan(a, x)[0]))  # noqa: E731
    each = [jax.grad(loss)(p, q) for p, q in zip(a, x, strict=True)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(a, x), np.stack(each))
    np.testing.assert_array_equal(jax.jit(jax.grad(jax.checkpoint(loss)))(a[0], x[0]), each[0])
    donated = jax.jit(lambda x: linear_scan(a[0], x)[0], donate_argnums=0)
    want = linear_scan(a[0], x[0])[0]
    np.testing.assert_array_equal(donated(jnp.array(x[0])), want)

    def product(method, v):
        f = lambda x: jnp.sum(jnp.sin(linear_scan(a[0], x, method=method)[0]))  # noqa: E731
        return jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v)))(x[0])

    assert relative(product("auto", x[1]), product("sequential", x[1])) <= 2e-6


def test_many_threads_at_once():
    rng = np.random.default_rng()
    a, x = numbers(rng, 64, 300, complex_=True, radius=0.99), numbers(rng, 64, 300, complex_=True)
    f = jax.jit(jax.value_and_grad(lambda a, x: jnp.sum(jnp.abs(linear_scan(a, x)[0]) ** 2), (0, 1)))
    want = jax.tree.map(np.asarray, f(a, x))

    def call(_):
        for _ in range(50):
            jax.tree.map(np.testing.assert_array_equal, f(a, x)[1], want[1])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8), timeout=120))
