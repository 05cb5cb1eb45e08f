"""Reading `.safetensors` as views of the mapped file."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, CorruptCheckpointError
from .json_file import unique
from .source import Source, reading

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
"""The format's names of element types."""


def read_safetensors(source: Source) -> dict[str, np.ndarray]:
    """Every tensor of the file, as read-only views of the mapping.

    The safetensors library checks the file (header, offsets, coverage); the views are made here because its
    NumPy face copies and knows no bfloat16.

    Raises:
        CorruptCheckpointError: the library refuses the file, or a name occurs twice.
        CheckpointError: a dtype without a NumPy counterpart.
    """
    try:
        with safe_open(source.path, framework="numpy"):
            pass
    except SafetensorError as err:
        raise CorruptCheckpointError(f"{source.path} is not a sound safetensors file: {str(err)[:200]}") from err
    with reading(source.path):
        start = 8 + int.from_bytes(source.data[:8], "little")
        header = json.loads(bytes(source.data[8:start]), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        return {name: _view(source, start, name, entry) for name, entry in header.items()}


def _view(source: Source, start: int, name: str, entry: dict) -> np.ndarray:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"tensor {name[:80]!r} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}")
    return np.ndarray(entry["shape"], dtype, buffer=source.data, offset=start + entry["data_offsets"][0])
