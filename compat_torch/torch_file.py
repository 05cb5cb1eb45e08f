"""Writing what torch.load reads, tensor by tensor: torch.save would hold a copy of every transposed tensor at once."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from .arrays import PIECE, contiguous, release
from .checkpoint.tensors import STORAGES

_ALIGNMENT = 64
_CLASSES = {np.dtype(kind): name for name, kind in STORAGES.items() if name != "UntypedStorage"}


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    kind: Any
    size: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


def write_torch(
    stream: IO[bytes], tensors: Mapping[str, Any], progress: Callable[[int, int], object] | None = None
) -> None:
    """The file torch.save makes of {name: tensor}; arrays that share memory are written once and stay tied.

    Args:
        stream: a binary file open for writing.
        tensors: name -> array, of any strides; in the file they are in C order.
        progress: called with (bytes written, bytes in all).

    Raises:
        ImportError: torch is not installed.
        TypeError: a dtype that torch has no storage class for.
    """
    try:
        import torch
    except ImportError as err:
        raise ImportError("writing pytorch_model.bin needs torch: pip install 'spyx-torch[torch]'") from err
    arrays: list[np.ndarray] = []
    content: dict[str, _Tensor] = {}
    known: dict[tuple, _Storage] = {}
    for name in tensors:
        array = np.asarray(tensors[name])
        if array.dtype not in _CLASSES:
            raise TypeError(
                f"{name!r} has dtype {array.dtype}, which torch files do not have ({', '.join(map(str, _CLASSES))})"
            )
        place = (array.__array_interface__["data"][0], array.strides, array.shape, array.dtype)
        if place not in known or not array.size:
            kind = getattr(torch, _CLASSES[array.dtype])
            known[place] = _Storage(str(len(arrays)), kind, array.size)
            arrays.append(array)
        content[name] = _Tensor(known[place], array.shape)
    total, written = sum(array.nbytes for array in arrays), 0
    with zipfile.ZipFile(stream, "w") as archive:
        _write(archive, "data.pkl", [_pickled(torch, content)])
        _write(archive, "byteorder", [b"little"])
        for number, array in enumerate(arrays):
            data = contiguous(array).reshape(-1).view(np.uint8)
            _write(archive, f"data/{number}", [data[i : i + PIECE].data for i in range(0, len(data), PIECE)])
            release(array)
            written += len(data)
            if progress is not None:
                progress(written, total)
        _write(archive, "version", [b"3\n"])


def _pickled(torch: Any, content: dict[str, _Tensor]) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", obj.kind, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, _Tensor):
                return NotImplemented
            strides = tuple(int(np.prod(obj.shape[axis + 1 :], dtype=object)) for axis in range(len(obj.shape)))
            fields = (obj.storage, 0, obj.shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, fields

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def _write(archive: zipfile.ZipFile, name: str, chunks: list[Any]) -> None:
    """An uncompressed entry whose data is aligned as torch aligns it."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    size = sum(len(chunk) for chunk in chunks)
    large = size >= zipfile.ZIP64_LIMIT // 2
    start = archive.fp.tell() + 30 + len(entry.filename) + (20 if large else 0)  # type: ignore[union-attr]
    padding = -(start + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(entry, "w", force_zip64=large) as file:
        for chunk in chunks:
            file.write(chunk)
