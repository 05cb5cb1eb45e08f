"""Matrix products of float32 for other kernels: a few rows times a matrix that lies in the nearest caches."""

from __future__ import annotations

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils

from .memory import intrinsic
from .vectors import _get, _put

ROWS, LANES = (12, 32) if binding.get_host_cpu_features().get("avx512f") else (6, 16)
"""Rows and columns at a time: their sums nearly fill the registers of the processor."""
_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_COLUMNS = ir.VectorType(_FLOAT, LANES)


def _tile(builder, most, to, to_stride, x, x_stride, rows, w, w_stride, inner, bias, count=None):
    """Up to `most` rows of a product, the first `count` or all of `LANES` columns. Strides are in numbers."""
    nothing, all_first = ir.Constant(_COLUMNS, ir.Undefined), ir.Constant(ir.VectorType(_INT, LANES), None)
    # behind the last row the last one is computed again
    last = builder.sub(rows, _WORD(1))
    which = [builder.select(builder.icmp_signed("<", _WORD(i), last), _WORD(i), last) for i in range(most)]

    def at(address, stride, index):
        return builder.add(address, builder.mul(_WORD(4), builder.mul(stride, index)))

    starts = [at(x, x_stride, row) for row in which]
    begin = _get(builder, _COLUMNS, bias, count)
    sums = [cgutils.alloca_once_value(builder, begin) for _ in which]
    with cgutils.for_range(builder, inner) as loop:
        columns = _get(builder, _COLUMNS, at(w, w_stride, loop.index), count)
        for start, total in zip(starts, sums, strict=True):
            address = builder.inttoptr(at(start, _WORD(1), loop.index), _FLOAT.as_pointer())
            one = builder.insert_element(nothing, builder.load(address, align=4), _INT(0))
            factor = builder.shuffle_vector(one, nothing, all_first)
            product = builder.fmul(factor, columns, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
    for row, total in zip(which, sums, strict=True):
        _put(builder, _COLUMNS, at(to, to_stride, row), builder.load(total), count)


def _tiles(most: int):
    """`_tile` for compiled code: `(whole, part)`, all of `LANES` columns and some of them."""

    def signature(count):
        def build(context, builder, signature, values):
            _tile(builder, most, *values)
            return values[0]

        return types.intp(*[types.intp] * count), build

    @intrinsic
    def whole(_, to, to_stride, x, x_stride, rows, w, w_stride, inner, bias):
        return signature(9)

    @intrinsic
    def part(_, to, to_stride, x, x_stride, rows, w, w_stride, inner, bias, count):
        return signature(10)

    return whole, part


_whole, _part = _tiles(ROWS)
_whole_row, _part_row = _tiles(1)


@njit
def multiply(to, to_stride, x, x_stride, rows, w, w_stride, inner, columns, bias):
    """The rows (rows, inner) at the address `x` times the matrix (inner, columns) at `w`, plus the row at `bias`.

    Strides are numbers from one row to the next. `to` and `x` do not overlap.
    """
    for first in range(0, columns, LANES):
        width, matrix, begin = min(LANES, columns - first), w + 4 * first, bias + 4 * first
        for row in range(0, rows, ROWS):
            here, there, left = to + 4 * (row * to_stride + first), x + 4 * row * x_stride, rows - row
            if width == LANES:
                _whole(here, to_stride, there, x_stride, left, matrix, w_stride, inner, begin)
            else:
                _part(here, to_stride, there, x_stride, left, matrix, w_stride, inner, begin, width)


@njit
def add_product(to, x, w, inner, columns):
    """Add the row (inner,) at the address `x` times the matrix (inner, columns) at `w` to the row at `to`."""
    for first in range(0, columns, LANES):
        width, matrix, here = min(LANES, columns - first), w + 4 * first, to + 4 * first
        if width == LANES:
            _whole_row(here, 0, x, 0, 1, matrix, columns, inner, here)
        else:
            _part_row(here, 0, x, 0, 1, matrix, columns, inner, here, width)
