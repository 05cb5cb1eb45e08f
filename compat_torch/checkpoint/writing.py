"""Writing checkpoints: all or nothing, tensor by tensor, with what belongs beside the weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..arrays import PIECE, contiguous, release
from ..errors import CheckpointError
from .folder import CONFIGS, find_weights, inside
from .provenance import FILENAME, Hashes, versions
from .safetensors_file import DTYPES

Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]
Progress = Callable[[int, int], object]
Check = Callable[[Path], object]

BESIDE = (
    "tokenizer*", "*.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "README*",
)  # fmt: skip
"""Files of a source folder that go into every folder made from it."""

_MAX_BESIDE = 256 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    *,
    filename: str = "model.safetensors",
    source: str | os.PathLike[str] | None = None,
    hashes: Hashes | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Path:
    """Write weights, config.json and provenance.json into a new folder, with what the source has beside its weights.

    The folder appears under its name once everything in it is on disk; if anything fails before, nothing appears.

    Args:
        folder: to write; it may exist if it is empty.
        tensors: name -> array: NumPy (any strides, memory-mapped or not) or JAX arrays; a lazy mapping is asked for
            one at a time (twice: for the header, for the data). Or (name, array) pairs, which are collected first.
        config: content of config.json; None writes none.
        filename: of the weights: `*.safetensors`, or `*.bin` (torch.save; needs torch).
        source: file or folder that was converted: its hashes go into provenance.json; of a folder tokenizer,
            generation_config.json, LICENSE and README are copied.
        hashes: of the source, if they are being computed (`hashes_of`).
        provenance: more for provenance.json.
        overwrite: replace the folder if it was written by this function (it has a provenance.json).
        progress: called with (bytes of tensors written, bytes in all).
        check: called with the finished folder under its temporary name; if it raises, nothing appears.

    Returns:
        the folder.

    Raises:
        FileExistsError: the folder is not empty, and `overwrite` does not apply.
        ValueError: an unknown ending of `filename`, or names given twice.
        TypeError: a dtype the format does not have.
        CheckpointError: a file beside the source's weights is a link that leaves it, or huge.
        ImportError: `*.bin` without torch.
    """
    items, write = _items(tensors), _writer(filename)

    def weights(partial: Path) -> None:
        with open(partial / filename, "xb") as stream:
            write(stream, items, progress)

    return _write(folder, weights, config, source, hashes, provenance, overwrite, check)


def write_file(
    path: str | os.PathLike[str],
    tensors: Tensors,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Path:
    """Write one `*.safetensors` or `*.bin` / `*.pt` file, all or nothing; arguments as for `write_folder`.

    Raises:
        FileExistsError: it exists and `overwrite` is False. ValueError, TypeError, ImportError: as `write_folder`.
    """
    path = Path(path)
    write, items = _writer(path.name), _items(tensors)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or pass overwrite=True")
    partial = _partial_name(path)
    try:
        with open(partial, "xb") as stream:
            write(stream, items, progress)
            stream.flush()
            os.fsync(stream.fileno())
        if check is not None:
            check(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)
    return path


def write_orbax(
    folder: str | os.PathLike[str],
    tree: Any,
    config: Mapping[str, Any] | None,
    *,
    source: str | os.PathLike[str] | None = None,
    hashes: Hashes | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    check: Check | None = None,
) -> Path:
    """Write a pytree of arrays as an orbax checkpoint in `folder/state`, with the files of `write_folder` beside it.

    Args:
        folder, config, source, hashes, provenance, overwrite, check: as for `write_folder`.
        tree: of arrays, such as `nnx.to_pure_dict(nnx.state(model))`.

    Raises:
        ImportError: orbax-checkpoint is not installed. Otherwise as `write_folder`.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as err:
        raise ImportError("orbax checkpoints need orbax-checkpoint: pip install 'spyx-torch[train]'") from err

    def weights(partial: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial.absolute() / "state", tree)

    return _write(folder, weights, config, source, hashes, provenance, overwrite, check)


@contextlib.contextmanager
def atomic_folder(
    folder: str | os.PathLike[str], *, overwrite: bool = False, source: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name once the block has ended and all files are on disk.

    If the block raises, it is removed; if the process is killed, it is left under its hidden name.

    Args:
        folder: as for `write_folder`.
        overwrite: as for `write_folder`.
        source: what is being read; it must not lie in the folder.

    Raises:
        FileExistsError: as `write_folder`.
    """
    folder = Path(folder)
    check_target(folder, overwrite, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(folder)
    partial.mkdir()
    try:
        yield partial
        for parent, _, names in os.walk(partial):
            for name in names:
                _sync(Path(parent, name))
            _sync(Path(parent))
        _move(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(folder.parent)


def copy_beside(source: str | os.PathLike[str] | None, folder: Path) -> list[str]:
    """Copy tokenizer, generation_config.json, licence and README of a source folder; returns their names."""
    if source is None or not Path(source).is_dir():
        return []
    home = Path(source)
    names = sorted(entry.name for entry in os.scandir(home) if entry.is_file())
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in BESIDE)]
    for name in chosen:
        file = inside(home, name)
        if file.stat().st_size > _MAX_BESIDE:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; at most {_MAX_BESIDE} are copied")
        shutil.copyfile(file, folder / name)
    return chosen


def hashes_of(source: str | os.PathLike[str] | None) -> Hashes:
    """The hashes of the weights, index and configuration of a file or folder, being computed from now on.

    Raises:
        As `find_weights`.
    """
    if source is None:
        return Hashes([])
    path = Path(source)
    if not path.is_dir():
        return Hashes([path])
    index, weights, _ = find_weights(path)
    configs = [inside(path, name) for name in CONFIGS if (path / name).exists()]
    return Hashes([*weights, *([index] if index else []), *configs])


def write_safetensors(stream: IO[bytes], items: Mapping[str, Any], progress: Progress | None = None) -> None:
    """The header, then tensor by tensor.

    Args:
        stream: a binary file open for writing.
        items: name -> array.
        progress: as for `write_folder`.

    Raises:
        TypeError: a dtype that safetensors does not have.
    """
    specs = {name: _spec(name, items[name]) for name in items}
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name in order:
        dtype, shape = specs[name]
        start, total = total, total + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, total]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, value, data in _ahead(items, order):
        first = header[name]["data_offsets"][0]
        for start in range(0, len(data), PIECE):
            chunk = data[start : start + PIECE]
            stream.write(chunk.data)
            if progress is not None:
                progress(first + start + len(chunk), total)
        release(value)


def _ahead(items: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(name, array, its bytes), the next tensor being made contiguous while the last is written."""
    with ThreadPoolExecutor(1) as pool:
        pending: tuple[str, Any, Future[np.ndarray]] | None = None
        for name in names:
            value = items[name]
            following = (name, value, pool.submit(_bytes, value))
            if pending is not None:
                yield pending[0], pending[1], pending[2].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1], pending[2].result()


def _bytes(value: Any) -> np.ndarray:
    return contiguous(value).reshape(-1).view(np.uint8)


def _spec(name: str, value: Any) -> tuple[np.dtype, list[int]]:
    dtype = np.dtype(value.dtype)
    if dtype not in _NAMES:
        raise TypeError(f"{name!r} has dtype {dtype}, which safetensors does not have ({', '.join(DTYPES)})")
    return dtype, list(value.shape)


def _write(
    folder: str | os.PathLike[str],
    weights: Callable[[Path], None],
    config: Mapping[str, Any] | None,
    source: str | os.PathLike[str] | None,
    hashes: Hashes | None,
    provenance: Mapping[str, Any] | None,
    overwrite: bool,
    check: Check | None,
) -> Path:
    computing = hashes_of(source) if hashes is None else contextlib.nullcontext(hashes)
    with computing as hashes, atomic_folder(folder, overwrite=overwrite, source=source) as partial:
        copied = copy_beside(source, partial)
        if config is not None:
            _write_json(partial / "config.json", config)
        weights(partial)
        record = {
            "source": None if source is None else _describe(Path(source), hashes),
            "copied": copied,
            **(provenance or {}),
            "versions": versions(),
        }
        _write_json(partial / FILENAME, record)
        if check is not None:
            check(partial)
    return Path(folder)


def _write_torch(stream: IO[bytes], items: Mapping[str, Any], progress: Progress | None = None) -> None:
    from ..torch_file import write_torch

    write_torch(stream, items, progress)


def _writer(filename: str) -> Callable[[IO[bytes], Mapping[str, Any], Progress | None], None]:
    if Path(filename).name != filename:
        raise ValueError(f"filename={filename!r}: expected a name without folders")
    if filename.endswith(".safetensors"):
        return write_safetensors
    if filename.endswith((".bin", ".pt")):
        return _write_torch
    raise ValueError(f"filename={filename!r}: expected a name ending in .safetensors, .bin or .pt")


def _items(tensors: Tensors) -> Mapping[Any, Any]:
    if isinstance(tensors, Mapping):
        result = tensors
    else:
        pairs = list(tensors)
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"tensors are given twice: {sorted({name for name in names if names.count(name) > 1})}")
    if not result or "__metadata__" in result:
        raise ValueError("expected at least one tensor, and none called '__metadata__'")
    return result


def _describe(source: Path, hashes: Hashes) -> dict[str, Any]:
    real = Path(os.path.realpath(source))
    described: dict[str, Any] = {"name": real.name, "files": hashes.result()}
    if real.parent.name == "snapshots":
        repository = real.parent.parent.name.split("--")[1:]
        described |= {"name": "/".join(repository), "revision": real.name}
    return described


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial{path.suffix}")


def check_target(folder: Path, overwrite: bool, source: str | os.PathLike[str] | None) -> None:
    """Raise FileExistsError if `write_folder` would not write `folder`."""
    if source is not None and Path(os.path.realpath(source)).is_relative_to(os.path.realpath(folder)):
        raise FileExistsError(f"{folder} holds the source {source}: choose another folder")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is not a folder: choose another name")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: choose another folder, or overwrite it (overwrite=True, --overwrite)"
        )
    if not (folder / FILENAME).is_file():
        raise FileExistsError(f"{folder} has no {FILENAME}, so it is not ours to overwrite: remove it yourself")


def _move(partial: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(partial, folder)
        return
    old = _partial_name(folder)
    os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
