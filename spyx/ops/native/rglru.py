"""The forward pass of an RG-LRU block for CPU, from its input to its output.

An item is some steps of one row of the batch: they stay in the nearest caches, and only the convolution and the
recurrence wait for those of the steps before. Layouts: x, y (B, T, H); matrices are packed, with a row of biases each;
taps (K, D); conv_state (B, K, D), h (B, D).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2_and_slope, sigmoid, softplus
from .custom_call import kernel
from .depthwise import convolve
from .gelu import gelu
from .memory import LINE, add, clear, copy, floats, ints, piece, wait_for, words
from .products import arranged, multiply, space
from .tiles import begin, end
from .vectors import WIDTH, put, take, wide

_f = np.float32
_TINY = np.finfo(np.float32).tiny

# The table, after what `invoke` writes itself.
_T, _B, _H, _D, _K, _STEPS = range(3, 9)
_SIZES = 9


@njit
def _recur(to, decays, h, steps, D):
    """h = a h + x through the steps, per column: in place of the x at `to`, and of the h before it."""
    for first in range(0, 4 * D, 4 * WIDTH):
        width = min(WIDTH, D - first // 4)
        state = take(h + first, width)
        for j in range(first, first + 4 * steps * D, 4 * D):
            state = take(decays + j, width) * state + take(to + j, width)
            put(to + j, state, width)
        put(h + first, state, width)


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, matrices and biases of gate, input, recurrent gate, input gate and output, taps,
    bias of the convolution, a_log, c, conv_state, h. Counters: what each row has done. Results: y, conv_state, h.
    """
    wide()
    begin()
    at = words(buffers, 23)
    table = ints(at[0], _SIZES)
    T, B, H, D, K = table[_T], table[_B], table[_H], table[_D], table[_K]
    number, row = item // B, item % B
    first = number * table[_STEPS]
    most = min(table[_STEPS], T - first)
    steps = min(max(ints(at[2], row + 1)[row] - first, 0), most)
    size = steps * D
    memory = np.empty(6 * size + K * D + space(steps, max(H, D)) + 8 * LINE, np.float32)
    taken, free = piece(memory.ctypes.data, K * D + size)
    u, free = piece(free, size)
    r, free = piece(free, size)
    i, free = piece(free, size)
    gate, free = piece(free, size)
    rate, free = piece(free, size)
    side = piece(free, 0)[0]
    us, rs, inputs, gates = floats(u, size), floats(r, size), floats(i, size), floats(gate, size)
    rates, a_log = floats(rate, size), floats(at[15], D)
    x, y = at[1] + 4 * (row * T + first) * H, at[20] + 4 * (row * T + first) * H
    rows = arranged(side, x, H, 1, steps, H)
    multiply(taken + 4 * K * D, D, rows, steps, at[5], H, D, at[6])
    multiply(gate, D, rows, steps, at[3], H, D, at[4])
    for p in range(D if steps else 0):
        rates[p] = -floats(at[16], 1)[0] * softplus(-a_log[p]) * LOG2_E
    for j in range(1, steps):
        copy(rate + 4 * j * D, rate, D)

    done, shared = at[19] + 4 * LINE * row, at[21] + 4 * row * K * D
    wait_for(done, number)
    copy(taken, shared if number else at[17] + 4 * row * K * D, K * D)
    copy(shared, taken + 4 * steps * D, K * D)
    add(done, 1)
    convolve(u, taken, at[13], at[14], steps, D, K)
    rows = arranged(side, u, D, 1, steps, D)
    multiply(r, D, rows, steps, at[7], D, D, at[8])
    multiply(i, D, rows, steps, at[9], D, D, at[10])
    # loops of one thing each: the processor overlaps more of their rounds
    for p in range(size):
        rs[p] = rates[p] * sigmoid(rs[p])
    for p in range(size):
        us[p] *= sigmoid(inputs[p])
    for p in range(size):
        decay, slope = exp2_and_slope(rs[p])
        rest = -rs[p] * slope if rs[p] > _f(-0.5) else _f(1) - decay
        us[p] *= np.sqrt(max(rest * (_f(1) + decay), _TINY))
        rs[p] = decay

    h = at[22] + 4 * row * D
    wait_for(done + 8, number)
    if number == 0:
        copy(h, at[18] + 4 * row * D, D)
    _recur(u, r, h, steps, D)
    add(done + 8, 1)
    for p in range(size):
        gates[p] = gelu(gates[p]) * us[p]
    multiply(y, H, arranged(side, gate, D, 1, steps, D), steps, at[11], D, H, at[12])
    end()
    clear(y + 4 * steps * H, (most - steps) * H)
    memory[0] = 0  # numba frees an array after its last use
