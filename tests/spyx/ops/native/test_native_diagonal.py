"""The compiled CPU kernels of diagonal_ssm against the float64 oracle, called by many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.scan import diagonal_ssm as oracle

from spyx.ops import _diagonal_native, diagonal_ssm, dispatch

pytestmark = pytest.mark.skipif(not dispatch.native_kernels(), reason="numba is not installed, or SPYX_NATIVE=0")
TARGET = "spyx_native"
STEPS = _diagonal_native.STEPS


def numbers(rng, *shape, complex_=False):
    z = rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_ else 0)
    return z.astype(np.complex64 if complex_ else np.float32)


def layer(rng, kind, H, N, K):
    """(lam, B, C, D): matrices such that y is of size 1."""
    lam, B, C = numbers(rng, N, complex_=kind != "real"), numbers(rng, N, H, complex_=kind == "complex"), None
    C = numbers(rng, K, N, complex_=kind not in ("real", "real C"))
    D = {"complex": numbers(rng, K), "real": None}.get(kind, numbers(rng, K, H))
    return lam / np.abs(lam) * np.float32(0.97), B / np.float32(H**0.5), C / np.float32(N**0.5), D


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)


def text(f, *args):
    return jax.jit(f).lower(*args).as_text()


MASKS = ("", "lengths", "reset reverse", "reset in time lengths reverse")
CASES = [
    ("complex", 2 * STEPS + 5, 3, 5, 33, ""),
    ("complex", STEPS, 2, 40, 7, "lengths"),
    ("complex", STEPS + 1, 2, 3, 16, "reset reverse"),
    ("real", 3 * STEPS + 17, 1, 6, 35, "reset in time lengths reverse"),
    ("real C", STEPS + 40, 2, 33, 18, "reset lengths"),
    ("real B", 29, 1, 1, 1, "reverse"),
]
CASES += [
    pytest.param(kind, *sizes, masks, marks=pytest.mark.full)
    for kind in ("complex", "real", "real C", "real B")
    for sizes in ((STEPS + 3, 2, 5, 33), (2 * STEPS, 1, 64, 64), (17, 7, 1, 1))
    for masks in MASKS
]


@pytest.mark.parametrize(("kind", "T", "B", "H", "N", "masks"), CASES)
def test_layers_match_the_oracle(kind, T, B, H, N, masks):
    rng = np.random.default_rng()
    K = H if kind == "complex" else H + 2
    args = numbers(rng, T, B, H), *layer(rng, kind, H, N, K), numbers(rng, B, N, complex_=kind != "real")
    kwargs: dict[str, Any] = {"reverse": "reverse" in masks}
    if "lengths" in masks:
        kwargs["lengths"] = rng.integers(0, T + 2, B)
    if "reset" in masks:
        kwargs["reset"] = rng.random((T,) if "in time" in masks else (T, B)) < 0.1
    run = jax.jit(partial(diagonal_ssm, precision="highest", return_state=True, **kwargs))
    assert TARGET in text(run, *args)
    truth, single = oracle(*args, **kwargs), oracle(*args, **kwargs, real=np.float32)
    for got, want, plain in zip(run(*args), truth, single, strict=True):
        assert relative(got, want) <= max(1e-6, 2 * relative(plain, want))

    weights = numbers(rng, T, B, K)

    def gradients(method, args, weights):
        def loss(args):
            y, state = diagonal_ssm(*args, precision="highest", return_state=True, method=method, **kwargs)
            return jnp.vdot(weights, y) + jnp.sum(jnp.abs(state) ** 2)

        return [np.asarray(g) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(args))]

    assert TARGET in text(jax.grad(lambda u: jnp.sum(diagonal_ssm(u, *args[1:]) ** 2)), args[0])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, np.complex128 if np.iscomplexobj(v) else np.float64), args)
        wanted = gradients("sequential", wide, weights)
        # of absolute values alone: the terms of every sum, which may cancel
        sizes = gradients("sequential", jax.tree.map(lambda v: jnp.abs(v).astype(v.dtype), wide), np.abs(weights))
    for got, want, size in zip(gradients("auto", args, weights), wanted, sizes, strict=True):
        assert np.abs(got - want).max() <= 3e-7 * np.abs(size).max()


def test_what_is_not_a_number_stays_in_its_row_and_in_the_padding():
    rng = np.random.default_rng()
    T, lengths = STEPS + 9, jnp.array([STEPS - 3, STEPS + 9, 40])
    u, dy, values = numbers(rng, T, 3, 6), numbers(rng, T, 3, 6), layer(rng, "complex", 6, 20, 6)

    @jax.jit
    def run(u, dy):
        y, pull = jax.vjp(lambda u, *values: diagonal_ssm(u, *values, lengths=lengths), u, *values)
        return y, pull(dy)

    clean = jax.tree.map(np.asarray, run(u, dy))
    padding = np.arange(T)[:, None] >= np.asarray(lengths)
    u[padding] = dy[padding] = np.nan
    jax.tree.map(np.testing.assert_array_equal, run(u, dy), clean)
    assert not clean[0][padding].any()
    u[STEPS - 1, 1] = np.inf
    y, (du, *_) = run(u, dy)
    for got, want in ((y, clean[0]), (du, clean[1][0])):
        np.testing.assert_array_equal(got[:, [0, 2]], want[:, [0, 2]])
    assert np.isnan(np.asarray(y)[STEPS:, 1]).all()


def test_what_the_kernels_do_not_take_is_computed_in_xla():
    rng = np.random.default_rng()
    u, values = numbers(rng, 40, 2, 4), layer(rng, "complex", 4, 5, 4)
    assert TARGET in text(diagonal_ssm, u, *values)
    assert TARGET not in text(partial(diagonal_ssm, method="blocked"), u, *values)
    assert TARGET not in text(diagonal_ssm, u.astype(jnp.bfloat16), *values)
    assert TARGET not in jax.export.export(jax.jit(diagonal_ssm))(u, *values).mlir_module()
    with jax.enable_x64(True):
        assert TARGET not in text(diagonal_ssm, u.astype(np.float64), *values)


def test_time_may_come_second_and_decays_may_vary():
    rng = np.random.default_rng()
    T, B, H, N = STEPS + 5, 2, 6, 9
    u, (_, W, C, D) = numbers(rng, T, B, H), layer(rng, "complex", H, N, H)
    A = numbers(rng, T, B, N, complex_=True)
    A /= np.abs(A) * np.float32(1.1)
    parts = np.stack([W.real, W.imag]), np.stack([C.T.real, -C.T.imag]), D, np.zeros((B, 2, N), np.float32)

    @partial(jax.jit, static_argnames="batch_first")
    def run(u, A, batch_first=False):
        return _diagonal_native.forward(u, A, *parts, None, None, batch_first=batch_first)

    y, h, before = run(u, A)
    y_turned, *others = run(u.swapaxes(0, 1), A, batch_first=True)
    jax.tree.map(np.testing.assert_array_equal, (y_turned.swapaxes(0, 1), *others), (y, h, before))
    state = np.zeros((B, N), complex)
    for t in range(T):
        if t % STEPS == 0:
            assert relative(before[t // STEPS, :, 0] + 1j * before[t // STEPS, :, 1], state) <= 1e-6 or t == 0
        state = A[t] * state + u[t] @ W.T
        assert relative(y[t], (state @ C.T).real + D * u[t]) <= 2e-6
    assert relative(h[:, 0] + 1j * h[:, 1], state) <= 2e-6


def test_many_threads_at_once_agree_to_the_last_bit():
    rng = np.random.default_rng()
    u, values = numbers(rng, 5 * STEPS, 3, 20), layer(rng, "complex", 20, 30, 20)
    f = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(diagonal_ssm(*args))), tuple(range(5))))
    want = jax.tree.map(np.asarray, f(u, *values))

    def call(_):
        for _ in range(30):
            jax.tree.map(np.testing.assert_array_equal, f(u, *values), want)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8), timeout=120))


def test_transforms():
    rng = np.random.default_rng()
    u, values = numbers(rng, 3, STEPS + 2, 2, 4), layer(rng, "complex", 4, 5, 4)
    loss = lambda u: jnp.sum(jnp.sin(diagonal_ssm(u, *values)))  # noqa: E731
    each = np.stack([jax.grad(loss)(one) for one in u])
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(u), each)
    np.testing.assert_array_equal(jax.jit(jax.grad(jax.checkpoint(loss)))(u[0]), each[0])
    donated = jax.jit(lambda u: diagonal_ssm(u, *values), donate_argnums=0)
    np.testing.assert_array_equal(donated(jnp.array(u[0])), diagonal_ssm(u[0], *values))

    def product(method, v):
        f = lambda u: jnp.sum(jnp.sin(diagonal_ssm(u, *values, method=method)))  # noqa: E731
        return jax.jit(jax.grad(lambda u: jnp.vdot(jax.grad(f)(u), v)))(u[0])

    assert relative(product("auto", u[1]), product("sequential", u[1])) <= 3e-5
