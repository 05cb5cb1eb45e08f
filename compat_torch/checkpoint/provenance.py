"""Where a written checkpoint came from: hashes of the source's files, its revision, versions."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any

FILENAME = "provenance.json"

_CHUNK = 4 << 20
_PACKAGES = ("spyx-torch", "jax", "flax", "numpy", "safetensors")


class Hashes:
    """SHA-256 of files, computed in a thread beside the work on them; a context manager, which ends the thread.

    Args:
        files: their paths.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]):
        self._stopped = Event()
        self._pool = ThreadPoolExecutor(1)
        self._results = {Path(file).name: self._pool.submit(self._describe, Path(file)) for file in files}

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[str, dict[str, Any]]:
        """{file name: {"bytes", "sha256"}}, once all are done.

        Raises:
            OSError: a file cannot be read.
        """
        return {name: future.result() for name, future in self._results.items()}

    def _describe(self, file: Path) -> dict[str, Any]:
        digest, nbytes, buffer = hashlib.sha256(), 0, bytearray(_CHUNK)
        with open(file, "rb", buffering=0) as stream:
            while not self._stopped.is_set() and (count := stream.readinto(buffer)):
                digest.update(memoryview(buffer)[:count])
                nbytes += count
        return {"bytes": nbytes, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Python and the packages that take part in a conversion."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
