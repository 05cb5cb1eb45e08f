"""The linear recurrence h_t = a_t h_{t-1} + x_t for CPU: forward and its transpose, float32.

An array is seen as (T, M F) values, without T where it does not vary in time. An item is `WIDTH` of the F neighbours
of one of the M rows; rows are what masks tell apart. A complex value is two floats: side by side (INTERLEAVED,
complex64), or M F floats apart (PLANAR: (T, 2, M F)); REAL stands for an imaginary part of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from . import custom_call
from .custom_call import kernel
from .memory import flags, ints, words
from .vectors import WIDTH, load_pairs, load_some_pairs, put, store_pairs, store_some_pairs, take, zeros


class Kind(IntEnum):
    """How the values of an array lie."""

    REAL = 0
    PLANAR = 1
    INTERLEAVED = 2


_REAL, _PLANAR, _INTERLEAVED = (int(k) for k in Kind)

# The table, after what `custom_call.invoke` writes itself.
_T, _M, _F, _K, _COMPLEX, _X_KIND, _A_KIND, _H_KIND, _VARYING, _REVERSE, _VALID_ROWS, _RESET_ROWS = range(3, 15)
SIZES = 15
_MIN_COLUMNS = 16
"""Rows with fewer values XLA computes faster, as it computes many at a time."""


@njit
def _words(kind):
    return 1 if kind == _REAL else 2


@njit
def _at(base, kind, row, count, column):
    """The address of a value of a row of `count` values."""
    words = _words(kind)
    return base + 4 * (row * count * words + (2 if kind == _INTERLEAVED else 1) * column)


@njit(inline="always")
def _load(address, kind, apart, width):
    """`width` values from an address; PLANAR ones have their imaginary parts `apart` floats behind."""
    if kind == _INTERLEAVED:
        re, im = load_pairs(address) if width == WIDTH else load_some_pairs(address, width)
    else:
        re, im = take(address, width), zeros()
        if kind == _PLANAR:
            im = take(address + 4 * apart, width)
    return re, im


@njit(inline="always")
def _store(address, kind, apart, re, im, width):
    if kind == _INTERLEAVED:
        if width == WIDTH:
            store_pairs(address, re, im)
        else:
            store_some_pairs(address, re, im, width)
    else:
        put(address, re, width)
        if kind == _PLANAR:
            put(address + 4 * apart, im, width)


@njit(inline="always")
def _multiply(ar, ai, br, bi, is_complex):
    if is_complex:
        return ar * br - ai * bi, ar * bi + ai * br
    return ar * br, zeros()


@njit
def _marked(mask, rows, t, row):
    return mask[t * rows + (row if rows > 1 else 0)] != 0


@kernel
def forward(item, buffers):
    """Operands: table, a, x, h0, valid, reset. Results: h, last state, states before every K steps (PLANAR)."""
    at = words(buffers, 9)
    table = ints(at[0], SIZES)
    T, F, K, is_complex = table[_T], table[_F], table[_K], table[_COMPLEX]
    kx, ka, kh, varying = table[_X_KIND], table[_A_KIND], table[_H_KIND], table[_VARYING]
    ks = _PLANAR if is_complex else _REAL
    R = table[_M] * F
    blocks = (F + WIDTH - 1) // WIDTH
    row, first = item // blocks, item % blocks * WIDTH
    width = min(WIDTH, F - first)
    column = row * F + first
    valid, reset = flags(at[4], T * table[_VALID_ROWS]), flags(at[5], T * table[_RESET_ROWS])

    hr, hi = _load(_at(at[3], kh, 0, R, column), kh, R, width)
    ar, ai = _load(_at(at[1], ka, 0, R, column), ka, R, width)
    for i in range((T + K - 1) // K):
        k = (T + K - 1) // K - 1 - i if table[_REVERSE] else i
        steps = min(K, T - k * K)
        _store(_at(at[8], ks, k, R, column), ks, R, hr, hi, width)
        for j in range(steps):
            t = k * K + (steps - 1 - j if table[_REVERSE] else j)
            if table[_VALID_ROWS] and not _marked(valid, table[_VALID_ROWS], t, row):
                _store(_at(at[6], kh, t, R, column), kh, R, zeros(), zeros(), width)
                continue
            if table[_RESET_ROWS] and _marked(reset, table[_RESET_ROWS], t, row):
                hr, hi = zeros(), zeros()
            if varying:
                ar, ai = _load(_at(at[1], ka, t, R, column), ka, R, width)
            xr, xi = _load(_at(at[2], kx, t, R, column), kx, R, width)
            hr, hi = _multiply(ar, ai, hr, hi, is_complex)
            hr, hi = hr + xr, hi + xi
            _store(_at(at[6], kh, t, R, column), kh, R, hr, hi, width)
    _store(_at(at[7], kh, 0, R, column), kh, R, hr, hi, width)


@kernel
def adjoint(item, buffers):
    """Transpose of `forward`, without conjugation.

    Operands: table, a, x, states before every K steps, dh, cotangent of the last state, valid, reset.
    Results: da as a, dx, dh0.
    """
    at = words(buffers, 11)
    table = ints(at[0], SIZES)
    T, F, K, is_complex = table[_T], table[_F], table[_K], table[_COMPLEX]
    kx, ka, kh, varying = table[_X_KIND], table[_A_KIND], table[_H_KIND], table[_VARYING]
    ks = _PLANAR if is_complex else _REAL
    R = table[_M] * F
    blocks = (F + WIDTH - 1) // WIDTH
    row, first = item // blocks, item % blocks * WIDTH
    width = min(WIDTH, F - first)
    column = row * F + first
    valid, reset = flags(at[6], T * table[_VALID_ROWS]), flags(at[7], T * table[_RESET_ROWS])

    sr = si = zeros()
    kept = np.empty(2 * K * width, np.float32)
    states, stride, apart = kept.ctypes.data, 8 * width, width
    ar, ai = _load(_at(at[1], ka, 0, R, column), ka, R, width)
    cr, ci = _load(_at(at[5], kh, 0, R, column), kh, R, width)
    for i in range((T + K - 1) // K):
        k = i if table[_REVERSE] else (T + K - 1) // K - 1 - i
        steps = min(K, T - k * K)
        hr, hi = _load(_at(at[3], ks, k, R, column), ks, R, width)
        for j in range(steps):
            n = steps - 1 - j if table[_REVERSE] else j
            t = k * K + n
            if not table[_VALID_ROWS] or _marked(valid, table[_VALID_ROWS], t, row):
                if table[_RESET_ROWS] and _marked(reset, table[_RESET_ROWS], t, row):
                    hr, hi = zeros(), zeros()
                if varying:
                    ar, ai = _load(_at(at[1], ka, t, R, column), ka, R, width)
                xr, xi = _load(_at(at[2], kx, t, R, column), kx, R, width)
                hr, hi = _multiply(ar, ai, hr, hi, is_complex)
                hr, hi = hr + xr, hi + xi
            _store(states + n * stride, ks, apart, hr, hi, width)

        dr, di = zeros(), zeros()
        for j in range(steps):
            n = j if table[_REVERSE] else steps - 1 - j
            t = k * K + n
            if table[_VALID_ROWS] and not _marked(valid, table[_VALID_ROWS], t, row):
                _store(_at(at[9], kx, t, R, column), kx, R, zeros(), zeros(), width)
                if varying:
                    _store(_at(at[8], ka, t, R, column), ka, R, zeros(), zeros(), width)
                continue
            gr, gi = _load(_at(at[4], kh, t, R, column), kh, R, width)
            gr, gi = gr + cr, gi + ci
            _store(_at(at[9], kx, t, R, column), kx, R, gr, gi, width)
            if varying:
                ar, ai = _load(_at(at[1], ka, t, R, column), ka, R, width)
            if table[_RESET_ROWS] and _marked(reset, table[_RESET_ROWS], t, row):
                cr, ci = zeros(), zeros()
                zr, zi = zeros(), zeros()
            else:
                if j == steps - 1:
                    hr, hi = _load(_at(at[3], ks, k, R, column), ks, R, width)
                else:
                    hr, hi = _load(states + (n + 1 if table[_REVERSE] else n - 1) * stride, ks, apart, width)
                zr, zi = _multiply(gr, gi, hr, hi, is_complex)
                cr, ci = _multiply(gr, gi, ar, ai, is_complex)
            if varying:
                _store(_at(at[8], ka, t, R, column), ka, R, zr, zi, width)
            else:
                dr, di = dr + zr, di + zi
        sr, si = sr + dr, si + di
    if not varying:
        _store(_at(at[8], ka, 0, R, column), ka, R, sr, si, width)
    _store(_at(at[10], kh, 0, R, column), kh, R, cr, ci, width)
    kept[0] = 0  # numba frees an array after its last use


def fits(a, x, h0, reset, valid) -> bool:
    """Whether `scan` takes the arguments of `spyx.ops._blocked.forward`, and gains by it."""
    return (
        h0.dtype in (jnp.float32, jnp.complex64)
        and all(v.dtype in (jnp.float32, h0.dtype) for v in (a, x))
        and (a.ndim < x.ndim or a.shape == x.shape)
        and math.prod(x.shape[1:]) >= _MIN_COLUMNS * _mask_rows(reset, valid)
    )


def scan(a, x, h0, reset, valid, *, reverse: bool, steps: int):
    """`spyx.ops._blocked.forward` with blocks of `steps` steps, in one call."""
    sizes, kind, a = _scan_sizes(a, x, h0, reset, valid, reverse, steps)
    starts = (-(-x.shape[0] // steps), 1 + (kind != Kind.REAL), *h0.shape)
    results = [_like(x.shape, h0.dtype), _like(h0.shape, h0.dtype), _like(starts, jnp.float32)]
    return _invoke(forward, sizes, (a, x, h0, *_masks(reset, valid)), results)


def scan_adjoint(a, x, h0, reset, valid, before, dh, dh_last, *, reverse: bool, steps: int):
    """`spyx.ops._blocked.adjoint` with blocks of `steps` steps, in one call."""
    sizes, _, full = _scan_sizes(a, x, h0, reset, valid, reverse, steps)
    results = [_like(v.shape, v.dtype) for v in (full, x, h0)]
    operands = full, x, before, dh, dh_last, *_masks(reset, valid)
    da, dx, dh0 = _invoke(adjoint, sizes, operands, results)
    if a.ndim < x.ndim:
        da = jnp.sum(da, [k for k, n in enumerate(a.shape) if n == 1 and da.shape[k] != 1], keepdims=True)
        da = da if jnp.iscomplexobj(a) else da.real
    return da, dx, dh0


def _like(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _mask_rows(*masks) -> int:
    """How many rows of values masks tell apart."""
    return max((math.prod(m.shape[1:]) for m in masks if m is not None), default=1)


def _masks(reset, valid):
    return tuple(jnp.zeros((1,), jnp.bool_) if m is None else m for m in (valid, reset))


def _mask_sizes(reset, valid):
    return tuple(0 if m is None else _mask_rows(m) for m in (valid, reset))


def _scan_sizes(a, x, h0, reset, valid, reverse, steps):
    """Sizes, the kind of the states, and `a` in full."""
    kind = Kind.INTERLEAVED if jnp.iscomplexobj(h0) else Kind.REAL
    varying = a.ndim == x.ndim
    if not varying:
        a = jnp.broadcast_to(a.astype(h0.dtype), x.shape[1:])
    x_kind, a_kind = (kind if jnp.iscomplexobj(v) else Kind.REAL for v in (x, a))
    M = _mask_rows(reset, valid)
    F = math.prod(x.shape[1:]) // max(M, 1)
    shape = x.shape[0], M, F, steps
    kinds = kind != Kind.REAL, x_kind, a_kind, kind, varying
    return (*shape, *kinds, reverse, *_mask_sizes(reset, valid)), kind, a


def _invoke(number: int, sizes: Sequence[int], operands: Sequence[jax.Array], results: Any):
    items = sizes[1] * -(-sizes[2] // WIDTH)
    return custom_call.invoke(number, items, sizes, operands, results)
