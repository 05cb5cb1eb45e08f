"""A checkpoint file mapped into memory, and what kind of file it is, judged by content."""

from __future__ import annotations

import mmap
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError, CorruptCheckpointError

Kind = Literal["safetensors", "torch zip", "torch legacy"]

MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What parsing hostile bytes with the standard library can raise."""

_NOT_CHECKPOINTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<", "is an HTML or XML page, not a checkpoint: the download gave a web page"),
    (b"\x89HDF", "is an HDF5 file, which is not read here"),
    (b"GGUF", "is a GGUF file, which is not read here"),
    (b"\x1f\x8b", "is gzip-compressed: decompress it first"),
    (b"\x93NUMPY", "is a NumPy array file, which is not read here"),
)


@dataclass(frozen=True)
class Source:
    """A file of `size` bytes at `path`, mapped read-only; arrays that view it keep the mapping alive."""

    path: str
    size: int
    mapping: mmap.mmap

    @property
    def data(self) -> memoryview:
        return memoryview(self.mapping)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever goes wrong while parsing `path` into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError as err:
        raise type(err)(f"{path}: {err}") from err
    except MALFORMED as err:
        raise CorruptCheckpointError(
            f"{path}: the file is truncated or damaged ({type(err).__name__}: {str(err)[:200]})"
        ) from err


def open_source(path: str | os.PathLike[str]) -> Source:
    """Map a regular, non-empty file.

    Raises:
        FileNotFoundError, PermissionError: as `open` does.
        CheckpointError: the path is a directory, a pipe or a device, or no path at all.
        CorruptCheckpointError: the file is empty.
    """
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{name[:200]!r} cannot be opened: {str(err)[:80]}") from err
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{name} is a directory: pass the checkpoint file inside it")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{name} is not a regular file")
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CorruptCheckpointError(f"{name} is empty")
        return Source(name, size, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def kind_of(source: Source) -> Kind:
    """Tell the kind of file from its first bytes; the extension is not looked at.

    Raises:
        CheckpointError: the old tar format of torch < 0.1.10, which is not read.
        CorruptCheckpointError: not a checkpoint; the message says what it looks like.
    """
    head = bytes(source.data[:512])
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch legacy"
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{source.path} is a tar file, the checkpoint format of torch before 0.1.10, which is not read: "
            "load it with an old torch and save it again"
        )
    for magic, what in _NOT_CHECKPOINTS:
        if head.lstrip().startswith(magic):
            raise CorruptCheckpointError(f"{source.path} {what}")
    raise CorruptCheckpointError(
        f"{source.path} is neither a safetensors nor a torch file: it starts with {head[:16]!r}"
    )
