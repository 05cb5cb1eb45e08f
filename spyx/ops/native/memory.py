"""What compiled code needs below the level of arrays: addresses, atomic counters, calls by address, symbols.

Symbols stand for addresses of the running process (a function of Python, a table). The linker resolves them when
compiled code is loaded, so that numba can keep the code on disk between processes.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import register_jitable
from numba.np import arrayobj

intrinsic: Callable[..., Any] = _intrinsic
"""As numba's, whose first argument is left out in a call."""
_WORD = ir.IntType(64)
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
LINE = 16
"""32-bit numbers in a cache line: a word that many threads write lies in one of its own."""


def llvm_function(name: str, count: int, write: Callable[..., None]) -> Any:
    """A function of `count` words, for compiled code; `write(builder, *words)` makes its body, its result is of no use.

    There is one in a module: inside every caller it would take long to compile.
    """

    def function(module):
        if name not in module.globals:
            made = ir.Function(module, ir.FunctionType(ir.VoidType(), [_WORD] * count), name)
            made.linkage = "linkonce_odr"
            made.attributes.add("noinline")
            builder = ir.IRBuilder(made.append_basic_block())
            write(builder, *made.args)
            builder.ret_void()
        return module.globals[name]

    def call(_, *arguments):
        def build(context, builder, signature, values):
            builder.call(function(builder.module), values)
            return values[0]

        return types.intp(*[types.intp] * count), build

    names = ["_", *(f"word{k}" for k in range(count))]
    call.__signature__ = inspect.Signature([inspect.Parameter(name, _POSITIONAL) for name in names])  # type: ignore[attr-defined]
    return intrinsic(call)


@intrinsic
def add(_, address, amount):
    """The word at an address before `amount` is added to it, atomically."""

    def build(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.inttoptr(values[0], _WORD.as_pointer()), values[1], "seq_cst")

    return types.intp(types.intp, types.intp), build


@intrinsic
def replace(_, address, expected, value):
    """The word at an address before, atomically, it became `value` if it was `expected`."""

    def build(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _WORD.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, *values[1:], "seq_cst"), 0)

    return types.intp(types.intp, types.intp, types.intp), build


@intrinsic
def _prefetch(_, address, write):
    def build(context, builder, signature, values):
        word = ir.IntType(32)
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, word(0), word(3), word(1)])
        return values[0]

    return types.intp(types.intp, types.intp), build


@njit
def prefetch(address, count):
    """Ask for `count` float32 at an address to come nearer."""
    for line in range(0, 4 * count, 64):
        _prefetch(address + line, 0)


def _call(builder, values):
    """Call the C function at an address; every argument and the result are words."""
    function = ir.FunctionType(_WORD, [_WORD] * (len(values) - 1))
    return builder.call(builder.inttoptr(values[0], function.as_pointer()), values[1:])


@intrinsic
def call(_, function, argument):
    """Call the C function at an address with one word; it gives one."""
    return types.intp(types.intp, types.intp), lambda context, builder, signature, values: _call(builder, values)


@intrinsic
def call_with_two(_, function, first, second):
    """Call the C function at an address with two words; it gives one."""
    signature = types.intp(types.intp, types.intp, types.intp)
    return signature, lambda context, builder, signature, values: _call(builder, values)


def symbol(name: str, address: int) -> Any:
    """A function for compiled code that gives `address`, as a word, through the symbol `name`."""
    binding.add_symbol(name, address)

    @intrinsic
    def get(_):
        def build(context, builder, signature, values):
            known = builder.module.globals.get(name)
            return builder.ptrtoint(known or ir.GlobalVariable(builder.module, ir.IntType(8), name), _WORD)

        return types.intp(), build

    return get


def address_of(function: Any) -> int:
    """The address of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _of_posix(name: str) -> Any:
    """A C function of the system, or one that does nothing where there is none."""
    found = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return found or ctypes.pythonapi.PyThread_get_thread_ident


_yield_address = symbol("spyx_yield", address_of(_of_posix("sched_yield")))
_gettime_address = symbol("spyx_gettime", address_of(_of_posix("clock_gettime")))
_MONOTONIC = getattr(time, "CLOCK_MONOTONIC", -1)
CLOCK = os.name == "posix" and _MONOTONIC >= 0
"""Whether there is one, `nanoseconds`."""


@register_jitable
def piece(address, count):
    """The address of `count` float32 from a cache line on, and the address behind them."""
    begin = (address + 4 * LINE - 1) // (4 * LINE) * (4 * LINE)
    return begin, begin + 4 * count


@njit
def pause():
    """Let another thread run."""
    call(_yield_address(), 0)


@njit
def nanoseconds(memory):
    """Of a clock that never goes back; `memory` is the address of two words for it."""
    call_with_two(_gettime_address(), _MONOTONIC, memory)
    parts = words(memory, 2)
    return 1_000_000_000 * parts[0] + parts[1]


@njit
def wait_for(address, count):
    """Return when the word at an address is at least `count`; other threads may run meanwhile."""
    while add(address, 0) < count:
        pause()


def _array_of(dtype: Any, doc: str) -> Any:
    """A function for compiled code, inside every caller: called by literals too, it would be compiled for each."""
    kind = types.Array(dtype, 1, "C")

    def get(_, address, count):
        def build(context, builder, signature, values):
            array = arrayobj.make_array(kind)(context, builder)
            size = context.get_constant(types.intp, dtype.bitwidth // 8)
            data, shape = builder.inttoptr(values[0], array.data.type), cgutils.pack_array(builder, [values[1]])
            arrayobj.populate_array(array, data, shape, cgutils.pack_array(builder, [size]), size, meminfo=None)
            return array._getvalue()

        return kind(types.intp, types.intp), build

    get.__doc__ = doc
    return intrinsic(get)


words = _array_of(types.int64, "The int64 array of `count` elements at an address.")
floats = _array_of(types.float32, "The float32 array of `count` elements at an address.")
ints = _array_of(types.int32, "The int32 array of `count` elements at an address.")
flags = _array_of(types.uint8, "The array of `count` booleans, as uint8, at an address.")


@intrinsic
def clear(_, to, count):
    """Set `count` float32 at an address to 0."""

    def build(context, builder, signature, values):
        to = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        cgutils.memset(builder, to, builder.mul(values[1], _WORD(4)), 0)
        return values[1]

    return types.intp(types.intp, types.intp), build


@intrinsic
def copy(_, to, address, count):
    """Copy `count` float32 from one address to another: faster than numba's assignment to a slice."""

    def build(context, builder, signature, values):
        to, given = (builder.inttoptr(value, ir.IntType(8).as_pointer()) for value in values[:2])
        cgutils.raw_memcpy(builder, to, given, values[2], 4)
        return values[2]

    return types.intp(types.intp, types.intp, types.intp), build
