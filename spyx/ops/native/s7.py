"""S7 for CPU but for its recurrence: what makes decays and inputs of it, and what makes outputs of its states.

An item is up to `STEPS` steps of one row. The matrices of a step are made `_BLOCK` columns at a time and used at once.
Layouts: x, u, y (B, T, H); what goes through the recurrence (T, B, N). The matrices of a step come from u by
A (H, N), B (H, H N) with columns [h, n], the bias (H, N), D (H, H), columns of one matrix; and C (H, N H) with columns
[n, h].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import sigmoid
from .custom_call import kernel
from .gelu import gelu
from .memory import floats, ints, words
from .products import add_product, multiply

STEPS = 48
"""A multiple of the rows that `multiply` takes at a time."""
_BLOCK = 128
_f = np.float32

# The table, after the kernel's number and the number of items.
_T, _B, _H, _N = range(2, 6)
_SIZES = 6


@njit
def _place(item, table):
    """(row, first step, number of steps) of an item."""
    chunks = (table[_T] + STEPS - 1) // STEPS
    start = item % chunks * STEPS
    return item // chunks, start, min(STEPS, table[_T] - start)


@kernel
def inputs(item, buffers):
    """Operands: table, x, matrix of the input, of A, B, C, D and bias, base of A. Results: u, decay, input."""
    at = words(buffers, 8)
    table = ints(at[0], _SIZES)
    T, B, H, N = table[_T], table[_B], table[_H], table[_N]
    columns = 2 * N + 2 * H * N + H
    row, start, steps = _place(item, table)
    here = 4 * (row * T + start) * H
    block = max(1, _BLOCK // N)
    none, made = np.zeros(max(block * N, H), np.float32), np.zeros((STEPS, block * N), np.float32)
    zero, base, A = none.ctypes.data, floats(at[4], N), np.zeros((STEPS, N), np.float32)
    sums = np.zeros((STEPS, N), np.float32)
    u = at[5] + here
    multiply(u, H, at[1] + here, H, steps, at[2], H, H, H, zero)
    multiply(A.ctypes.data, N, u, H, steps, at[3], columns, H, N, zero)
    multiply(sums.ctypes.data, N, u, H, steps, at[3] + 4 * (columns - N), columns, H, N, zero)
    for first in range(0, H, block):
        width = min(block, H - first)
        matrix = at[3] + 4 * (N + first * N)
        multiply(made.ctypes.data, width * N, u, H, steps, matrix, columns, H, width * N, zero)
        for j in range(steps):
            one = made.ctypes.data + 4 * j * width * N
            add_product(sums.ctypes.data + 4 * j * N, u + 4 * (j * H + first), one, width, N)
    for j in range(steps):
        there = 4 * ((start + j) * B + row) * N
        decay, drive = floats(at[6] + there, N), floats(at[7] + there, N)
        for n in range(N):
            a = base[n] + A[j, n]
            decay[n] = _f(1) - _f(1) / (a * a + _f(0.5))
            drive[n] = sums[j, n]
    none[0], made[0], A[0], sums[0] = 0, 0, 0, 0  # numba frees an array after its last use


@kernel
def outputs(item, buffers):
    """Operands: table, x, u, states, matrix of A, B, C, D and bias, that of C [n, h], of the gate. Result: y."""
    at = words(buffers, 8)
    table = ints(at[0], _SIZES)
    T, B, H, N = table[_T], table[_B], table[_H], table[_N]
    columns = 2 * N + 2 * H * N + H
    row, start, steps = _place(item, table)
    here = 4 * (row * T + start) * H
    block = max(1, _BLOCK // H)
    none, made = np.zeros(block * H, np.float32), np.zeros((STEPS, block * H), np.float32)
    zero, ys, gates = none.ctypes.data, np.zeros((STEPS, H), np.float32), np.zeros((STEPS, H), np.float32)
    u = at[2] + here
    multiply(ys.ctypes.data, H, u, H, steps, at[4] + 4 * (columns - N - H), columns, H, H, zero)
    for j in range(steps):
        us = floats(u + 4 * j * H, H)
        for p in range(H):
            ys[j, p] *= us[p]
    for first in range(0, N, block):
        width = min(block, N - first)
        multiply(made.ctypes.data, width * H, u, H, steps, at[5] + 4 * first * H, N * H, H, width * H, zero)
        for j in range(steps):
            h = at[3] + 4 * (((start + j) * B + row) * N + first)
            add_product(ys.ctypes.data + 4 * j * H, h, made.ctypes.data + 4 * j * width * H, width, H)
    for j in range(steps):
        for p in range(H):
            gates[j, p] = gelu(ys[j, p])
    y = at[7] + here
    multiply(y, H, gates.ctypes.data, H, steps, at[6], H, H, H, zero)
    for j in range(steps):
        out, x = floats(y + 4 * j * H, H), floats(at[1] + here + 4 * j * H, H)
        for p in range(H):
            out[p] = x[p] + sigmoid(out[p]) * ys[j, p]
    none[0], made[0], ys[0], gates[0] = 0, 0, 0, 0  # as above
