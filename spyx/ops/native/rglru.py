"""The forward pass of a small RG-LRU block for CPU, from its input to its output, one row of the batch at a time.

A row goes through time in chunks of `_STEPS` steps that stay in the nearest caches, as do the matrices. Layouts:
x, y (B, T, H); matrices (inner, columns), with a row of biases each; taps (K, D); conv_state (B, K, D), h (B, D).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2_and_slope, sigmoid, softplus
from .custom_call import kernel
from .gelu import gelu
from .memory import floats, ints, words
from .products import multiply
from .vectors import WIDTH, put, take

_STEPS = 48
"""A multiple of the rows that `multiply` takes at a time."""
_f = np.float32
_TINY = np.finfo(np.float32).tiny

# The table, after the kernel's number and the number of items.
_T, _H, _D, _K = range(2, 6)
_SIZES = 6


@njit
def _convolve(to, rows, taps, bias, steps, D, K):
    """The causal convolution of (K + steps, D), K of them before the first step, per column."""
    for first in range(0, 4 * D, 4 * WIDTH):
        width = min(WIDTH, D - first // 4)
        begin = take(bias + first, width)
        for j in range(steps):
            total = begin
            for k in range(K):
                total = total + take(taps + 4 * k * D + first, width) * take(rows + 4 * (j + 1 + k) * D + first, width)
            put(to + 4 * j * D + first, total, width)


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
    bias of the convolution, a_log, c, conv_state, h. Results: y, conv_state, h.
    """
    at = words(buffers, 22)
    table = ints(at[0], _SIZES)
    T, H, D, K = table[_T], table[_H], table[_D], table[_K]
    length = min(max(ints(at[2], item + 1)[item], 0), T)
    rows = np.zeros((K + _STEPS, D), np.float32)
    us, rs = np.zeros(_STEPS * D, np.float32), np.zeros(_STEPS * D, np.float32)
    inputs, gates = np.zeros(_STEPS * D, np.float32), np.zeros(_STEPS * D, np.float32)
    h, rates = np.zeros(D, np.float32), np.zeros(_STEPS * D, np.float32)
    a_log = floats(at[15], D)
    before, h0 = floats(at[17] + 4 * item * K * D, K * D), floats(at[18] + 4 * item * D, D)
    for p in range(D):
        rate = -floats(at[16], 1)[0] * softplus(-a_log[p]) * LOG2_E
        for j in range(_STEPS):
            rates[j * D + p] = rate
        h[p] = h0[p]
    for k in range(K):
        for p in range(D):
            rows[k, p] = before[k * D + p]

    for start in range(0, length, _STEPS):
        steps = min(_STEPS, length - start)
        x, y = at[1] + 4 * (item * T + start) * H, at[19] + 4 * (item * T + start) * H
        multiply(rows.ctypes.data + 4 * K * D, D, x, H, steps, at[5], D, H, D, at[6])
        multiply(gates.ctypes.data, D, x, H, steps, at[3], D, H, D, at[4])
        _convolve(us.ctypes.data, rows.ctypes.data, at[13], at[14], steps, D, K)
        multiply(rs.ctypes.data, D, us.ctypes.data, D, steps, at[7], D, D, D, at[8])
        multiply(inputs.ctypes.data, D, us.ctypes.data, D, steps, at[9], D, D, D, at[10])
        for i in range(steps * D):
            log2_a = rates[i] * sigmoid(rs[i])
            decay, slope = exp2_and_slope(log2_a)
            rest = -log2_a * slope if log2_a > _f(-0.5) else _f(1) - decay
            scale = np.sqrt(max(rest * (_f(1) + decay), _TINY))
            us[i] *= scale * sigmoid(inputs[i])
            rs[i] = decay
        _recur(us.ctypes.data, rs.ctypes.data, h.ctypes.data, steps, D)
        for i in range(steps * D):
            gates[i] = gelu(gates[i]) * us[i]
        multiply(y, H, gates.ctypes.data, D, steps, at[11], H, D, H, at[12])
        for k in range(K):
            for p in range(D):
                rows[k, p] = rows[steps + k, p]

    rest = floats(at[19] + 4 * (item * T + length) * H, (T - length) * H)
    rest[:] = 0
    after, last = floats(at[20] + 4 * item * K * D, K * D), floats(at[21] + 4 * item * D, D)
    for k in range(K):
        for p in range(D):
            after[k * D + p] = rows[k, p]
    for p in range(D):
        last[p] = h[p]
    us[0], rs[0], inputs[0], gates[0], rows[0] = 0, 0, 0, 0, 0  # numba frees an array after its last use
