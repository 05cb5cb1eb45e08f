"""The zip format of torch.save (torch >= 1.6): `<root>/data.pkl` and one entry per storage."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from ..arrays import release
from ..errors import CheckpointError, CorruptCheckpointError
from .records import Global, Record
from .source import Source, reading
from .tensors import BUILDERS, CONSTANTS, Storage, StorageType, is_count
from .unpickle import RestrictedUnpickler

MAX_RATIO = 100
"""How many times its compressed size an entry may have (torch itself does not compress)."""

ALLOWANCE = 64 << 20
"""Bytes that may be allocated over and above a multiple of the file's size."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class TorchContents:
    """What a torch file holds.

    Attributes:
        content: the object saved: plain containers, arrays (read-only views of the file), inert records.
        replaced: dotted names of the classes and functions that were not rebuilt.
    """

    content: object
    replaced: tuple[str, ...]


def read_torch_zip(source: Source) -> TorchContents:
    """Read a zip file of torch.save without torch and without running anything in it.

    Raises:
        CorruptCheckpointError: truncated, damaged or malicious.
        CheckpointError: a TorchScript or torch.export archive, or big-endian data.
    """
    with reading(source.path), zipfile.ZipFile(source.path) as archive:
        records = _Records(source, archive)
        allowance = ALLOWANCE + 4 * source.size
        unpickler = RestrictedUnpickler(BUILDERS, CONSTANTS, records.storage, allowance)
        content = unpickler.load(io.BytesIO(records.read("data.pkl")))
        return TorchContents(content, unpickler.replaced)


class _Records:
    """The entries below the archive's one root folder."""

    def __init__(self, source: Source, archive: zipfile.ZipFile):
        self._source = source
        self._archive = archive
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._buffers: dict[str, memoryview] = {}
        self._allowance = ALLOWANCE + MAX_RATIO * source.size
        for entry in archive.infolist():
            if entry.filename in self._entries:
                raise CorruptCheckpointError(f"the archive has two entries {entry.filename[:80]!r}")
            self._entries[entry.filename] = entry
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                "a zip archive without the data.pkl of torch.save (a NumPy .npz, a torch.export .pt2, ...): "
                "save the state_dict with torch.save or as safetensors"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "constants.pkl" in self._entries:
            raise CheckpointError("a TorchScript archive: load it in torch and save its state_dict()")
        if self._root + "byteorder" in self._entries and bytes(self.read("byteorder")) != b"little":
            raise CheckpointError("saved on a big-endian machine, which is not supported")

    def storage(self, pid: object) -> Storage | Record:
        """Resolve the persistent id ("storage", storage class, key, location, number of elements)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] in ("storage", b"storage")):
            raise CorruptCheckpointError("a persistent id that is not a storage")
        _, kind, key, _, count = pid
        if isinstance(kind, Global):
            return Record(kind.name)
        if not (isinstance(kind, StorageType) and isinstance(key, str) and is_count(count)):
            raise CorruptCheckpointError("a storage with an impossible class, key or size")
        if key not in self._buffers:
            self._buffers[key] = self.read(f"data/{key}")
        buffer, nbytes = self._buffers[key], count * kind.dtype.itemsize
        if nbytes > len(buffer):
            raise CorruptCheckpointError(f"storage {key[:40]!r} should have {nbytes} bytes, the file has {len(buffer)}")
        return Storage(kind.dtype, nbytes, buffer)

    def read(self, name: str) -> memoryview:
        """The bytes of an entry: a view of the mapped file where it is not compressed."""
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise CorruptCheckpointError(f"the archive has no entry {name[:80]!r}")
        if entry.flag_bits & 1:
            raise CorruptCheckpointError(f"the entry {name[:80]!r} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED:
            return self._decompress(entry)
        data = self._source.data
        magic, name_size, extra_size = _LOCAL_HEADER.unpack_from(data, entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + name_size + extra_size
        if magic != b"PK\x03\x04" or entry.file_size != entry.compress_size:
            raise CorruptCheckpointError(f"the entry {name[:80]!r} has a damaged header")
        view = data[start : start + entry.file_size]
        if len(view) != entry.file_size:
            raise CorruptCheckpointError(f"the entry {name[:80]!r} is cut off")
        # torch writes 0 for every entry under set_crc32_options(False)
        damaged = entry.CRC and zlib.crc32(view) != entry.CRC
        release(np.frombuffer(view, np.uint8))
        if damaged:
            raise CorruptCheckpointError(f"the entry {name[:80]!r} is damaged: its checksum does not match")
        return view

    def _decompress(self, entry: zipfile.ZipInfo) -> memoryview:
        self._allowance -= entry.file_size
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1 << 10) or self._allowance < 0:
            raise CorruptCheckpointError(
                f"the entry {entry.filename[:80]!r} would grow from {entry.compress_size} to "
                f"{entry.file_size} bytes; torch stores entries uncompressed"
            )
        return memoryview(self._archive.read(entry))
