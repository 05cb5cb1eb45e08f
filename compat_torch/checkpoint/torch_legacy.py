"""The format of torch.save before torch 1.6 (and of `_use_new_zipfile_serialization=False`).

Pickles one after the other: magic number, protocol version, system information, the object, the storage keys;
then for each key an int64 element count and the elements.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError
from .records import Global, Record
from .source import Source, reading
from .tensors import BUILDERS, CONSTANTS, Storage, StorageType, is_count
from .torch_zip import ALLOWANCE, TorchContents
from .unpickle import RestrictedUnpickler

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_legacy(source: Source) -> TorchContents:
    """Read a pre-zip file of torch.save without torch and without running anything in it.

    The object is interpreted twice: the first time only the storages' element types are learnt, which say
    where in the file each storage lies.

    Raises:
        CorruptCheckpointError: truncated, damaged or malicious.
        CheckpointError: a pickle that torch.save did not write, or big-endian data.
    """
    with reading(source.path):
        layout = _Layout(source)
        file = source.mapping
        file.seek(0)
        allowance = ALLOWANCE + 4 * source.size
        unpickler = RestrictedUnpickler(BUILDERS, CONSTANTS, layout.storage, allowance)
        if unpickler.load(file) != _MAGIC:
            raise CheckpointError("a plain Python pickle, not a file of torch.save, which is not read")
        if unpickler.load(file) != _PROTOCOL:
            raise CorruptCheckpointError("an unknown version of torch's old format")
        system = unpickler.load(file)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise CheckpointError("saved on a big-endian machine, which is not supported")
        start = file.tell()
        unpickler.load(file)
        layout.place(unpickler.load(file), file.tell())
        file.seek(start)
        return TorchContents(unpickler.load(file), unpickler.replaced)


class _Layout:
    """The storages of the file: element types first, then, once `place` is called, their bytes."""

    def __init__(self, source: Source):
        self._source = source
        self._itemsizes: dict[str, int] = {}
        self._buffers: dict[str, memoryview] = {}
        self._placed = False

    def place(self, keys: Any, position: int) -> None:
        """Find the bytes of the storages `keys`, which follow each other from `position`."""
        data = self._source.data
        if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise CorruptCheckpointError("the list of storages is not a list of names")
        for key in keys:
            if key in self._buffers or key not in self._itemsizes:
                raise CorruptCheckpointError(f"storage {key[:40]!r} is listed twice or used by no tensor")
            start = position + 8
            nbytes = int.from_bytes(data[position:start], "little") * self._itemsizes[key]
            position = start + nbytes
            if position > self._source.size:
                raise CorruptCheckpointError(f"storage {key[:40]!r} is cut off")
            self._buffers[key] = data[start:position]
        self._placed = True

    def storage(self, pid: Any) -> Storage | Record | object:
        """Resolve ("storage", class, key, location, count, view) or ("module", class, file, source)."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] in ("module", b"module"):
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] in ("storage", b"storage")):
            raise CorruptCheckpointError("a persistent id that is not a storage")
        _, kind, key, _, count, view = pid
        if isinstance(kind, Global):
            raise CheckpointError(f"storages of class {kind.name} are not supported")
        if not (isinstance(kind, StorageType) and isinstance(key, str) and is_count(count)):
            raise CorruptCheckpointError("a storage with an impossible class, key or size")
        itemsize = kind.dtype.itemsize
        self._itemsizes.setdefault(key, itemsize)
        offset = 0
        if view is not None:
            if not (isinstance(view, tuple) and len(view) == 3 and is_count(view[1]) and is_count(view[2])):
                raise CorruptCheckpointError("a view of a storage with an impossible offset or size")
            _, offset, count = view
        nbytes = count * itemsize
        if not self._placed:
            return Storage(kind.dtype, nbytes, None)
        buffer = self._buffers.get(key)
        if buffer is None or offset * itemsize + nbytes > len(buffer):
            raise CorruptCheckpointError(f"storage {key[:40]!r} is missing or shorter than its tensors need")
        return Storage(kind.dtype, nbytes, buffer[offset * itemsize : offset * itemsize + nbytes])
