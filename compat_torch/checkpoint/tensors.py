"""The builders of torch pickles: storages and strided tensors, as NumPy arrays on the file's bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from ..errors import CorruptCheckpointError
from .records import Global, Record
from .unpickle import Builder, Charge

MAX_EXPANDED = 64 << 20
"""Bytes a tensor that repeats its storage (stride 0, overlapping strides) may span."""


@dataclass(frozen=True)
class StorageType:
    """A storage class of torch: its element type."""

    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Storage:
    """`nbytes` bytes of elements; `buffer` is None while only the layout of a file is being found out."""

    dtype: np.dtype
    nbytes: int
    buffer: memoryview | None


STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": np.uint8,
}
_DTYPES = {
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}

CONSTANTS: dict[str, object] = {
    **{f"torch.{name}": StorageType(np.dtype(kind)) for name, kind in STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(np.dtype(np.uint8)),
    **{f"torch.{name}": np.dtype(kind) for name, kind in _DTYPES.items()},
}


def is_count(value: object) -> TypeGuard[int]:
    """True for an int in [0, 2**63), the only thing a size, stride or offset can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def make_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, metadata: Any, charge: Charge, dtype: Any = None
) -> np.ndarray | Record:
    """A read-only strided view of `storage`, after checking that it lies inside.

    Args:
        storage: where the elements are; a `Record` (a storage class not known here) gives a `Record`.
        offset: first element.
        size, stride: tuples of equal length, in elements.
        metadata: {"conj": True, "neg": True} for lazily conjugated or negated tensors, else None or {}.
        charge: counts the copy that `metadata` asks for.
        dtype: element type, where it is not the storage's.

    Raises:
        CorruptCheckpointError: any of them is impossible.
    """
    if isinstance(storage, Record):
        return Record(storage.name)
    if not isinstance(storage, Storage):
        raise CorruptCheckpointError(f"a tensor is built on a {type(storage).__name__}, not on a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, np.dtype):
        raise CorruptCheckpointError("a tensor is built with a dtype that is none")
    if not (
        is_count(offset)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= 64
        and all(is_count(value) for value in size + stride)
    ):
        raise CorruptCheckpointError("a tensor is built with an impossible offset, size or stride")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last + 1) * dtype.itemsize > storage.nbytes:
        raise CorruptCheckpointError(
            f"a tensor of shape {size} and strides {stride} at offset {offset} needs "
            f"{(last + 1) * dtype.itemsize} bytes, its storage has {storage.nbytes}"
        )
    if count * dtype.itemsize > max(storage.nbytes, MAX_EXPANDED):
        raise CorruptCheckpointError(f"a tensor of shape {size} repeats a storage of {storage.nbytes} bytes")
    if count == 0 or storage.buffer is None:
        return np.empty(size if count == 0 else 0, dtype)
    array = np.ndarray(
        size,
        dtype,
        buffer=storage.buffer,
        offset=offset * dtype.itemsize,
        strides=tuple(step * dtype.itemsize for step in stride),
    )
    return _lazy_bits(array, metadata, charge)


def _lazy_bits(array: np.ndarray, metadata: object, charge: Charge) -> np.ndarray:
    if not metadata:
        return array
    if not isinstance(metadata, dict) or not metadata.keys() <= {"conj", "neg"}:
        raise CorruptCheckpointError("a tensor has metadata other than its conj and neg bits")
    for bit, apply in (("conj", np.conj), ("neg", np.negative)):
        if metadata.get(bit):
            charge(array.nbytes)
            array = apply(array)
    return array


def _tensor(args: tuple, charge: Charge) -> object:
    match args:
        case (storage, offset, size, stride) | (storage, offset, size, stride, _, _):
            return make_tensor(storage, offset, size, stride, None, charge)
        case (storage, offset, size, stride, _, _, metadata):
            return make_tensor(storage, offset, size, stride, metadata, charge)
    raise CorruptCheckpointError(f"a tensor is built from {len(args)} fields")


def _tensor_v3(args: tuple, charge: Charge) -> object:
    match args:
        case (storage, offset, size, stride, _, _, dtype):
            return make_tensor(storage, offset, size, stride, None, charge, dtype)
        case (storage, offset, size, stride, _, _, dtype, metadata):
            return make_tensor(storage, offset, size, stride, metadata, charge, dtype)
    raise CorruptCheckpointError(f"a tensor is built from {len(args)} fields")


def _parameter(args: tuple, _: Charge) -> object:
    if 1 <= len(args) <= 4 and isinstance(args[0], np.ndarray | Record):
        return args[0]
    raise CorruptCheckpointError("a parameter is built from something that is not a tensor")


_PLAIN_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


def _from_type(args: tuple, charge: Charge) -> object:
    match args:
        case (Global() as rebuild, Global() as kind, tuple() as fields, _):
            builder = _TENSOR_BUILDERS.get(rebuild.name)
            if builder is None or kind.name not in _PLAIN_TENSORS:
                return Record(kind.name, args)
            return builder(fields, charge)
    raise CorruptCheckpointError("a tensor subclass is built from the wrong fields")


def _size(args: tuple, _: Charge) -> tuple:
    if len(args) != 1 or not isinstance(args[0], tuple) or not all(is_count(value) for value in args[0]):
        raise CorruptCheckpointError("a torch.Size is built from something that is not a tuple of sizes")
    return args[0]


def _device(args: tuple, charge: Charge) -> str:
    if len(args) not in (1, 2) or not isinstance(args[0], str) or not all(is_count(arg) for arg in args[1:]):
        raise CorruptCheckpointError("a torch.device is built from something that is not a name")
    charge(len(args[0]))
    return ":".join(str(arg) for arg in args)


_TENSOR_BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
BUILDERS: dict[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
}
