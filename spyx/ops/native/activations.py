"""Elementary functions in float32 without branches or calls, which LLVM vectorises. Errors are below 3e-7, relative.

NaN comes out as NaN. `exp2_and_slope` saturates outside [-125.5, 127.9], where the others follow it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types

from .memory import intrinsic

_f = np.float32
LOG2_E = _f(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)
"""Their sum is log(2); whole multiples of the first are exact."""
_ROUND = _f(1.5 * 2**23)
"""Added and taken away again, it rounds to an integer, which its sum holds in the lowest bits."""
_P1, _P2, _P3, _P4, _P5, _P6 = (
    _f(c) for c in (0.69314718, 0.24022648, 0.05550332, 0.009618437, 0.0013398875, 0.0001535336)
)
"""2^x = 1 + P1 x + ... + P6 x^6 on [-1/2, 1/2] with relative error 2e-9, a minimax fit; without the 1 4e-8."""


@intrinsic
def _bits(_, x):
    def build(context, builder, signature, values):
        return builder.bitcast(values[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def _from_bits(_, x):
    def build(context, builder, signature, values):
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), build


@njit(inline="always")
def _slope(rest):
    """(2^rest - 1) / rest."""
    p = _P6 * rest + _P5
    p = p * rest + _P4
    p = p * rest + _P3
    p = p * rest + _P2
    return p * rest + _P1


@njit(inline="always")
def _scaled(rest, slope, shifted):
    """2^rest times 2 to the power of the integer in `shifted`."""
    return _from_bits(_bits(slope * rest + _f(1)) + (_bits(shifted) << np.int32(23)))


@njit(inline="always")
def exp2_and_slope(x):
    """2 to the power of x, and (2^x - 1) / x where |x| <= 1/2."""
    x = _f(-125.5) if x < _f(-125.5) else x
    x = _f(127.9) if x > _f(127.9) else x
    shifted = x + _ROUND
    rest = x - (shifted - _ROUND)
    slope = _slope(rest)
    return _scaled(rest, slope, shifted), slope


@njit(inline="always")
def _exp_of_negative(x):
    """exp(x) for x <= 0: as 2^(x log2(e)), without the error of that product."""
    x = _f(-87) if x < _f(-87) else x
    shifted = x * LOG2_E + _ROUND
    whole = shifted - _ROUND
    rest = ((x - whole * _LN2_HIGH) - whole * _LN2_LOW) * LOG2_E
    return _scaled(rest, _slope(rest), shifted)


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    e = _exp_of_negative(-abs(x))
    return (_f(1) if x > _f(0) else e) / (_f(1) + e)


@njit(inline="always")
def softplus(x):
    """log(1 + exp(x)), as max(x, 0) + log1p(e) with e = exp(-|x|): 2 atanh(e / (2 + e)) by its series."""
    e = _exp_of_negative(-abs(x))
    s = e / (_f(2) + e)
    q = s * s
    series = _f(1 / 15)
    series = series * q + _f(1 / 13)
    series = series * q + _f(1 / 11)
    series = series * q + _f(1 / 9)
    series = series * q + _f(1 / 7)
    series = series * q + _f(1 / 5)
    series = series * q + _f(1 / 3)
    series = series * q + _f(1)
    return (x if x > _f(0) else x * _f(0)) + _f(2) * s * series
