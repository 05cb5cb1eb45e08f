"""Matrix products of float32 for other kernels: a few rows times a matrix that lies in the nearest caches.

A packed matrix (inner, columns) lies in panels of `LANES` columns, one after the other: (panels, inner, LANES), with 0
behind the last column. What a loop reads is then side by side, whatever the matrix's size. Where the processor has
matrix units (`tiles`), a panel has its blocks instead, and rows are arranged in blocks before they are multiplied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils
from numba.extending import register_jitable

from . import tiles
from .custom_call import invoke, kernel
from .memory import LINE, floats, ints, llvm_function, piece, words
from .tiles import (
    DEPTH,
    NUMBERS,
    PARTS,
    SIDE,
    TILE,
    TILES,
    pair_and_finish,
    pair_finish,
    pair_product,
    split,
    split_across,
    split_across_turned,
    split_turned,
)
from .vectors import _at, _fused, _get, _indices, _put, _spread

ROWS, LANES = (32, 32) if TILES else (12, 32) if binding.get_host_cpu_features().get("avx512f") else (6, 16)
"""Rows and columns at a time: their sums nearly fill the registers of the processor."""
HALF = LANES // 2
STEPS = 64 if TILES else 48
"""Steps of an item of a block's kernel, which stay next to a core: a multiple of the rows."""
BLOCK = DEPTH if TILES else 1
"""Of so many numbers of the inner axis a product may start at any multiple."""
_CHUNK = 4 * NUMBERS if TILES else 1 << 30
"""Of so many numbers of the inner axis the factors stay in the nearest cache."""
_n = np.intp
"""Of numbers of one type alone a function is compiled once."""
_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)


def _tile(
    builder, most, lanes, paired,
    to, to_stride, x, x_stride, x_step, rows, w, w_stride, inner, start, start_stride, count, start_step=None,
):  # fmt: skip
    """Up to `most` rows of a product, the first `count` of `lanes` columns, plus the rows at `start`.

    Or, `paired`, each half of the columns times a number of the row, added to the first `count` numbers there; the
    numbers of a row are `start_step` apart.

    Strides are numbers from one row to the next, `x_step` those from one of the `inner` to the next.
    """
    kind = ir.VectorType(_FLOAT, lanes)
    # behind the last row the last one is computed again
    last = builder.sub(rows, _WORD(1))
    which = [builder.select(builder.icmp_signed("<", _WORD(i), last), _WORD(i), last) for i in range(most)]

    given, starts, places = (
        [_at(builder, address, stride, row) for row in which]
        for address, stride in ((x, x_stride), (start, start_stride), (to, to_stride))
    )
    begin = [ir.Constant(kind, None) if paired else _get(builder, kind, address, count) for address in starts]
    sums = [cgutils.alloca_once_value(builder, value) for value in begin]
    with cgutils.for_range(builder, inner) as loop:
        columns = _get(builder, kind, _at(builder, w, w_stride, loop.index), None)
        for row, total in zip(given, sums, strict=True):
            number = _spread(builder, kind, _at(builder, row, x_step, loop.index))
            builder.store(_fused(builder, number, columns, builder.load(total)), total)
    results = [builder.load(total) for total in sums]
    if paired:
        parts = [_indices(range(k, k + lanes // 2)) for k in (0, lanes // 2)]
        halves = [[builder.shuffle_vector(result, result, indices) for indices in parts] for result in results]
        # all before the first is written: the last row may be there several times
        results = [
            tiles.add_pair(builder, pair, place, scales, start_step, count)
            for pair, place, scales in zip(halves, places, starts, strict=True)
        ]
    for place, result in zip(places, results, strict=True):
        _put(builder, result.type, place, result, count)


def _product(most: int, lanes: int):
    """`_tile` of so many rows and columns, or that of `tiles`, for compiled code."""

    def write(builder, *arguments):
        if TILES:
            tiles.tile(builder, lanes, *arguments)
        else:
            _tile(builder, most, lanes, False, *arguments)

    return llvm_function(f"spyx_tile_{most}_{lanes}", 12, write)


_whole, _half = _product(ROWS, LANES), _product(2 * ROWS, HALF)
_pair = llvm_function("spyx_tile_pair", 13, lambda builder, *arguments: _tile(builder, ROWS, LANES, True, *arguments))


class Rows(NamedTuple):
    """Rows to be multiplied: an address, and numbers from one to the next and from one number to the next."""

    address: Any
    stride: Any
    step: Any


@register_jitable
def depth(inner):
    """What a row, or a column of a packed matrix, takes, in float32."""
    return (inner + DEPTH - 1) // DEPTH * NUMBERS if TILES else inner


@register_jitable
def space(rows, inner):
    """Memory for arranged rows, in float32."""
    return (rows + 2 * ROWS - 1) // (2 * ROWS) * (2 * ROWS) * depth(inner) if TILES else 0


@njit
def _arranged(to, x, stride, step, rows, inner):
    if not TILES:
        return Rows(x, stride, step)
    numbers = _n(depth(inner))
    for row in range(0, rows, SIDE):
        count = min(SIDE, rows - row)
        for k in range(0, inner, DEPTH):
            here, there = to + 4 * (row * numbers + k // DEPTH * SIDE * NUMBERS), x + 4 * (row * stride + k * step)
            if step == 1:
                split(here, TILE, there, stride, count, inner - k)
            else:
                split_across_turned(here, TILE, there, step, count, inner - k)
    return Rows(to, numbers, _n(1))


@register_jitable
def arranged(to, x, stride, step, rows, inner):
    """Rows (rows, inner) at the address x, as products take them: either the stride or the step is 1.

    `to` is the address of memory for `space(rows, inner)`, which they may be in.
    """
    return _arranged(_n(to), _n(x), _n(stride), _n(step), _n(rows), _n(inner))


@register_jitable
def behind(rows, k):
    """Rows without their first k numbers, a multiple of `BLOCK`."""
    offset = k // DEPTH * SIDE * NUMBERS if TILES else k * rows.step
    return Rows(rows.address + 4 * offset, rows.stride, rows.step)


@njit
def _panel(to, to_stride, x, x_stride, x_step, rows, w, inner, start, start_stride, width):
    """All rows of a product with up to `LANES` columns."""
    most = ROWS if width > HALF else 2 * ROWS
    for k in range(0, max(inner, 1), _CHUNK):
        of_x, of_w, numbers = x + 4 * k * (SIDE if TILES else x_step), w + 4 * k * LANES, min(inner - k, _CHUNK)
        for row in range(0, rows, most):
            here, there, begin = to + 4 * row * to_stride, of_x + 4 * row * x_stride, start + 4 * row * start_stride
            a, b, c, n = to_stride, x_stride, start_stride, rows - row
            if width > HALF:
                _whole(here, a, there, b, x_step, n, of_w, LANES, numbers, begin, c, width)
            else:
                _half(here, a, there, b, x_step, n, of_w, LANES, numbers, begin, c, width)
        start, start_stride = to, to_stride


@njit
def multiply(to, to_stride, x, rows, w, inner, columns, bias):
    """Arranged rows (rows, inner) times the packed matrix at `w`, plus the row at `bias`.

    The stride is numbers from one row to the next. `to` and `x` do not overlap.
    """
    none, numbers = _n(0), _n(depth(inner))
    for first in range(0, columns, LANES):
        here, matrix, width = _n(to + 4 * first), _n(w + 4 * first * numbers), _n(min(LANES, columns - first))
        start = _n(bias + 4 * first)
        _panel(here, _n(to_stride), x.address, x.stride, x.step, _n(rows), matrix, numbers, start, none, width)


@njit
def add_product(to, to_stride, x, rows, w, inner, columns):
    """Add a product to the rows at `to`."""
    numbers = _n(depth(inner))
    for first in range(0, columns, LANES):
        here, matrix, width = _n(to + 4 * first), _n(w + 4 * first * numbers), _n(min(LANES, columns - first))
        stride = _n(to_stride)
        _panel(here, stride, x.address, x.stride, x.step, _n(rows), matrix, numbers, here, stride, width)


@register_jitable
def first_of(pair, rising):
    """The first inner number of a pair of matrices: with `rising`, those of g have nothing before g.

    Nor, in the second half of a block, before its end.
    """
    return (2 * pair + BLOCK // 2) // BLOCK * BLOCK if rising else 0


@njit
def _add_scaled(to, to_stride, scale, scale_stride, x, rows, w, count, rising, inner, columns):
    memory = np.empty(2 * ROWS * LANES + LINE if TILES else 1, np.float32)
    made, a, c = _n(piece(memory.ctypes.data, 0)[0]), _n(to_stride), _n(scale_stride)
    free = made + 4 * ROWS * LANES
    # matrix units make a product while what they made before is brought to its place
    last, place, beside, rest, apart, wide = made, made, made, _n(0), _n(0), _n(0)
    for g in range(0, count, 2):
        another, numbers = _n(1 if g + 1 < count else 0), _n(depth(max(inner - first_of(g // 2, rising), 0)))
        if numbers == 0:
            continue
        of_x = behind(x, first_of(g // 2, rising)).address
        for column in range(0, columns, HALF):
            width = _n(min(HALF, columns - column))
            for row in range(0, rows, ROWS):
                here, of = _n(to + 4 * (row * a + column)), _n(scale + 4 * (row * c + g))
                there, n = _n(of_x + 4 * row * x.stride), _n(rows - row)
                if TILES:
                    if rest >= ROWS and wide == HALF and n > SIDE:
                        pair_and_finish(made, there, x.stride, w, numbers, last, place, a, beside, c, apart)
                    else:
                        if rest > 0:
                            pair_finish(last, place, a, rest, beside, c, apart, wide)
                        pair_product(made, there, x.stride, n, w, numbers)
                    last, place, beside, rest, apart, wide = made, here, of, n, another, width
                    made, free = free, made
                else:
                    _pair(here, a, there, x.stride, x.step, n, w, LANES, numbers, of, c, width, another)
            w += 4 * numbers * LANES
    if rest > 0:
        pair_finish(last, place, a, rest, beside, c, apart, wide)
    memory[0] = 0  # numba frees an array after its last use


@register_jitable
def add_scaled(to, to_stride, scale, scale_stride, x, rows, w, count, rising, inner, columns):
    """Add products with `count` matrices, each row of each times a number of its own, to the rows at `to`.

    The numbers of a row lie side by side. At `w` lie panels: for every two matrices, and then for every `HALF`
    columns, those of the one before those of the other, from `first_of` on.
    """
    _add_scaled(to, to_stride, scale, scale_stride, x, rows, w, count, _n(rising), inner, columns)


@njit
def _pack_block(panel, k, first, x, k_step, step, inner, columns):
    if TILES:
        to, apart = panel + TILE * (k // DEPTH * PARTS * (LANES // SIDE) + first // SIDE), TILE * (LANES // SIDE)
        if step == 1:
            split_across(to, apart, x, k_step, columns, inner)
        else:
            split_turned(to, apart, x, step, min(columns, SIDE), inner)
    else:
        rows = min(DEPTH, inner)
        out = floats(panel + 4 * (k * LANES + first), rows * LANES)
        given = floats(x, rows * k_step + SIDE * step)
        for p in range(min(columns, SIDE)):
            for j in range(rows):
                out[j * LANES + p] = given[j * k_step + p * step]
        for j in range(rows):
            for p in range(max(columns, 0), SIDE):
                out[j * LANES + p] = 0


@register_jitable
def pack_block(panel, k, first, x, k_step, step, inner, columns):
    """Pack, into a panel, up to `DEPTH` rows from k on and `SIDE` columns from `first` on: multiples of these.

    They lie at `x`, `k_step` numbers from a row to the next, `step` from a column to the next; one of the two is 1.
    Behind the `columns` it may write 0.
    """
    _pack_block(_n(panel), _n(k), _n(first), _n(x), _n(k_step), _n(step), _n(inner), _n(columns))


@njit
def _pack_panel(to, x, k_step, step, inner, columns):
    for k in range(0, inner, DEPTH):
        # what is behind the half that holds the last column is not read
        for first in range(0, min(columns, LANES), SIDE):
            there = x + 4 * (k * k_step + first * step)
            pack_block(to, k, first, there, k_step, step, inner - k, columns - first)


@register_jitable
def pack_panel(to, x, k_step, step, inner, columns):
    """Pack a panel, of whose columns there are only `columns`."""
    _pack_panel(_n(to), _n(x), _n(k_step), _n(step), _n(inner), _n(columns))


@njit
def pack_matrix(to, x, stride, inner, columns):
    """Pack a matrix (inner, columns) of which each row lies side by side."""
    for first in range(0, columns, LANES):
        here = to + 4 * first * depth(inner)
        pack_panel(here, x + 4 * first, stride, 1, inner, columns - first)


@kernel
def pack(item, buffers):
    """Operands: table of the count of matrices and of (inner, columns, turned) of each, matrices. Results: packed ones.

    An item is a panel.
    """
    at = words(buffers, 1)
    count = ints(at[0], 4)[3]
    at, sizes = words(buffers, 1 + 2 * count), ints(at[0], 4 + 3 * count)
    for k in range(count):
        inner, columns, turned = sizes[4 + 3 * k], sizes[5 + 3 * k], sizes[6 + 3 * k]
        panels = (columns + LANES - 1) // LANES
        if item < panels:
            first = item * LANES
            k_step, step = (1, inner) if turned else (columns, 1)
            to, given = at[1 + count + k] + 4 * first * depth(inner), at[1 + k] + 4 * first * step
            pack_panel(to, given, k_step, step, inner, columns - first)
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
    made = [k for k, (_, columns) in enumerate(shapes) if TILES or given[k][1] or columns != LANES]
    if made:
        sizes = [v for k in made for v in (*shapes[k], given[k][1])]
        panels = [(-(-shapes[k][1] // LANES), depth(shapes[k][0]), LANES) for k in made]
        like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in panels]
        operands, items = [given[k][0] for k in made], sum(shape.shape[0] for shape in like)
        for k, result in zip(made, invoke(pack, items, (len(made), *sizes), operands, like), strict=True):
            results[k] = result
    return results
