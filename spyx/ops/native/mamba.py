"""The forward pass of a Mamba block for CPU, from its input to its output.

An item is some steps of one row of the batch: they stay in the nearest caches. Only the convolution waits for that of
the steps before, and the scan of each `WIDTH` channels for its own. Layouts: x, y (B, T, H); matrices are packed, with
a row of biases each; taps (K, D); A (N, D), conv_state (B, K, D), h (B, N, D).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import sigmoid, softplus
from .custom_call import kernel
from .depthwise import convolve
from .discretize import MAMBA, rate
from .memory import LINE, add, clear, copy, floats, ints, piece, wait_for, words
from .products import arranged, multiply, space
from .selective import WIDTH, advance
from .tiles import begin, end
from .vectors import wide

# The table, after what `invoke` writes itself.
_T, _B, _H, _D, _N, _K, _R, _STEPS, _NORMS = range(3, 12)
_SIZES = 12


@njit
def _normalise(row, count, epsilon):
    """Divide `count` numbers by the root of the mean of their squares."""
    values, total = floats(row, count), np.float32(0)
    for p in range(count):
        total += values[p] * values[p]
    factor = np.float32(1) / np.sqrt(total / np.float32(count) + epsilon)
    for p in range(count):
        values[p] *= factor


@njit
def _scan(us, zs, dts, made, steps, h, A, skip, table, first, width):
    """Outputs of some channels in the place of their inputs `us`; `h` is the address of their states."""
    wide()
    D, N, R = table[_D], table[_N], table[_R]
    local = np.zeros((5, WIDTH), np.float32)
    states, rates = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
    u, dt, drive, y, through = local[0], local[1], local[2], local[3], local[4]
    given = floats(skip + 4 * first, width)
    for p in range(width):
        through[p] = given[p]
    for n in range(N):
        a = floats(A + 4 * (n * D + first), width)
        for p in range(width):
            rates[n, p] = rate(MAMBA, a[p])
        copy(states.ctypes.data + 4 * n * WIDTH, h + 4 * (n * D + first), width)
    for j in range(steps):
        here, values = us + 4 * (j * D + first), floats(made + 4 * j * (R + 2 * N), R + 2 * N)
        copy(u.ctypes.data, here, width)
        copy(dt.ctypes.data, dts + 4 * (j * D + first), width)
        for p in range(WIDTH):
            dt[p] = softplus(dt[p])
        for p in range(WIDTH):
            drive[p] = dt[p] * u[p]
            y[p] = through[p] * u[p]
        advance(MAMBA, False, states, rates, dt, dt, drive, values[R : R + N], values[R + N :], y)
        copy(u.ctypes.data, zs + 4 * (j * D + first), width)
        for p in range(WIDTH):
            y[p] *= u[p] * sigmoid(u[p])
        copy(here, y.ctypes.data, width)
    for n in range(N):
        copy(h + 4 * (n * D + first), states.ctypes.data + 4 * n * WIDTH, width)
    local[0], states[0], rates[0] = 0, 0, 0  # numba frees an array after its last use


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, taps, bias of the convolution, matrices and biases: that makes u of x, z of x,
    (r, B, C) of u, dt of r, the output; A, D, epsilon of the norms, conv_state, h. Counters: what each row and
    what each of its blocks has done. Results: y, conv_state, h.
    """
    wide()
    begin()
    at = words(buffers, 24)
    table = ints(at[0], _SIZES)
    T, B, H, D, N, K, R = table[_T], table[_B], table[_H], table[_D], table[_N], table[_K], table[_R]
    number, row, blocks = item // B, item % B, (D + WIDTH - 1) // WIDTH
    first = number * table[_STEPS]
    most = min(table[_STEPS], T - first)
    steps, J = min(max(ints(at[2], row + 1)[row] - first, 0), most), R + 2 * N
    numbers = (K + 4 * most) * D + most * J + space(most, max(H, D, R))
    memory = np.empty(numbers + 8 * LINE, np.float32)
    taken, free = piece(memory.ctypes.data, (K + most) * D)
    made, free = piece(free, most * J)
    u, free = piece(free, most * D)
    z, free = piece(free, most * D)
    dt, free = piece(free, most * D)
    side = piece(free, 0)[0]
    x, y = at[1] + 4 * (row * T + first) * H, at[21] + 4 * (row * T + first) * H
    rows = arranged(side, x, H, 1, steps, H)
    multiply(taken + 4 * K * D, D, rows, steps, at[5], H, D, at[6])
    multiply(z, D, rows, steps, at[7], H, D, at[8])

    done, shared = at[20] + 4 * LINE * row * (1 + blocks), at[22] + 4 * row * K * D
    wait_for(done, number)
    copy(taken, shared if number else at[18] + 4 * row * K * D, K * D)
    copy(shared, taken + 4 * steps * D, K * D)
    add(done, 1)
    convolve(u, taken, at[3], at[4], steps, D, K)
    flat = floats(u, steps * D)
    for i in range(steps * D):
        flat[i] *= sigmoid(flat[i])
    multiply(made, J, arranged(side, u, D, 1, steps, D), steps, at[9], D, J, at[10])
    if table[_NORMS]:
        for j in range(steps):
            here = made + 4 * j * J
            for part in range(3):
                start, count = (0, R) if part == 0 else (R + (part - 1) * N, N)
                _normalise(here + 4 * start, count, floats(at[17], 1)[0])
    multiply(dt, D, arranged(side, made, J, 1, steps, R), steps, at[11], R, D, at[12])

    h = at[23] + 4 * row * N * D
    for block in range(blocks):
        wait_for(done + 4 * LINE * (1 + block), number)
        start = block * WIDTH
        width = min(WIDTH, D - start)
        if number == 0:
            for n in range(N):
                copy(h + 4 * (n * D + start), at[19] + 4 * ((row * N + n) * D + start), width)
        _scan(u, z, dt, made, steps, h, at[15], at[16], table, start, width)
        add(done + 4 * LINE * (1 + block), 1)
    multiply(y, H, arranged(side, u, D, 1, steps, D), steps, at[13], D, H, at[14])
    end()
    clear(y + 4 * steps * H, (most - steps) * H)
    memory[0] = 0  # as above
