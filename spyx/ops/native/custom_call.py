"""Kernels written for numba as one XLA custom call, their work spread over the threads of XLA's own CPU pool.

The threads that take part draw items from a counter until none is left, the calling thread among them. It waits for
items that others have begun, never for a thread to become free, so calls from many threads at once, or from inside
the pool, cannot block one another. Threads of an earlier call may still be `waiting`: they come first.

Source: the C interface of XLA custom calls, `xla/ffi/api/c_api.h`, version 0.1 and later, which jaxlib ships.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numba import cfunc, njit, types
from numba import config as _config

from ..._collector import paused
from .memory import LINE, add, address_of, call, call_with_two, clear, ints, piece, symbol, wait_for, words
from .tiles import TILES
from .waiting import hand_over, next_call

_TARGET = "spyx_native"
_SLOTS = 1 << 12
_LITTLE = 1 << 14
"""A call with fewer numbers in and out stays in the calling thread."""
_EXECUTE, _METADATA, _VERSION = 3, 1, 1 << 32
_POOL_SCHEDULE, _POOL_SIZE = 17, 18
"""Positions, in words, of XLA_FFI_ThreadPool_Schedule and XLA_FFI_ThreadPool_NumThreads in XLA_FFI_Api."""
_NEXT, _DONE, _HOLDERS, _ITEMS, _KERNEL, _IN_VAIN, _THREADS, _REQUEST, _BUFFERS = 0, 1, 2, 3, 4, 5, 6, 7, 12
"""Where things lie, in words, in the memory that the threads of one call share."""

_TASK, _HANDLER = -1, -2
config: Any = _config
_lock = threading.Lock()
_functions: dict[int, Callable[[int, int], None]] = {}
_compiled: dict[int, Any] = {}
_kernels = np.zeros(_SLOTS, np.int64)
_in_vain = np.zeros(_SLOTS, np.int64)

_malloc_address = symbol("spyx_malloc", address_of(ctypes.pythonapi.PyMem_RawMalloc))
_free_address = symbol("spyx_free", address_of(ctypes.pythonapi.PyMem_RawFree))
_kernels_address = symbol("spyx_kernels", _kernels.ctypes.data)
_in_vain_address = symbol("spyx_in_vain", _in_vain.ctypes.data)


def _cache_directory() -> str:
    """Where numba keeps compiled code, one folder for each state of this package and for the matrix units in use.

    Empty if nothing can be written.
    """
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))) + bytes([TILES])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "spyx", hashlib.sha256(sources).hexdigest()[:16])
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return ""
    return folder if os.access(folder, os.W_OK) else ""


def _compile(function: Callable[..., Any], signature: Any) -> Any:
    """`numba.cfunc`, its result kept on disk. numba looks for changes in one file alone, hence the own folder.

    Kernels have no expressions of whole arrays: what rewrites them would only take time.
    """
    folder, before = _cache_directory(), config.CACHE_DIR
    config.CACHE_DIR = folder
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "no_rewrites": True}
    try:
        with paused():
            return cfunc(signature, cache=bool(folder), **options)(function)
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable[[int, int], None]) -> int:
    """The number, for `invoke`, of `function(item, buffers)`, which does one of the independent items of a call.

    It is compiled when first invoked and runs in many threads at once, without the GIL. `buffers` is the address of a
    row of words: the addresses of the operands, of the counters if there are any, then of the results. The first
    operand is int32: the number of the kernel (or its complement), that of the items, that of the counters, and the
    sizes given to `invoke`. Counters are words, 0 before the first item, each on a cache line (`LINE`) of its own. The
    address of a local array is good until its last use as an array: numba frees it there.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    number = zlib.crc32(name.encode()) % _SLOTS
    if _functions.setdefault(number, function) is not function:
        raise ValueError(f"{name} has the number of {_functions[number].__qualname__}, {number}; rename one of them")
    return number


def invoke(
    number: int,
    items: int,
    sizes: Sequence[int],
    operands: Sequence[jax.Array],
    results: Any,
    counters: int = 0,
) -> Any:
    """The results, a pytree of `jax.ShapeDtypeStruct`, of a kernel over `operands`, to be lowered for CPU."""
    with _lock:
        _register()
        if number not in _compiled:
            _compiled[number] = _compile(_functions[number], types.void(types.intp, types.intp))
            _kernels[number] = _compiled[number].address
    numbers = sum(math.prod(v.shape) for v in (*operands, *jax.tree.leaves(results)))
    table = np.array([number if numbers > _LITTLE else ~number, items, counters, *sizes], np.int32)
    return jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")(table, *operands)


@njit
def _release(shared):
    if add(shared + 8 * _HOLDERS, -1) == 1:
        call(_free_address(), shared)


@njit
def _work(shared):
    state = words(shared, _BUFFERS)
    while True:
        item = add(shared + 8 * _NEXT, 1)
        if item >= state[_ITEMS]:
            return
        call_with_two(state[_KERNEL], item, shared + 8 * _BUFFERS)
        add(shared + 8 * _DONE, 1)


def _task(shared):
    while shared != 0:
        _work(shared)
        in_vain = words(shared, _BUFFERS)[_IN_VAIN]
        _release(shared)
        shared = next_call(in_vain)
    return 0


_addresses = np.zeros(1, np.int64)
_task_address = symbol("spyx_task", _addresses.ctypes.data)


@njit
def _answer(extension):
    """Say for which version of the interface this module was written."""
    question = words(extension, 4)
    if question[1] & 0xFFFFFFFF == _METADATA:
        words(question[3], 4)[3] = _VERSION


@njit
def _collect(count, buffers, into):
    for i in range(count):
        words(into, count)[i] = words(words(buffers, count)[i], 4)[3]


def _handler(frame_address):
    """XLA_FFI_Handler: its argument is an XLA_FFI_CallFrame, its result a null pointer, no error."""
    frame = words(frame_address, 15)
    if frame[1] != 0:
        _answer(frame[1])
        return 0
    if frame[4] & 0xFFFFFFFF != _EXECUTE:
        return 0
    api, context, operands, results = words(frame[2], 19), frame[3], frame[7], frame[12]
    table = ints(words(words(frame[9], 1)[0], 4)[3], 3)
    number, items, counters = table[0], table[1], table[2]
    shared = call(_malloc_address(), 8 * (_BUFFERS + operands + 1 + results) + 4 * LINE * (counters + 1))
    state = words(shared, _BUFFERS)
    others = shared + 8 * (_BUFFERS + operands)
    _collect(operands, frame[9], shared + 8 * _BUFFERS)
    if counters > 0:
        words(others, 1)[0] = piece(others + 8 * (1 + results), 0)[0]
        clear(words(others, 1)[0], LINE * counters)
        others += 8
    _collect(results, frame[14], others)
    alone = number < 0 or items < 2
    number = ~number if number < 0 else number
    state[_NEXT], state[_DONE], state[_ITEMS] = 0, 0, items
    state[_KERNEL], state[_IN_VAIN] = words(_kernels_address(), _SLOTS)[number], _in_vain_address() + 8 * number

    request = shared + 8 * _REQUEST
    state[_THREADS] = 1
    state[_REQUEST], state[_REQUEST + 1], state[_REQUEST + 2] = 32, 0, context
    state[_REQUEST + 3] = shared + 8 * _THREADS
    helpers = 0
    if not alone and call(api[_POOL_SIZE], request) == 0:
        helpers = max(min(state[_THREADS], items) - 1, 0)
    state[_HOLDERS] = helpers + 1
    state[_REQUEST], state[_REQUEST + 3], state[_REQUEST + 4] = 40, words(_task_address(), 1)[0], shared
    for _ in range(hand_over(shared, helpers)):
        if call(api[_POOL_SCHEDULE], request) != 0:
            add(shared + 8 * _HOLDERS, -1)
    _work(shared)
    wait_for(shared + 8 * _DONE, items)
    _release(shared)
    return 0


def _register() -> None:
    """Make the target known to XLA, once."""
    if _HANDLER in _compiled:
        return
    word = types.intp(types.intp)
    _compiled[_TASK] = task = _compile(_task, word)
    _addresses[0] = task.address
    _compiled[_HANDLER] = handler = _compile(_handler, word)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.argtypes, capsule.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
    jax.ffi.register_ffi_target(_TARGET, capsule(handler.address, None, None), platform="cpu")
