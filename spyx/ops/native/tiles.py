"""Products of float32 on the matrix units of x86 processors (AMX), as accurate as fused multiply-adds.

A float32 is exactly the sum of three bfloat16. Of the nine products of their parts the six largest are added up in
float32; what is left out is below 2^-23 of the product, 2^-27 on average. Parts below 1e-38 count as zero; an infinite
factor, or one above 3.39e38, gives NaN.

A block is 16 rows of a left matrix or 16 columns of a right one, and `DEPTH` numbers of the inner axis of each: three
tiles of 1 KB, one for each part. In a word lie two numbers of the inner axis, `HALF` apart. `NUMBERS` float32 have the
size of what a row or column takes in a block.

Source: Henry, Tang, Heinecke 2019, arXiv:1904.06376; Intel 64 and IA-32 Architectures Software Developer's Manual.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

from llvmlite import binding, ir
from numba import config as _config
from numba import types
from numba.core import cgutils

from .memory import intrinsic, llvm_function
from .vectors import _at, _fused, _get, _indices, _put, _spread

config: Any = _config
SIDE, DEPTH, HALF, PARTS = 16, 32, 16, 3
NUMBERS = DEPTH * PARTS // 2
TILE = 1024
GROUPS = SIDE // 2 + 1
"""Of pairs of `SIDE` numbers, `triangles`."""
_PRODUCTS = (0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)
"""Which part of the left factor with which of the right one: one of two next to each other stays in its tiles."""
_LEFT, _RIGHT = 4, 6
"""Numbers of the first tiles of the factors: those before hold sums."""
_FLOAT, _INT, _WORD, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8)
_ROW, _ROW_BITS = ir.VectorType(_FLOAT, SIDE), ir.VectorType(_INT, SIDE)
_CONFIGURATION = bytes([1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)
"""Palette 1: eight tiles of 16 rows of 64 bytes."""
_REQUEST, _PERMISSION, _TILE_DATA = 158, 0x1023, 18
"""Linux: the call arch_prctl, its ARCH_REQ_XCOMP_PERM, and XFEATURE_XTILEDATA."""


def _permitted() -> bool:
    """Whether the processor has the units and this process may use them; SPYX_AMX=0 says it shall not."""
    features = binding.get_host_cpu_features()
    if os.environ.get("SPYX_AMX") == "0" or not all(features.get(name) for name in ("avx512f", "amx-tile", "amx-bf16")):
        return False
    chosen = config.CPU_NAME or config.CPU_FEATURES  # compiled for another processor
    if chosen or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_REQUEST, _PERMISSION, _TILE_DATA) == 0


TILES = _permitted()


def _call(builder, name, *arguments):
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile_at(builder, name, number, address, stride):
    _call(builder, name, _BYTE(number), builder.inttoptr(address, _BYTE.as_pointer()), stride)


def most_rows(columns: int) -> int:
    """Rows of a product of 16 or 32 columns: it has four tiles of sums."""
    return 4 * SIDE * SIDE // columns


@intrinsic
def begin(_):
    """Make the tiles ready: a kernel calls it before its first product."""

    def build(context, builder, signature, values):
        if TILES:
            data = ir.Constant(ir.ArrayType(_BYTE, len(_CONFIGURATION)), bytearray(_CONFIGURATION))
            given = cgutils.global_constant(builder, "spyx_tiles", data)
            _call(builder, "ldtilecfg", builder.bitcast(given, _BYTE.as_pointer()))
        return context.get_constant(types.intp, 0)

    return types.intp(), build


@intrinsic
def end(_):
    """Give the tiles back: a kernel calls it after its last product."""

    def build(context, builder, signature, values):
        if TILES:
            _call(builder, "tilerelease")
        return context.get_constant(types.intp, 0)

    return types.intp(), build


def _parts(builder, value, rounded=True):
    """Three vectors of words whose upper halves are bfloat16, the lower ones 0; their sum is `value`."""

    def filled(number):
        return ir.Constant(_ROW_BITS, [number] * SIDE)

    def kept(value, rounded):
        bits = builder.bitcast(value, _ROW_BITS)
        bits = builder.add(bits, filled(1 << 15)) if rounded else bits
        return builder.and_(bits, filled(0xFFFF0000))

    first = kept(value, rounded)
    rest = builder.fsub(value, builder.bitcast(first, _ROW))
    second = kept(rest, rounded)
    # exact, so not rounded: NaN stays NaN, whatever its bits
    return first, second, kept(builder.fsub(rest, builder.bitcast(second, _ROW)), False)


def _transposed(builder, rows):
    """The transpose of 16 vectors of 16 words."""
    rows = list(rows)
    for step in (1, 2, 4, 8):
        upper = [c if not c & step else SIDE + c - step for c in range(SIDE)]
        lower = [c + step if not c & step else SIDE + c for c in range(SIDE)]
        for i in range(SIDE):
            if not i & step:
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (builder.shuffle_vector(*pair, _indices(which)) for which in (upper, lower))
    return rows


def _turn(builder, to, to_stride, x, x_stride, rows, columns):
    """The transpose of up to 16 rows of up to 16 numbers."""
    given = []
    for i in range(SIDE):
        count = builder.select(builder.icmp_signed("<", _WORD(i), rows), columns, _WORD(0))
        given.append(_get(builder, _ROW, _at(builder, x, x_stride, _WORD(i)), count))
    for i, value in enumerate(_transposed(builder, given)):
        with builder.if_then(builder.icmp_signed("<", _WORD(i), columns)):
            _put(builder, _ROW, _at(builder, to, to_stride, _WORD(i)), value, rows)


def _split(builder, across, turned, to, apart, x, stride, items, inner):
    """The parts of a block of up to 16 items (rows, columns) and `DEPTH` of the inner axis, 0 behind its end.

    The numbers of a vector that is read are the inner ones of an item or, with `across`, the items' ones of an inner
    index; `stride` leads from one to the next. So are the rows of the tiles that are written, unless `turned`. They
    are `apart` bytes apart.
    """
    local = cgutils.alloca_once(builder, _ROW_BITS, TILE * PARTS // 64) if turned else None
    place, gap = (builder.ptrtoint(local, _WORD), _WORD(TILE)) if turned else (to, apart)

    with cgutils.for_range(builder, _WORD(SIDE) if across else items) as loop:
        if across:
            given = []
            for index in (loop.index, builder.add(loop.index, _WORD(HALF))):
                count = builder.select(builder.icmp_signed("<", index, inner), items, _WORD(0))
                given.append(_get(builder, _ROW, _at(builder, x, stride, index), count))
        else:
            given = [
                _get(builder, _ROW, _at(builder, builder.add(x, _WORD(4 * k)), stride, loop.index), count)
                for k, count in ((0, inner), (HALF, builder.sub(inner, _WORD(HALF))))
            ]
        here = builder.add(place, builder.mul(_WORD(64), loop.index))
        for p, (low, high) in enumerate(zip(*(_parts(builder, value) for value in given), strict=True)):
            both = builder.or_(builder.lshr(low, ir.Constant(_ROW_BITS, [16] * SIDE)), high)
            _put(builder, _ROW_BITS, builder.add(here, builder.mul(_WORD(p), gap)), both, None)
    if turned:
        for p in range(PARTS):
            rows = [_get(builder, _ROW_BITS, builder.add(place, _WORD(p * TILE + 64 * i)), None) for i in range(SIDE)]
            for i, value in enumerate(_transposed(builder, rows)):
                offset = builder.add(builder.mul(_WORD(p), apart), _WORD(64 * i))
                _put(builder, _ROW_BITS, builder.add(to, offset), value, None)


def _sum(builder, blocks, columns, x, x_stride, w, w_columns, depth, start, to, meanwhile=None):
    """The product of 16 `blocks` rows and the first 16 `columns` of `w_columns` such.

    `to` is the address and the stride, in bytes, of the sums; `start` those of what they start from, or None.
    `meanwhile(m)` writes what is done beside the m-th of the first six products; there is one then.
    """
    sums = {(i, j): i * columns + j for i in range(blocks) for j in range(columns)}

    def place(matrix, i, j):
        address, stride = matrix
        return builder.add(address, builder.add(_WORD(64 * j), builder.mul(_WORD(SIDE * i), stride))), stride

    for (i, j), number in sums.items():
        if start is None:
            _call(builder, "tilezero", _BYTE(number))
        else:
            _tile_at(builder, "tileloadd64", number, *place(start, i, j))

    def multiply(block, meanwhile):
        k = builder.mul(_WORD(TILE * PARTS), block)
        of_x, of_w = builder.add(x, k), builder.add(w, builder.mul(w_columns, k))
        before = None, None
        for m, (p, q) in enumerate(_PRODUCTS):
            if q != before[1]:
                here = builder.add(of_w, builder.mul(w_columns, _WORD(TILE * q)))
                for j in range(columns):
                    _tile_at(builder, "tileloadd64", _RIGHT + j, builder.add(here, _WORD(TILE * j)), _WORD(64))
            for i in range(blocks):
                if p != before[0] or blocks > 2:
                    here = builder.add(of_x, builder.mul(_WORD(4 * SIDE * i), x_stride))
                    _tile_at(builder, "tileloadd64", _LEFT + i % 2, builder.add(here, _WORD(TILE * p)), _WORD(64))
                for j in range(columns):
                    _call(builder, "tdpbf16ps", _BYTE(sums[i, j]), _BYTE(_LEFT + i % 2), _BYTE(_RIGHT + j))
            if meanwhile:
                meanwhile(m)
            before = p, q

    if meanwhile:
        multiply(_WORD(0), meanwhile)
    begin = _WORD(1 if meanwhile else 0)
    with cgutils.for_range(builder, builder.sub(depth, begin)) as loop:
        multiply(builder.add(loop.index, begin), None)
    for (i, j), number in sums.items():
        _tile_at(builder, "tilestored64", number, *place(to, i, j))


def _for_rows(builder, rows, most, write):
    """`write(blocks)` for the least power of 2 of blocks, up to `most`, that hold the rows."""
    if most == 1:
        write(1)
        return
    with builder.if_else(builder.icmp_signed(">", rows, _WORD(most // 2 * SIDE))) as (many, few):
        with many:
            write(most)
        with few:
            _for_rows(builder, rows, most // 2, write)


def add_pair(builder, pair, to, scales, step, count):
    """Two vectors, each times a number, plus the first `count` numbers at an address; `step` is between the two."""
    total = _get(builder, pair[0].type, to, count)
    for k, value in enumerate(pair):
        address = builder.add(scales, builder.mul(_WORD(4 * k), step))
        total = _fused(builder, _spread(builder, value.type, address), value, total)
    return total


def _least(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def tile(
    builder, lanes, to, to_stride, x, x_stride, x_step, rows, w, w_stride, inner, start, start_stride, count
):  # fmt: skip
    """`products._tile` of up to `most_rows(lanes)` rows, in blocks: `x_stride` and `inner` are `NUMBERS` for each."""
    kind, columns, most = ir.VectorType(_FLOAT, lanes), lanes // SIDE, most_rows(lanes)
    depth, w_columns = builder.sdiv(inner, _WORD(NUMBERS)), builder.sdiv(w_stride, _WORD(SIDE))

    def add_up(blocks, begin, end):
        _sum(builder, blocks, columns, x, x_stride, w, w_columns, depth, begin, end)

    whole = [builder.icmp_signed(">=", rows, _WORD(most)), builder.icmp_signed("==", count, _WORD(lanes))]
    with builder.if_else(builder.and_(*whole)) as (direct, otherwise):
        with direct:
            begin, end = ((v, builder.mul(_WORD(4), stride)) for v, stride in ((start, start_stride), (to, to_stride)))
            add_up(most // SIDE, begin, end)
        with otherwise:
            local = builder.ptrtoint(cgutils.alloca_once(builder, kind, most), _WORD)
            _for_rows(builder, rows, most // SIDE, lambda blocks: add_up(blocks, None, (local, _WORD(4 * lanes))))
            with cgutils.for_range(builder, _least(builder, rows, _WORD(most))) as loop:
                result = _get(builder, kind, _at(builder, local, _WORD(lanes), loop.index), None)
                given = _get(builder, kind, _at(builder, start, start_stride, loop.index), count)
                total = builder.fadd(result, given, flags=("contract",))
                _put(builder, kind, _at(builder, to, to_stride, loop.index), total, count)


def _pair(builder, to, x, x_stride, rows, w, inner):
    """The product of up to 32 rows and two blocks of columns."""
    depth, two, place = builder.sdiv(inner, _WORD(NUMBERS)), _WORD(2), (to, _WORD(2 * 4 * SIDE))
    _for_rows(builder, rows, 2, lambda blocks: _sum(builder, blocks, 2, x, x_stride, w, two, depth, None, place))


def _finish_row(builder, row, product, to, to_stride, scales, stride, step, count):
    here = _at(builder, product, _WORD(2 * SIDE), row)
    halves = [_get(builder, _ROW, builder.add(here, _WORD(64 * k)), None) for k in range(2)]
    place, of = _at(builder, to, to_stride, row), _at(builder, scales, stride, row)
    _put(builder, _ROW, place, add_pair(builder, halves, place, of, step, count), count)


def _finish(builder, product, to, to_stride, rows, scales, stride, step, count):
    """Add what `pair_product` made to rows of up to 16 numbers: each half times a number, `step` apart, of the row."""
    with cgutils.for_range(builder, _least(builder, rows, _WORD(2 * SIDE))) as loop:
        _finish_row(builder, loop.index, product, to, to_stride, scales, stride, step, count)


def _pair_and_finish(builder, made, x, x_stride, w, inner, product, to, to_stride, scales, stride, step):
    """`pair_product` of more than 16 rows, while 32 rows of 16 numbers are finished."""
    depth, two, place = builder.sdiv(inner, _WORD(NUMBERS)), _WORD(2), (made, _WORD(2 * 4 * SIDE))

    def some_rows(m):
        most, parts = 2 * SIDE, len(_PRODUCTS)
        for row in range(most * m // parts, most * (m + 1) // parts):
            _finish_row(builder, _WORD(row), product, to, to_stride, scales, stride, step, None)

    _sum(builder, 2, 2, x, x_stride, w, two, depth, None, place, some_rows)


def _pairs(builder, to, u, stride, begin, end, places):
    """The parts of blocks of rows `begin` to `end`: of the products of the vectors at two times two places of each.

    They are cut off, as rounding takes a fifth longer: below 2^-22 of a product is left out then, 2^-26 on average.
    """
    with cgutils.for_range_slice(builder, _WORD(begin), _WORD(end), _WORD(1), _WORD) as (index, _):
        row = _at(builder, u, stride, index)
        values = []
        for pair in places:
            a, b = (_get(builder, _ROW, builder.add(row, place), None) for place in pair)
            values.append(_parts(builder, builder.fmul(a, b), False))
        block = builder.mul(_WORD(TILE * PARTS), builder.lshr(index, _WORD(4)))
        here = builder.add(builder.add(to, block), builder.mul(_WORD(64), builder.and_(index, _WORD(SIDE - 1))))
        for p, (low, high) in enumerate(zip(*values, strict=True)):
            both = builder.or_(builder.lshr(low, ir.Constant(_ROW_BITS, [16] * SIDE)), high)
            _put(builder, _ROW_BITS, builder.add(here, _WORD(TILE * p)), both, None)


def _doubled(builder, to, to_stride, u, stride, rows, count):
    """`SIDE` numbers of each of 64 rows, twice: 0 behind the first `count` numbers and the last row."""
    with cgutils.for_range(builder, _WORD(4 * SIDE)) as loop:
        some = builder.select(builder.icmp_signed("<", loop.index, rows), count, _WORD(0))
        value = _get(builder, _ROW, _at(builder, u, stride, loop.index), some)
        for k in range(2):
            here = _at(builder, builder.add(to, _WORD(4 * SIDE * k)), to_stride, loop.index)
            _put(builder, _ROW, here, value, None)


def _add_pairs(builder, to, to_stride, side, u, stride, last, w, depth):
    """Add the product of 64 rows of pairs, `triangles`, and 16 columns of a panel to what lies at `to`.

    A block of pairs is made while the one before is multiplied; `side` is room for two. Four products are under way at
    a time: one on top of the last would wait for it.
    """
    rows, whole, columns = 4 * SIDE, 4 * TILE * PARTS, 2
    places = [_at(builder, to, to_stride, _WORD(SIDE * number)) for number in range(4)]
    apart = builder.mul(_WORD(4), to_stride)

    def groups(block):
        found = []
        for k in range(2):
            group = _least(builder, builder.add(builder.mul(block, _WORD(2)), _WORD(k)), last)
            h = builder.mul(builder.udiv(group, _WORD(GROUPS)), _WORD(4 * 2 * SIDE))
            found.append((h, builder.add(h, builder.mul(builder.urem(group, _WORD(GROUPS)), _WORD(4)))))
        return found

    for number, place in enumerate(places):
        _tile_at(builder, "tileloadd64", number, place, apart)
    _pairs(builder, side, u, stride, 0, rows, groups(_WORD(0)))
    with cgutils.for_range(builder, depth) as loop:
        odd = builder.and_(loop.index, _WORD(1))
        here = builder.add(side, builder.mul(odd, _WORD(whole)))
        there = builder.add(side, builder.mul(builder.xor(odd, _WORD(1)), _WORD(whole)))
        of_w = builder.add(w, builder.mul(loop.index, _WORD(columns * TILE * PARTS)))
        following = groups(builder.add(loop.index, _WORD(1)))
        for m, (p, q) in enumerate(((0, 2), (0, 1), (0, 0), (1, 1), (1, 0), (2, 0))):
            # the second part stays in a tile of its own, the first takes that of the third
            number = _RIGHT + q % 2
            if p == 0:
                _tile_at(builder, "tileloadd64", number, builder.add(of_w, _WORD(columns * TILE * q)), _WORD(64))
            for i in range(4):
                place = builder.add(here, _WORD(TILE * (PARTS * i + p)))
                _tile_at(builder, "tileloadd64", _LEFT + i % 2, place, _WORD(64))
                _call(builder, "tdpbf16ps", _BYTE(i), _BYTE(_LEFT + i % 2), _BYTE(number))
                k = 4 * m + i
                _pairs(builder, there, u, stride, rows * k // 24, rows * (k + 1) // 24, following)
    for number, place in enumerate(places):
        _tile_at(builder, "tilestored64", number, place, apart)


def _splitting(across: bool, turned: bool):
    """`_split` for compiled code."""
    name = f"spyx_split{'_across' if across else ''}{'_turned' if turned else ''}"
    return llvm_function(name, 6, lambda builder, *arguments: _split(builder, across, turned, *arguments))


split, split_across = _splitting(False, False), _splitting(True, False)
split_turned, split_across_turned = _splitting(False, True), _splitting(True, True)
turn = llvm_function("spyx_turn", 6, _turn)
pair_product, pair_finish = llvm_function("spyx_pair", 6, _pair), llvm_function("spyx_finish", 8, _finish)
pair_and_finish = llvm_function("spyx_pair_and_finish", 11, _pair_and_finish)
doubled, add_pairs = llvm_function("spyx_doubled", 6, _doubled), llvm_function("spyx_add_pairs", 8, _add_pairs)
