"""Matrix products of float32 for other kernels: a few rows times a matrix that lies in the nearest caches.

A packed matrix (inner, columns) lies in panels of `LANES` columns, one after the other: (panels, inner, LANES), with 0
behind the last column. What a loop reads is then side by side, whatever the matrix's size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import register_jitable

from .custom_call import invoke, kernel
from .memory import clear, copy, floats, intrinsic, ints, words
from .vectors import _get, _put

ROWS, LANES = (12, 32) if binding.get_host_cpu_features().get("avx512f") else (6, 16)
"""Rows and columns at a time: their sums nearly fill the registers of the processor."""
_n = np.intp
"""Of numbers of one type alone a function is compiled once."""
_BLOCK = 16
"""Numbers of a row that are turned at a time."""
_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _tile(
    builder, most, lanes, scaled,
    to, to_stride, x, x_stride, x_step, rows, w, w_stride, inner, start, start_stride, count,
):  # fmt: skip
    """Up to `most` rows of a product, the first `count` of `lanes` columns, plus the rows at `start`; or, `scaled`,
    each row times the number at `start`, added to what is there.

    Strides are numbers from one row to the next, `x_step` those from one of the `inner` to the next.
    """
    kind, all_first = ir.VectorType(_FLOAT, lanes), ir.Constant(ir.VectorType(_INT, lanes), None)
    nothing = ir.Constant(kind, ir.Undefined)
    # behind the last row the last one is computed again
    last = builder.sub(rows, _WORD(1))
    which = [builder.select(builder.icmp_signed("<", _WORD(i), last), _WORD(i), last) for i in range(most)]

    def at(address, stride, index):
        return builder.add(address, builder.mul(_WORD(4), builder.mul(stride, index)))

    def spread(address):
        one = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4)
        return builder.shuffle_vector(builder.insert_element(nothing, one, _INT(0)), nothing, all_first)

    def fused(a, b, c):
        return builder.fadd(c, builder.fmul(a, b, flags=("contract",)), flags=("contract",))

    given = [at(x, x_stride, row) for row in which]
    starts, places = [at(start, start_stride, row) for row in which], [at(to, to_stride, row) for row in which]
    begin = [ir.Constant(kind, None) if scaled else _get(builder, kind, address, count) for address in starts]
    sums = [cgutils.alloca_once_value(builder, value) for value in begin]
    with cgutils.for_range(builder, inner) as loop:
        columns = _get(builder, kind, at(w, w_stride, loop.index), None)
        for row, total in zip(given, sums, strict=True):
            builder.store(fused(spread(at(row, x_step, loop.index)), columns, builder.load(total)), total)
    results = [builder.load(total) for total in sums]
    if scaled:
        results = [
            fused(spread(scale), result, _get(builder, kind, place, count))
            for scale, result, place in zip(starts, results, places, strict=True)
        ]
    for place, result in zip(places, results, strict=True):
        _put(builder, kind, place, result, count)


def _product(most: int, lanes: int, scaled: bool = False):
    """`_tile` for compiled code."""
    name, kind = f"spyx_tile_{most}_{lanes}{'_scaled' if scaled else ''}", ir.FunctionType(ir.VoidType(), [_WORD] * 12)

    def function(module):
        """One for a module: it would take long to compile at every place it is called from."""
        if name not in module.globals:
            made = ir.Function(module, kind, name)
            made.linkage = "linkonce_odr"
            made.attributes.add("noinline")
            builder = ir.IRBuilder(made.append_basic_block())
            _tile(builder, most, lanes, scaled, *made.args)
            builder.ret_void()
        return module.globals[name]

    @intrinsic
    def call(_, to, to_stride, x, x_stride, x_step, rows, w, w_stride, inner, start, start_stride, count):
        def build(context, builder, signature, values):
            builder.call(function(builder.module), values)
            return values[0]

        return types.intp(*[types.intp] * 12), build

    return call


_HALF = LANES // 2
_whole, _half = _product(ROWS, LANES), _product(2 * ROWS, _HALF)
_whole_scaled, _half_scaled = _product(ROWS, LANES, True), _product(2 * ROWS, _HALF, True)


@njit
def _panel(to, to_stride, x, x_stride, x_step, rows, w, inner, start, start_stride, width):
    """All rows of a product with up to `LANES` columns."""
    most = ROWS if width > _HALF else 2 * ROWS
    for row in range(0, rows, most):
        here, there, begin = to + 4 * row * to_stride, x + 4 * row * x_stride, start + 4 * row * start_stride
        left = rows - row
        if width > _HALF:
            _whole(here, to_stride, there, x_stride, x_step, left, w, LANES, inner, begin, start_stride, width)
        else:
            _half(here, to_stride, there, x_stride, x_step, left, w, LANES, inner, begin, start_stride, width)


@njit
def multiply(to, to_stride, x, x_stride, rows, w, inner, columns, bias):
    """The rows (rows, inner) at the address `x` times the packed matrix at `w`, plus the row at `bias`.

    Strides are numbers from one row to the next. `to` and `x` do not overlap.
    """
    one, none = _n(1), _n(0)
    for first in range(0, columns, LANES):
        here, matrix, width = _n(to + 4 * first), _n(w + 4 * first * inner), _n(min(LANES, columns - first))
        start = _n(bias + 4 * first)
        _panel(here, _n(to_stride), _n(x), _n(x_stride), one, _n(rows), matrix, _n(inner), start, none, width)


@njit
def add_product(to, to_stride, x, x_stride, x_step, rows, w, inner, columns):
    """Add a product to the rows at `to`, of numbers `x_step` apart: with a step of a row, that of a transpose."""
    for first in range(0, columns, LANES):
        here, matrix, width = _n(to + 4 * first), _n(w + 4 * first * inner), _n(min(LANES, columns - first))
        stride, step = _n(to_stride), _n(x_step)
        _panel(here, stride, _n(x), _n(x_stride), step, _n(rows), matrix, _n(inner), here, stride, width)


@register_jitable
def lanes_of(columns):
    """Columns of a panel of a matrix as `add_scaled` takes it: a narrow one has narrow panels."""
    return _HALF if columns <= _HALF else LANES


@njit
def add_scaled(to, to_stride, scale, scale_stride, x, x_stride, rows, w, inner, columns):
    """Add a product, each row times a number, to the rows at `to`; the matrix is packed in panels of `lanes_of`."""
    lanes = lanes_of(columns)
    for first in range(0, columns, lanes):
        width = min(lanes, columns - first)
        most = ROWS if width > _HALF else 2 * ROWS
        for row in range(0, rows, most):
            here, there = to + 4 * (row * to_stride + first), x + 4 * row * x_stride
            of, matrix, left = scale + 4 * row * scale_stride, w + 4 * first * inner, _n(rows - row)
            a, b, c, n = _n(to_stride), _n(x_stride), _n(scale_stride), _n(inner)
            if width > _HALF:
                _whole_scaled(here, a, there, b, 1, left, matrix, _n(lanes), n, of, c, _n(width))
            else:
                _half_scaled(here, a, there, b, 1, left, matrix, _n(lanes), n, of, c, _n(width))


@njit
def _pack_panel(to, matrix, inner, columns, turned, panel):
    first = panel * LANES
    width = min(LANES, columns - first)
    for i in range(0, inner, _BLOCK):
        count = min(_BLOCK, inner - i)
        here = to + 4 * (first * inner + i * LANES)
        if width < LANES:
            clear(here, count * LANES)
        if turned:
            out = floats(here, count * LANES)
            for p in range(width):
                given = floats(matrix + 4 * ((first + p) * inner + i), count)
                for j in range(count):
                    out[j * LANES + p] = given[j]
        else:
            for j in range(count):
                copy(here + 4 * j * LANES, matrix + 4 * ((i + j) * columns + first), width)


@kernel
def pack(item, buffers):
    """Operands: table of the count of matrices and of (inner, columns, turned) of each, matrices. Results: packed ones.

    An item is a panel.
    """
    at = words(buffers, 1)
    count = ints(at[0], 3)[2]
    at, sizes = words(buffers, 1 + 2 * count), ints(at[0], 3 + 3 * count)
    for k in range(count):
        inner, columns, turned = sizes[3 + 3 * k], sizes[4 + 3 * k], sizes[5 + 3 * k]
        panels = (columns + LANES - 1) // LANES
        if item < panels:
            _pack_panel(at[1 + count + k], at[1 + k], inner, columns, turned, item)
            return
        item -= panels


class Turned(NamedTuple):
    """The transpose of a matrix."""

    matrix: jax.Array


def packed(*matrices: jax.Array | Turned) -> list[jax.Array]:
    """Matrices (inner, columns) as `multiply` takes them."""
    given = [(m.matrix, True) if isinstance(m, Turned) else (m, False) for m in matrices]
    shapes = [m.shape[::-1] if turned else m.shape for m, turned in given]
    results = [m[None] for m, _ in given]
    made = [k for k, (_, columns) in enumerate(shapes) if given[k][1] or columns != LANES]
    if made:
        sizes = [v for k in made for v in (*shapes[k], given[k][1])]
        like = [jax.ShapeDtypeStruct((-(-shapes[k][1] // LANES), shapes[k][0], LANES), jnp.float32) for k in made]
        operands, items = [given[k][0] for k in made], sum(shape.shape[0] for shape in like)
        for k, result in zip(made, invoke(pack, items, (len(made), *sizes), operands, like), strict=True):
            results[k] = result
    return results
