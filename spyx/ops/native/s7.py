"""S7 for CPU, from its input to its output.

The input of the recurrence is quadratic in u = W_in x, the readout bilinear in the state s and u:
sum_h u_h (sum_k u_k B[k, h, n]) and sum_n s_n (sum_k u_k C[k, h, n]). A sum over k is a matrix product for each h or
n, whose rows are scaled and added up as they are made. A pair (h, k) is needed once: k goes from h on.

An item is some steps of one row of the batch: they stay in the nearest caches, and only the recurrence waits for that
of the steps before. Layouts: x, y (B, T, H); h (B, N).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import register_jitable

from .activations import sigmoid
from .custom_call import kernel
from .gelu import gelu
from .memory import LINE, add, clear, copy, floats, ints, wait_for, words
from .products import add_scaled, lanes_of, multiply
from .recurrence import advance
from .vectors import wide

_f = np.float32

# The table, after the kernel's number and the number of items.
_T, _B, _H, _N, _STEPS = range(2, 7)
_SIZES = 7


@register_jitable
def _padded(columns):
    lanes = lanes_of(columns)
    return (columns + lanes - 1) // lanes * lanes


def sizes(H: int, N: int) -> tuple[int, int]:
    """How many numbers the packed matrices of the two forms have."""
    return H * (H + 1) // 2 * _padded(N), N * H * _padded(H)


@kernel
def prepare(k, buffers):
    """Operands: table, matrix (H, N + H N + H N + H + N) that makes A, B [h, n], C [h, n], D and bias of u. Results:
    the matrices [k, n] of the quadratic form for one h after the other, k from h on; those [k, h] of the bilinear one
    for one n after the other. An item is a k.
    """
    at = words(buffers, 4)
    table = ints(at[0], _SIZES)
    H, N = table[_H], table[_N]
    J, matrix, lanes = 2 * N + 2 * H * N + H, at[2], lanes_of(N)
    for h in range(k + 1):
        of_k, of_h = at[1] + 4 * (k * J + N + h * N), at[1] + 4 * (h * J + N + k * N)
        for first in range(0, N, lanes):
            width = min(lanes, N - first)
            here = matrix + 4 * (first * (H - h) + (k - h) * lanes)
            copy(here, of_k + 4 * first, width)
            if h < k:
                sums, other = floats(here, width), floats(of_h + 4 * first, width)
                for q in range(width):
                    sums[q] += other[q]
            clear(here + 4 * width, lanes - width)
        matrix += 4 * (H - h) * _padded(N)
    matrix, lanes = at[3], lanes_of(H)
    given = floats(at[1] + 4 * (k * J + N + H * N), H * N)
    for n in range(N):
        for first in range(0, H, lanes):
            width = min(lanes, H - first)
            row = floats(matrix + 4 * (first * H + k * lanes), lanes)
            for q in range(width):
                row[q] = given[(first + q) * N + n]
            for q in range(width, lanes):
                row[q] = 0
        matrix += 4 * H * _padded(H)


@njit
def _quadratic(to, N, u, H, steps, w):
    """Add the quadratic form to the rows of N numbers."""
    for h in range(H):
        add_scaled(to, N, u + 4 * h, H, u + 4 * h, H, steps, w, H - h, N)
        w += 4 * (H - h) * _padded(N)


@njit
def _bilinear(to, s, N, u, H, steps, w):
    """Add the bilinear form to the rows of H numbers."""
    for n in range(N):
        add_scaled(to, H, s + 4 * n, N, u, H, steps, w + 4 * n * H * _padded(H), H, H)


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, matrix of the input, that of A, bias and D, of the quadratic form, of the bilinear
    one, of the gate, base of A, h, zeros (B, LINE). Results: y, h, and in place of the zeros what each row has done.
    """
    wide()
    at = words(buffers, 14)
    table = ints(at[0], _SIZES)
    T, B, H, N = table[_T], table[_B], table[_H], table[_N]
    number, row = item // B, item % B
    first = number * table[_STEPS]
    steps = min(table[_STEPS], T - first)
    valid = min(max(ints(at[2], row + 1)[row] - first, 0), steps)
    columns = 2 * N + H
    us, made = np.empty((steps, H), np.float32), np.empty((steps, columns), np.float32)
    sums, decays = np.empty((steps, N), np.float32), np.empty((steps, N), np.float32)
    ys, gates, zero = np.empty((steps, H), np.float32), np.empty((steps, H), np.float32), np.zeros(columns, np.float32)
    base, nothing = floats(at[8], N), zero.ctypes.data
    x, y, u = at[1] + 4 * (row * T + first) * H, at[11] + 4 * (row * T + first) * H, us.ctypes.data
    multiply(u, H, x, H, steps, at[3], H, H, nothing)
    multiply(made.ctypes.data, columns, u, H, steps, at[4], H, columns, nothing)
    for j in range(steps):
        for n in range(N):
            a = base[n] + made[j, n]
            decays[j, n] = _f(1) - _f(1) / (a * a + _f(0.5))
            sums[j, n] = made[j, N + n]
        for p in range(H):
            ys[j, p] = made[j, 2 * N + p] * us[j, p]
    _quadratic(sums.ctypes.data, N, u, H, steps, at[5])

    done, state = at[13] + 4 * LINE * row, at[12] + 4 * row * N
    wait_for(done, number)
    if number == 0:
        copy(state, at[9] + 4 * row * N, N)
    advance(sums.ctypes.data, N, state, decays.ctypes.data, N, N, valid, False)
    add(done, 1)
    clear(sums.ctypes.data + 4 * valid * N, (steps - valid) * N)

    _bilinear(ys.ctypes.data, sums.ctypes.data, N, u, H, steps, at[6])
    drives, rest = floats(gates.ctypes.data, steps * H), floats(ys.ctypes.data, steps * H)
    for i in range(steps * H):
        drives[i] = gelu(rest[i])
    multiply(y, H, gates.ctypes.data, H, steps, at[7], H, H, nothing)
    out, given = floats(y, steps * H), floats(x, steps * H)
    for i in range(steps * H):
        out[i] = given[i] + sigmoid(out[i]) * rest[i]
    us[0], made[0], sums[0], decays[0], ys[0], gates[0], zero[0] = 0, 0, 0, 0, 0, 0, 0  # as above
