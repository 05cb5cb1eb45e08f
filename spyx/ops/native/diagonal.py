"""The forward pass of a small diagonal state-space layer for CPU, one row of the batch at a time.

h_t = A_t h_{t-1} + g B x_t, y_t = Re(C h_t) + D x_t, or twice the real part. A row goes through time in chunks that
stay in the nearest caches. Layouts: x, y (B, T, H); A (P) or (T, B, P), g (P), B (P, H), C (H, P), h (B, P), complex.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from .custom_call import kernel
from .memory import floats, intrinsic, ints, words
from .products import multiply
from .vectors import _get, _indices, _put

_STEPS = 48
"""A multiple of the rows that `multiply` takes at a time."""

_LANES = 16
_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)
_REALS, _PAIRS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_FLOAT, 2 * _LANES)
_EVEN, _ODD = _indices(range(0, 2 * _LANES, 2)), _indices(range(1, 2 * _LANES, 2))

# The table, after the kernel's number and the number of items.
_T, _B, _H, _P, _VARYING, _TWICE = range(2, 8)
_SIZES = 8


def _recurrence(builder, drive, state, A, A_stride, P, steps, count):
    """Up to `_LANES` states h = A h + x through some steps, in place of the x.

    Addresses: `drive` of the real parts x, each row followed P numbers later by the imaginary ones, `state` likewise of
    one row, `A` of pairs, `A_stride` numbers from one step to the next.
    """

    def at(address, index):
        return builder.add(address, builder.mul(_WORD(4), index))

    twice = builder.mul(count, _WORD(2))
    states = [cgutils.alloca_once_value(builder, _get(builder, _REALS, s, count)) for s in (state, at(state, P))]
    with cgutils.for_range(builder, steps) as loop:
        pairs = _get(builder, _PAIRS, at(A, builder.mul(loop.index, A_stride)), twice)
        a, b = (builder.shuffle_vector(pairs, pairs, which) for which in (_EVEN, _ODD))
        row = at(drive, builder.mul(loop.index, builder.mul(P, _WORD(2))))
        places = row, at(row, P)
        re, im = (builder.load(s) for s in states)

        def fused(x, y, z):
            return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))

        given = [_get(builder, _REALS, place, count) for place in places]
        after = fused(a, re, fused(builder.fneg(b), im, given[0])), fused(a, im, fused(b, re, given[1]))
        for value, place, s in zip(after, places, states, strict=True):
            _put(builder, _REALS, place, value, count)
            builder.store(value, s)
    for s, place in zip(states, (state, at(state, P)), strict=True):
        _put(builder, _REALS, place, builder.load(s), count)


@intrinsic
def _advance(_, drive, state, A, A_stride, P, steps, count):
    def build(context, builder, signature, values):
        _recurrence(builder, *values)
        return values[0]

    return types.intp(*[types.intp] * 7), build


@njit
def _advance_all(drive, state, A, A_stride, P, steps):
    """As `_recurrence`, of all P states."""
    for p in range(0, P, _LANES):
        _advance(drive + 4 * p, state + 4 * p, A + 8 * p, A_stride, P, steps, min(_LANES, P - p))


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, A, g, B, C, D, h. Results: y, h."""
    at = words(buffers, 11)
    table = ints(at[0], _SIZES)
    T, B, H, P = table[_T], table[_B], table[_H], table[_P]
    length = min(max(ints(at[2], item + 1)[item], 0), T)
    states, state = np.zeros((_STEPS, 2 * P), np.float32), np.zeros(2 * P, np.float32)
    zero = np.zeros(max(2 * P, H), np.float32)
    before, after, D = floats(at[8] + 8 * item * P, 2 * P), floats(at[10] + 8 * item * P, 2 * P), floats(at[7], H)
    into, out_of = np.zeros((H, 2 * P), np.float32), np.zeros((2 * P, H), np.float32)
    g, to_state, from_state = floats(at[4], 2 * P), floats(at[5], 2 * P * H), floats(at[6], 2 * H * P)
    factor = np.float32(2 if table[_TWICE] else 1)
    for p in range(P):
        state[p], state[P + p] = before[2 * p], before[2 * p + 1]
        for k in range(H):
            r, i = to_state[2 * (p * H + k)], to_state[2 * (p * H + k) + 1]
            into[k, p] = g[2 * p] * r - g[2 * p + 1] * i
            into[k, P + p] = g[2 * p] * i + g[2 * p + 1] * r
            out_of[p, k] = factor * from_state[2 * (k * P + p)]
            out_of[P + p, k] = -factor * from_state[2 * (k * P + p) + 1]

    for start in range(0, length, _STEPS):
        steps = min(_STEPS, length - start)
        x, y = at[1] + 4 * (item * T + start) * H, at[9] + 4 * (item * T + start) * H
        multiply(states.ctypes.data, 2 * P, x, H, steps, into.ctypes.data, 2 * P, H, 2 * P, zero.ctypes.data)
        A = at[3] + (8 * (start * B + item) * P if table[_VARYING] else 0)
        _advance_all(states.ctypes.data, state.ctypes.data, A, 2 * B * P if table[_VARYING] else 0, P, steps)
        multiply(y, H, states.ctypes.data, 2 * P, steps, out_of.ctypes.data, H, 2 * P, H, zero.ctypes.data)
        for j in range(steps):
            out, given = floats(y + 4 * j * H, H), floats(x + 4 * j * H, H)
            for p in range(H):
                out[p] += D[p] * given[p]

    floats(at[9] + 4 * (item * T + length) * H, (T - length) * H)[:] = 0
    for p in range(P):
        after[2 * p], after[2 * p + 1] = state[p], state[P + p]
    states[0], zero[0], into[0], out_of[0] = 0, 0, 0, 0  # numba frees an array after its last use
