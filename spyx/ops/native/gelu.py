"""The Gaussian error linear unit in float32 without branches or calls, which LLVM vectorises."""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2_and_slope

_f = np.float32
_TAIL_SCALE = _f(0.3)
_TAIL = tuple(
    _f(c)
    for c in (
        0.11962932, 0.120753627, 0.0999156169, 0.128554337, -0.0536692435, 0.206337078, -0.157193033, 0.0356722234
    )
)  # fmt: skip
"""erfc(x / sqrt(2)) / 2 = exp(-x^2 / 2) (c1 t + ... + c8 t^8), t = 1 / (1 + 0.3 x), to 2e-7 for x >= 0: our fit."""


@njit(inline="always")
def gelu(x):
    """x times the normal distribution function of x."""
    size = abs(x)
    t = _f(1) / (_f(1) + _TAIL_SCALE * size)
    p = _TAIL[7] * t + _TAIL[6]
    p = p * t + _TAIL[5]
    p = p * t + _TAIL[4]
    p = p * t + _TAIL[3]
    p = p * t + _TAIL[2]
    p = p * t + _TAIL[1]
    p = p * t + _TAIL[0]
    tail = exp2_and_slope(size * size * (_f(-0.5) * LOG2_E))[0] * p * t
    return x * (_f(1) - tail if x > _f(0) else tail)
