"""Vectors of `WIDTH` float32 as values of compiled code: held in registers, whatever loops they go through."""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from .memory import intrinsic

WIDTH = 64
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_LANES = ir.VectorType(_FLOAT, WIDTH)
_PAIRS = ir.VectorType(_FLOAT, 2 * WIDTH)


class _Vector(types.Type):
    def __init__(self):
        super().__init__(f"spyx_vector_{WIDTH}")


_vector = _Vector()
_pair = types.UniTuple(_vector, 2)


@register_model(_Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _LANES)


def _indices(numbers):
    return ir.Constant(ir.VectorType(_INT, len(numbers)), list(numbers))


_EVEN, _ODD = _indices(range(0, 2 * WIDTH, 2)), _indices(range(1, 2 * WIDTH, 2))
_ALTERNATE = _indices([k // 2 + k % 2 * WIDTH for k in range(2 * WIDTH)])


def _first(builder, kind, count):
    """Which of the lanes of a kind are among the first `count`."""
    word = ir.VectorType(_INT, kind.count)
    lane = builder.insert_element(ir.Constant(word, ir.Undefined), builder.trunc(count, _INT), _INT(0))
    counts = builder.shuffle_vector(lane, ir.Constant(word, ir.Undefined), _indices([0] * kind.count))
    return builder.icmp_signed("<", _indices(range(kind.count)), counts)


def _get(builder, kind, address, count):
    pointer = builder.inttoptr(address, kind.as_pointer())
    if count is None:
        return builder.load(pointer, align=4)
    mask = _first(builder, kind, count)
    zero = ir.Constant(kind, None)
    of = ir.FunctionType(kind, [pointer.type, _INT, mask.type, kind])
    f = cgutils.get_or_insert_function(builder.module, of, f"llvm.masked.load.v{kind.count}f32.p0")
    return builder.call(f, [pointer, _INT(4), mask, zero])


def _put(builder, kind, address, value, count):
    pointer = builder.inttoptr(address, kind.as_pointer())
    if count is None:
        builder.store(value, pointer, align=4)
        return
    mask = _first(builder, kind, count)
    of = ir.FunctionType(ir.VoidType(), [kind, pointer.type, _INT, mask.type])
    f = cgutils.get_or_insert_function(builder.module, of, f"llvm.masked.store.v{kind.count}f32.p0")
    builder.call(f, [value, pointer, _INT(4), mask])


def _at(builder, address, stride, index):
    """The address of a row, `stride` numbers from one to the next."""
    return builder.add(address, builder.mul(ir.IntType(64)(4), builder.mul(stride, index)))


def _spread(builder, kind, address):
    """A vector of the number at an address."""
    one = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4)
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, one, _INT(0)), nothing, _indices([0] * kind.count))


def _fused(builder, a, b, c):
    """a b + c."""
    return builder.fadd(c, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _loads(context, builder, address, count=None):
    return _get(builder, _LANES, address, count)


def _loads_pairs(context, builder, address, count=None):
    count = None if count is None else builder.mul(count, count.type(2))
    both = _get(builder, _PAIRS, address, count)
    parts = [builder.shuffle_vector(both, both, which) for which in (_EVEN, _ODD)]
    return context.make_tuple(builder, _pair, parts)


def _stores(builder, address, value, count=None):
    _put(builder, _LANES, address, value, count)


def _stores_pairs(builder, address, re, im, count=None):
    count = None if count is None else builder.mul(count, count.type(2))
    _put(builder, _PAIRS, address, builder.shuffle_vector(re, im, _ALTERNATE), count)


@intrinsic
def wide(_):
    """Have LLVM use the widest registers for the loops of the function that calls this: by itself it avoids some."""

    def build(context, builder, signature, values):
        # a word of LLVM's that llvmlite has not among those it lets through
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * WIDTH}"')
        return context.get_constant(types.intp, 0)

    return types.intp(), build


@intrinsic
def load(_, address):
    """The vector at an address."""
    return _vector(types.intp), lambda context, builder, signature, values: _loads(context, builder, *values)


@intrinsic
def load_some(_, address, count):
    """The first `count` numbers of the vector at an address, 0 for the others."""
    return _vector(types.intp, types.intp), lambda c, builder, signature, values: _loads(c, builder, *values)


@intrinsic
def load_pairs(_, address):
    """The first and the second numbers of the pairs at an address."""
    return _pair(types.intp), lambda context, builder, signature, values: _loads_pairs(context, builder, *values)


@intrinsic
def load_some_pairs(_, address, count):
    """As `load_pairs`, of the first `count` pairs, 0 for the others."""
    return _pair(types.intp, types.intp), lambda c, builder, signature, values: _loads_pairs(c, builder, *values)


@intrinsic
def store(_, address, value):
    """Write a vector to an address."""
    return _writes(_stores, types.intp, _vector)


@intrinsic
def store_some(_, address, value, count):
    """Write the first `count` numbers of a vector to an address."""
    return _writes(_stores, types.intp, _vector, types.intp)


@intrinsic
def store_pairs(_, address, re, im):
    """Write pairs to an address."""
    return _writes(_stores_pairs, types.intp, _vector, _vector)


@intrinsic
def store_some_pairs(_, address, re, im, count):
    """Write the first `count` pairs to an address."""
    return _writes(_stores_pairs, types.intp, _vector, _vector, types.intp)


def _writes(write, *kinds):
    def build(context, builder, signature, values):
        write(builder, *values)
        return values[0]

    return types.intp(*kinds), build


@intrinsic
def zeros(_):
    """A vector of zeros."""
    return _vector(), lambda context, builder, signature, values: ir.Constant(_LANES, None)


@intrinsic
def fill(_, address):
    """A vector of the number at an address."""

    def build(context, builder, signature, values):
        return _spread(builder, _LANES, values[0])

    return _vector(types.intp), build


@intrinsic
def total(_, vector):
    """The sum of a vector's numbers, in an order that depends on the processor alone."""

    def build(context, builder, signature, values):
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _LANES])
        f = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{WIDTH}f32")
        return builder.call(f, [_FLOAT(0), values[0]], fastmath=("reassoc",))

    return types.float32(_vector), build


def _arithmetic(name):
    @intrinsic
    def apply(_, a, b):
        def build(context, builder, signature, values):
            return getattr(builder, name)(*values, flags=("contract",))

        return _vector(_vector, _vector), build

    return apply


def _overload(symbol, name):
    apply = _arithmetic(name)

    @overload(symbol)
    def of(a, b):
        if a is _vector and b is _vector:
            return lambda a, b: apply(a, b)
        return None


for _symbol, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _overload(_symbol, _name)


@njit(inline="always")
def take(address, width):
    """The first `width` numbers at an address, at most `WIDTH`; 0 for the others."""
    return load(address) if width == WIDTH else load_some(address, width)


@njit(inline="always")
def put(address, value, width):
    """Write the first `width` numbers of a vector to an address."""
    if width == WIDTH:
        store(address, value)
    else:
        store_some(address, value, width)


@njit
def gather(to, address, stride, rows, width):
    """`rows` rows of `width` numbers, `stride` numbers apart, side by side in local memory, `WIDTH` for each."""
    for j in range(rows):
        store(to + 4 * WIDTH * j, take(address + 4 * stride * j, width))
