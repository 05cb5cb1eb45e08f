"""S7 for CPU, from its input to its output.

The input of the recurrence is quadratic in u = W_in x, the readout bilinear in the state s and u:
sum_hk u_h u_k B[k, h, n] and sum_nk s_n u_k C[k, h, n]. The matrices of a step, sums over k, are made `_MOST` columns
or a few more at a time and used at once. A pair (h, k) is needed once: h goes through groups of `_GROUP`, k from the
group of h on.

An item is some steps of one row of the batch: they stay in the nearest caches, and only the recurrence waits for that
of the steps before. Layouts: x, y (B, T, H); h (B, N); u has G columns, H up to a multiple of `_GROUP`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import sigmoid
from .custom_call import kernel
from .gelu import gelu
from .memory import LINE, add, clear, copy, floats, ints, wait_for, words
from .products import LANES, add_row, multiply
from .recurrence import advance
from .vectors import wide

_GROUP = 16
_MOST = 256
_f = np.float32

# The table, after the kernel's number and the number of items.
_T, _B, _H, _N, _STEPS = range(2, 7)
_SIZES = 7


@njit
def _up(n, unit):
    return (n + unit - 1) // unit * unit


def padded(H: int) -> int:
    """G."""
    return -(-H // _GROUP) * _GROUP


def sizes(H: int, N: int) -> tuple[int, int]:
    """How many numbers the packed matrices of the two forms have."""
    G = padded(H)
    return sum(range(_GROUP, G + 1, _GROUP)) * -(-_GROUP * N // LANES) * LANES, H * -(-N * H // LANES) * LANES


@kernel
def prepare(k, buffers):
    """Operands: table, matrix (H, N + H N + H N + H + N) that makes A, B [h, n], C [h, n], D and bias of u. Results:
    the matrices of the quadratic form, of one group after the other, columns [h, n], and that of the bilinear one,
    columns [n, h], all packed. An item is a k.
    """
    at = words(buffers, 4)
    table = ints(at[0], _SIZES)
    H, N = table[_H], table[_N]
    G, J = _up(H, _GROUP), 2 * N + 2 * H * N + H
    columns, matrix = _GROUP * N, at[2]
    sums = np.empty(columns, np.float32)
    for begin in range(0, k + 1, _GROUP):
        used = (min(begin + _GROUP, H) - begin) * N if k < H else 0
        copy(sums.ctypes.data, at[1] + 4 * (min(k, H - 1) * J + N + begin * N), used)
        clear(sums.ctypes.data + 4 * used, columns - used)
        if begin + _GROUP <= k < H:
            for i in range(_GROUP):
                other = floats(at[1] + 4 * ((begin + i) * J + N + k * N), N)
                for n in range(N):
                    sums[i * N + n] += other[n]
        depth = G - begin
        for first in range(0, columns, LANES):
            here, width = matrix + 4 * (first * depth + (k - begin) * LANES), min(LANES, columns - first)
            copy(here, sums.ctypes.data + 4 * first, width)
            clear(here + 4 * width, LANES - width)
        matrix += 4 * depth * _up(columns, LANES)
    sums[0] = 0  # numba frees an array after its last use
    if k < H:
        given = floats(at[1] + 4 * (k * J + N + H * N), H * N)
        for n in range(N):
            for h in range(H):
                column = n * H + h
                out = floats(at[3] + 4 * ((column - column % LANES) * H + k * LANES + column % LANES), 1)
                out[0] = given[h * N + n]


@njit
def _quadratic(to, N, u, G, steps, w):
    """Add the quadratic form to the rows of N numbers."""
    columns = _GROUP * N
    made, zero = np.empty((steps, columns), np.float32), np.zeros(columns, np.float32)
    for begin in range(0, G, _GROUP):
        depth = G - begin
        multiply(made.ctypes.data, columns, u + 4 * begin, G, steps, w, depth, columns, zero.ctypes.data)
        for j in range(steps):
            add_row(to + 4 * j * N, u + 4 * (j * G + begin), made.ctypes.data + 4 * j * columns, _GROUP, N)
        w += 4 * depth * _up(columns, LANES)
    made[0], zero[0] = 0, 0  # as above


@njit
def _bilinear(to, s, N, u, G, H, steps, w):
    """Add the bilinear form to the rows of H numbers."""
    # whole panels
    block = max(1, _MOST // H)
    while block * H % LANES and block < N:
        block += 1
    made, zero = np.empty((steps, block * H), np.float32), np.zeros(block * H, np.float32)
    for n in range(0, N, block):
        count = min(block, N - n)
        columns = count * H
        multiply(made.ctypes.data, columns, u, G, steps, w + 4 * n * H * H, H, columns, zero.ctypes.data)
        for j in range(steps):
            add_row(to + 4 * j * H, s + 4 * (j * N + n), made.ctypes.data + 4 * j * columns, count, H)
    made[0], zero[0] = 0, 0  # as above


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
    G, columns = _up(H, _GROUP), 2 * N + H
    us, made = np.zeros((steps, G), np.float32), np.empty((steps, columns), np.float32)
    sums, decays = np.empty((steps, N), np.float32), np.empty((steps, N), np.float32)
    ys, gates, zero = np.empty((steps, H), np.float32), np.empty((steps, H), np.float32), np.zeros(columns, np.float32)
    base, nothing = floats(at[8], N), zero.ctypes.data
    x, y, u = at[1] + 4 * (row * T + first) * H, at[11] + 4 * (row * T + first) * H, us.ctypes.data
    multiply(u, G, x, H, steps, at[3], H, H, nothing)
    multiply(made.ctypes.data, columns, u, G, steps, at[4], H, columns, nothing)
    for j in range(steps):
        for n in range(N):
            a = base[n] + made[j, n]
            decays[j, n] = _f(1) - _f(1) / (a * a + _f(0.5))
            sums[j, n] = made[j, N + n]
        for p in range(H):
            ys[j, p] = made[j, 2 * N + p] * us[j, p]
    _quadratic(sums.ctypes.data, N, u, G, steps, at[5])

    done, state = at[13] + 4 * LINE * row, at[12] + 4 * row * N
    wait_for(done, number)
    if number == 0:
        copy(state, at[9] + 4 * row * N, N)
    advance(sums.ctypes.data, N, state, decays.ctypes.data, N, N, valid, False)
    add(done, 1)
    clear(sums.ctypes.data + 4 * valid * N, (steps - valid) * N)

    _bilinear(ys.ctypes.data, sums.ctypes.data, N, u, G, H, steps, at[6])
    drives, rest = floats(gates.ctypes.data, steps * H), floats(ys.ctypes.data, steps * H)
    for i in range(steps * H):
        drives[i] = gelu(rest[i])
    multiply(y, H, gates.ctypes.data, H, steps, at[7], H, H, nothing)
    out, given = floats(y, steps * H), floats(x, steps * H)
    for i in range(steps * H):
        out[i] = given[i] + sigmoid(out[i]) * rest[i]
    us[0], made[0], sums[0], decays[0], ys[0], gates[0], zero[0] = 0, 0, 0, 0, 0, 0, 0  # as above
