"""The discretizations of `spyx.ops.selective_scan`, element by element, without branches or calls, in float32.

With a step size s, A_bar(s, A) and gamma(s, A) = `common(s)` times the rest both follow from one number, the key:
exp(s A), for "bilinear" 1 / (1 - s A / 2). `kind` is the position in `KINDS`, a constant of the kernel: the
compiler keeps one of the cases. Value and slopes are right for A -> 0 and s -> 0.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2_and_slope

KINDS = ("mamba", "zoh", "bilinear", "dirac")
MAMBA, ZOH, BILINEAR, DIRAC = range(4)
_f = np.float32
_S1, _S2, _S3, _S4, _S5, _S6, _S7, _S8, _S9 = (_f(k / math.factorial(k + 1)) for k in range(1, 10))
"""The Taylor series of the derivative of (exp(z) - 1) / z."""


@njit(inline="always")
def common(kind, step):
    """The factor of gamma that does not depend on A: the step size, or 1."""
    return step if kind in (MAMBA, BILINEAR) else _f(1)


@njit(inline="always")
def rate(kind, A):
    """What `respond` and `decay` take in place of A: for a power of e that of 2."""
    return A if kind == BILINEAR else A * LOG2_E


@njit(inline="always")
def respond(kind, step, rate):
    """`(key, rest)` of a step size."""
    x = step * rate
    if kind == BILINEAR:
        key = _f(1) / (_f(1) - _f(0.5) * x)
        rest = key
    else:
        key, slope = exp2_and_slope(x)
        rest = _f(1)
        if kind == ZOH:
            rest = step * LOG2_E * slope if abs(x) <= _f(0.5) else (key - _f(1)) * LOG2_E / rate
    return key, rest


@njit(inline="always")
def decay(kind, key, step, rate):
    """A_bar."""
    return (_f(1) + _f(0.5) * step * rate) * key if kind == BILINEAR else key


@njit(inline="always")
def decay_slope(kind, key, g, kept):
    """g times the derivative of A_bar with respect to the product of step size and A; `kept` is g A_bar."""
    return g * key * key if kind == BILINEAR else kept


@njit(inline="always")
def gain_slopes(kind, key, step, A):
    """`(rest, slope, slope_A)`: the derivatives of gamma with respect to the step size and to A."""
    rest, slope, slope_A = _f(1), _f(1), _f(0)
    if kind == BILINEAR:
        half = step * key
        rest, slope, slope_A = key, key * key, _f(0.5) * half * half
    elif kind == ZOH:
        z, inverse = step * A, _f(1) / A
        series = _S9 * z + _S8
        series = series * z + _S7
        series = series * z + _S6
        series = series * z + _S5
        series = series * z + _S4
        series = series * z + _S3
        series = series * z + _S2
        series = (series * z + _S1) * step * step
        near = abs(z) < _f(0.5)
        rest = step * key - A * series if near else (key - _f(1)) * inverse
        slope, slope_A = key, series if near else (step * key - rest) * inverse
    elif kind == DIRAC:
        slope = _f(0)
    return rest, slope, slope_A
