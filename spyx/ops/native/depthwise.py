"""The causal depthwise convolution of a few rows, for other kernels."""

from __future__ import annotations

from numba import njit

from .vectors import WIDTH, put, take


@njit
def convolve(to, rows, taps, bias, steps, D, K):
    """The convolution of (K + steps, D) numbers, K rows of them before the first step, by taps (K, D), plus a bias."""
    for first in range(0, 4 * D, 4 * WIDTH):
        width = min(WIDTH, D - first // 4)
        if K == 4:
            _by_four(to + first, rows + first, taps + first, bias + first, steps, 4 * D, width)
        else:
            _by_any(to + first, rows + first, taps + first, bias + first, steps, 4 * D, K, width)


@njit
def _by_any(to, rows, taps, bias, steps, stride, K, width):
    begin = take(bias, width)
    for j in range(steps):
        total = begin
        for k in range(K):
            total = total + take(taps + k * stride, width) * take(rows + (j + 1 + k) * stride, width)
        put(to + j * stride, total, width)


@njit
def _by_four(to, rows, taps, bias, steps, stride, width):
    """The usual four taps stay in registers, as do the last rows."""
    begin = take(bias, width)
    a, b = take(taps, width), take(taps + stride, width)
    c, d = take(taps + 2 * stride, width), take(taps + 3 * stride, width)
    x, y, z = take(rows + stride, width), take(rows + 2 * stride, width), take(rows + 3 * stride, width)
    for j in range(steps):
        last = take(rows + (j + 4) * stride, width)
        put(to + j * stride, begin + a * x + b * y + c * z + d * last, width)
        x, y, z = y, z, last
