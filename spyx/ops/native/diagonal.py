"""The forward pass of a small diagonal state-space layer for CPU, one row of the batch at a time.

h_t = A_t h_{t-1} + g B x_t, y_t = Re(C h_t) + D x_t, or twice the real part. A row goes through time in chunks that
stay in the nearest caches. Layouts: x, y (B, T, H); A (P) or (T, B, P), g (P), B (P, H), C (H, P), h (B, P), complex.
"""

from __future__ import annotations

import numpy as np

from .custom_call import kernel
from .memory import floats, ints, words
from .products import multiply

_STEPS = 48
"""A multiple of the rows that `multiply` takes at a time."""

# The table, after the kernel's number and the number of items.
_T, _B, _H, _P, _VARYING, _TWICE = range(2, 8)
_SIZES = 8


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, A, g, B, C, D, h. Results: y, h."""
    at = words(buffers, 11)
    table = ints(at[0], _SIZES)
    T, B, H, P = table[_T], table[_B], table[_H], table[_P]
    length = min(max(ints(at[2], item + 1)[item], 0), T)
    drive, states = np.zeros((_STEPS, 2 * P), np.float32), np.zeros((_STEPS, 2 * P), np.float32)
    re, im, zero = np.zeros(P, np.float32), np.zeros(P, np.float32), np.zeros(max(2 * P, H), np.float32)
    before, after, D = floats(at[8] + 8 * item * P, 2 * P), floats(at[10] + 8 * item * P, 2 * P), floats(at[7], H)
    into, out_of = np.zeros((H, 2 * P), np.float32), np.zeros((2 * P, H), np.float32)
    g, to_state, from_state = floats(at[4], 2 * P), floats(at[5], 2 * P * H), floats(at[6], 2 * H * P)
    factor = np.float32(2 if table[_TWICE] else 1)
    for p in range(P):
        re[p], im[p] = before[2 * p], before[2 * p + 1]
        for k in range(H):
            r, i = to_state[2 * (p * H + k)], to_state[2 * (p * H + k) + 1]
            into[k, p] = g[2 * p] * r - g[2 * p + 1] * i
            into[k, P + p] = g[2 * p] * i + g[2 * p + 1] * r
            out_of[p, k] = factor * from_state[2 * (k * P + p)]
            out_of[P + p, k] = -factor * from_state[2 * (k * P + p) + 1]

    for start in range(0, length, _STEPS):
        steps = min(_STEPS, length - start)
        x, y = at[1] + 4 * (item * T + start) * H, at[9] + 4 * (item * T + start) * H
        multiply(drive.ctypes.data, 2 * P, x, H, steps, into.ctypes.data, 2 * P, H, 2 * P, zero.ctypes.data)
        for j in range(steps):
            A = floats(at[3] + (8 * ((start + j) * B + item) * P if table[_VARYING] else 0), 2 * P)
            for p in range(P):
                a, b, r, i = A[2 * p], A[2 * p + 1], re[p], im[p]
                re[p] = a * r - b * i + drive[j, p]
                im[p] = a * i + b * r + drive[j, P + p]
                states[j, p], states[j, P + p] = re[p], im[p]
        multiply(y, H, states.ctypes.data, 2 * P, steps, out_of.ctypes.data, H, 2 * P, H, zero.ctypes.data)
        for j in range(steps):
            out, given = floats(y + 4 * j * H, H), floats(x + 4 * j * H, H)
            for p in range(H):
                out[p] += D[p] * given[p]

    floats(at[9] + 4 * (item * T + length) * H, (T - length) * H)[:] = 0
    for p in range(P):
        after[2 * p], after[2 * p + 1] = re[p], im[p]
    drive[0], states[0], zero[0], into[0], out_of[0] = 0, 0, 0, 0, 0  # numba frees an array after its last use
