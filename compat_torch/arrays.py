"""Moving tensors of a checkpoint: copies at memory speed, mapped pages given back, NaN and infinities counted."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

PIECE = 1 << 18
"""Bytes of one write to a file: larger ones make Linux look for larger pieces of memory, often memory not used yet."""

_ALIGNMENT = 64
_TILE_LONG, _TILE_SHORT = 256, 64
_THREADED_BYTES = 4 << 20
_MAPPED_BYTES = 1 << 20
_INFINITY = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
_AS_VIEWS: ContextVar[bool] = ContextVar("_AS_VIEWS", default=False)


@contextlib.contextmanager
def as_views() -> Iterator[None]:
    """Inside, `to_device` copies nothing: a module that is loaded to be written again holds views of its file."""
    token = _AS_VIEWS.set(True)
    try:
        yield
    finally:
        _AS_VIEWS.reset(token)


def keeps_views() -> bool:
    """Whether the caller is inside `as_views`."""
    return _AS_VIEWS.get()


def to_device(array: np.ndarray, dtype: DTypeLike | None = None) -> jax.Array | np.ndarray:
    """A copy of `array` on JAX's default device, whatever its strides; inside `as_views` the array itself.

    One copy in host memory is made, laid out as JAX takes it over without another on the CPU.

    Args:
        array: any shape and strides; except inside `as_views` it may be changed afterwards.
        dtype: of the result; None keeps it.
    """
    if _AS_VIEWS.get():
        return array.astype(dtype or array.dtype, copy=False)
    result = _aligned(array.shape, np.dtype(dtype or array.dtype))
    copy_into(result, array)
    result.flags.writeable = False
    return jax.device_put(result)


def contiguous(array: Any) -> np.ndarray:
    """`array` in C order: itself if it is, else a copy.

    Args:
        array: anything NumPy makes an array of; of a JAX array on the CPU the memory is shared.
    """
    array = np.asarray(array)
    if array.flags.c_contiguous:
        return array
    result = _aligned(array.shape, array.dtype)
    copy_into(result, array)
    return result


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` for equal shapes: transposed matrices tile by tile, large ones by several threads."""
    if target.ndim == 3 and target.shape[1] == 1:
        target, source = target[:, 0], source[:, 0]
    tiled = target.ndim == 2 and source.strides[0] < source.strides[1]
    copy = _copy_tiled if tiled else _copy_plain
    workers = min(4, os.cpu_count() or 1, len(target) if target.ndim else 1)
    if target.nbytes < _THREADED_BYTES or workers == 1:
        copy(target, source)
        return
    step = -(-len(target) // workers)
    with ThreadPoolExecutor(workers) as pool:
        parts = [slice(start, start + step) for start in range(0, len(target), step)]
        list(pool.map(lambda part: copy(target[part], source[part]), parts))


def release(array: np.ndarray) -> None:
    """Give back the resident pages of a memory-mapped array; reading it again takes them from the file.

    Nothing happens to arrays that are not views of a file mapped for reading.
    """
    mapping = _mapping_of(array)
    if mapping is None or not array.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(array)
    page = mmap.PAGESIZE
    start, stop = (low - first) // page * page, min(-(-(high - first) // page) * page, len(mapping))
    mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def count_nonfinite(array: Any) -> int:
    """How many elements are NaN or infinite (0 for integers and booleans).

    Args:
        array: real or complex, of any of NumPy's or ml_dtypes' element types.
    """
    array = np.asarray(array)
    if all_finite(array):
        return 0
    with np.errstate(invalid="ignore"):
        return int(array.size - np.count_nonzero(np.isfinite(array)))


def all_finite(array: np.ndarray) -> bool:
    """Whether nothing is NaN or infinite.

    A sum says so at the speed of memory, unless it overflows; of 16-bit elements the greatest patterns of bits of
    either sign do.

    Args:
        array: as for `count_nonfinite`.
    """
    if array.dtype.kind in "iub" or not array.size:
        return True
    if array.dtype in _INFINITY:
        infinity = _INFINITY[array.dtype]
        return bool(array.view(np.int16).max() < infinity and array.view(np.uint16).max() < infinity + 0x8000)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((array.dtype.kind == "f" and np.isfinite(array.sum())) or np.isfinite(array).all())


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes over on the CPU as it is; large arrays are mappings of their own, without huge pages."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _MAPPED_BYTES:
        return np.frombuffer(_mapped(nbytes), dtype).reshape(shape)
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _mapped(nbytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def _copy_plain(target: np.ndarray, source: np.ndarray) -> None:
    np.copyto(target, source, casting="unsafe")


def _copy_tiled(target: np.ndarray, source: np.ndarray) -> None:
    rows, columns = target.shape
    for column in range(0, columns, _TILE_SHORT):
        across = slice(column, column + _TILE_SHORT)
        for row in range(0, rows, _TILE_LONG):
            down = slice(row, row + _TILE_LONG)
            np.copyto(target[down, across], source[down, across], casting="unsafe")


def _mapping_of(array: Any) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    while isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None
