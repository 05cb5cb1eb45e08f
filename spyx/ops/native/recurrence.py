"""The recurrence of a diagonal system for other kernels, forward and back, through steps in the nearest caches."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from .memory import intrinsic
from .vectors import _get, _indices, _put

_LANES = 32
_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)
_REALS, _PAIRS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_FLOAT, 2 * _LANES)
_EVEN, _ODD = _indices(range(0, 2 * _LANES, 2)), _indices(range(1, 2 * _LANES, 2))


def _at(builder, address, index):
    return builder.add(address, builder.mul(_WORD(4), index))


def _fused(builder, x, y, z):
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


class _Row:
    """Access to `count` neighbours of a row of states: `N` numbers lie between a real and an imaginary part."""

    def __init__(self, builder, is_complex, N, count):
        self.builder, self.is_complex, self.N, self.count = builder, is_complex, N, count

    def _places(self, address):
        return (address, _at(self.builder, address, self.N)) if self.is_complex else (address,)

    def load(self, address):
        return [_get(self.builder, _REALS, place, self.count) for place in self._places(address)]

    def store(self, address, values):
        for place, value in zip(self._places(address), values, strict=True):
            _put(self.builder, _REALS, place, value, self.count)

    def factors(self, address):
        """Of pairs side by side."""
        if not self.is_complex:
            return [_get(self.builder, _REALS, address, self.count)]
        pairs = _get(self.builder, _PAIRS, address, self.builder.mul(self.count, _WORD(2)))
        return [self.builder.shuffle_vector(pairs, pairs, which) for which in (_EVEN, _ODD)]

    def multiply_add(self, a, h, x):
        """a h + x."""
        builder, fused = self.builder, _fused
        if not self.is_complex:
            return [fused(builder, a[0], h[0], x[0])]
        (a, b), (re, im) = a, h
        return [
            fused(builder, a, re, fused(builder, builder.fneg(b), im, x[0])),
            fused(builder, a, im, fused(builder, b, re, x[1])),
        ]

    def conjugate(self, a):
        return [a[0], self.builder.fneg(a[1])] if self.is_complex else a


class _Held:
    """Vectors held in registers through a loop."""

    def __init__(self, builder, values):
        self.builder, self.slots = builder, [cgutils.alloca_once_value(builder, value) for value in values]

    def get(self):
        return [self.builder.load(slot) for slot in self.slots]

    def set(self, values):
        for slot, value in zip(self.slots, values, strict=True):
            self.builder.store(value, slot)


def _advance(is_complex):
    """h = A h + x of up to `_LANES` states through some steps, in place of the x."""

    def emit(builder, drive, stride, state, A, A_stride, N, steps, count):
        row = _Row(builder, is_complex, N, count)
        h = _Held(builder, row.load(state))
        with cgutils.for_range(builder, steps) as loop:
            here = _at(builder, drive, builder.mul(loop.index, stride))
            a = row.factors(_at(builder, A, builder.mul(loop.index, A_stride)))
            after = row.multiply_add(a, h.get(), row.load(here))
            row.store(here, after)
            h.set(after)
        row.store(state, h.get())

    @intrinsic
    def f(_, drive, stride, state, A, A_stride, N, steps, count):
        def build(context, builder, signature, values):
            emit(builder, *values)
            return values[0]

        return types.intp(*[types.intp] * 8), build

    return f


def _retreat(is_complex):
    """g = dh + c, c = conj(A) g, dA += g conj(h before) of up to `_LANES` states through some steps, in place of dh."""

    def emit(builder, dh, stride, carry, slopes, before, A, N, steps, count):
        row = _Row(builder, is_complex, N, count)
        c, total = _Held(builder, row.load(carry)), _Held(builder, row.load(slopes))
        a = row.conjugate(row.factors(A))
        zero = [ir.Constant(_REALS, None)] * (2 if is_complex else 1)
        with cgutils.for_range(builder, steps) as loop:
            apart = builder.mul(loop.index, stride)
            here, h = _at(builder, dh, apart), row.load(_at(builder, before, apart))
            g = [builder.fadd(x, y) for x, y in zip(row.load(here), c.get(), strict=True)]
            row.store(here, g)
            total.set(row.multiply_add(row.conjugate(h), g, total.get()))
            c.set(row.multiply_add(a, g, zero))
        row.store(carry, c.get())
        row.store(slopes, total.get())

    @intrinsic
    def f(_, dh, stride, carry, slopes, before, A, N, steps, count):
        def build(context, builder, signature, values):
            emit(builder, *values)
            return values[0]

        return types.intp(*[types.intp] * 9), build

    return f


_advance_real, _advance_complex = _advance(False), _advance(True)
_retreat_real, _retreat_complex = _retreat(False), _retreat(True)


@njit
def advance(drive, stride, state, A, A_stride, N, steps, is_complex):
    """h = A h + x of N states through some steps, in place of the x.

    Addresses: `drive` of the x of the first step, `state` of the h before it, then of the last one, `A` of its factors;
    numbers from one step to the next: `stride`, `A_stride`. The imaginary part of a state lies `N` numbers behind
    the real one, that of a factor beside it.
    """
    for n in range(0, N, _LANES):
        count = min(_LANES, N - n)
        if is_complex:
            _advance_complex(drive + 4 * n, stride, state + 4 * n, A + 8 * n, A_stride, N, steps, count)
        else:
            _advance_real(drive + 4 * n, stride, state + 4 * n, A + 4 * n, A_stride, N, steps, count)


@njit
def retreat(dh, stride, carry, slopes, before, A, N, steps, is_complex):
    """The transpose of `advance` with the same A at all steps: g = dh + c, c = conj(A) g, in place of the dh and of c.

    `dh` and `before`, the states before each step, are addresses of the last step, `stride` leads to the one before;
    g conj(h before) is added to `slopes`.
    """
    for n in range(0, 4 * N, 4 * _LANES):
        count = min(_LANES, N - n // 4)
        if is_complex:
            _retreat_complex(dh + n, stride, carry + n, slopes + n, before + n, A + 2 * n, N, steps, count)
        else:
            _retreat_real(dh + n, stride, carry + n, slopes + n, before + n, A + n, N, steps, count)
