"""A folder with a model in it: configuration, and weights in one file or in shards, opened without reading them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, CorruptCheckpointError
from .json_file import read_json
from .state_dict import open_file, shorten

logger = logging.getLogger("compat_torch")

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights or of an index of shards, in the order they are looked for."""

CONFIGS = ("config.json", "params.json")
"""Names of the configuration, in the order they are looked for."""

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|pkl)")
_MAX_CONFIG = 4 << 20
_MAX_INDEX = 64 << 20
_MAX_SHARDS = 512


@dataclass(frozen=True)
class Folder:
    """A model's folder.

    Attributes:
        path: as it was given.
        config: content of config.json (or params.json); None if there is neither.
        tensors: name as stored -> read-only view of a memory-mapped file; nothing is read before it is used.
        weights: the files with weights.
        index: the file that says which shard has which tensor, if there are several.
        replaced: dotted names of pickled classes and functions that became inert records.
        custom_code: what the configuration wants executed (`auto_map`); it is not.
    """

    path: Path
    config: dict[str, Any] | None
    tensors: Mapping[str, np.ndarray]
    weights: list[Path]
    index: Path | None = None
    replaced: tuple[str, ...] = ()
    custom_code: tuple[str, ...] = ()

    @property
    def revision(self) -> str | None:
        """The commit, if the folder is a snapshot in the hub's cache."""
        real = Path(os.path.realpath(self.path))
        return real.name if _is_snapshot(real) else None


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Open a folder of Hugging Face, state-spaces or lrnnx, a trainer's, or one with a single file of weights.

    Only files inside the folder are opened (and, for a snapshot in the hub's cache, the blobs it links to). Optimizer
    and trainer state (optimizer.pt, training_args.bin, rng_state.pth, ...) is never opened.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: not a folder, no weights or several in it, a LoRA adapter, shards missing or outside of it.
        CorruptCheckpointError: damaged or malicious files; shards that contradict the index.
    """
    folder = Path(path)
    index, weights, names = find_weights(folder)
    config = _read_config(folder)
    custom_code = _custom_code(config, folder)
    if index is None:
        file = open_file(weights[0])
        return Folder(folder, config, file.tensors, weights, None, file.replaced, custom_code)
    tensors, replaced = _open_shards(index, weights, names)
    return Folder(folder, config, tensors, weights, index, replaced, custom_code)


def find_weights(folder: Path) -> tuple[Path | None, list[Path], dict[str, str]]:
    """Where a folder's weights are, by names alone.

    Returns:
        the index or None, the files, tensor name -> file name by the index ({} without one).

    Raises:
        As `open_folder`.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder: pass it to load()")
    _refuse_adapter(folder)
    chosen = _choose(folder)
    if not chosen.name.endswith(".index.json"):
        return None, [chosen], {}
    names = _read_index(chosen)
    return chosen, _shards(folder, chosen, set(names.values())), names


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder.

    Raises:
        CheckpointError: the name is not a plain file name, or it is a link that leaves the folder; links of the
            hub's cache to its blobs are allowed.
    """
    if not 0 < len(name) <= 255 or name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise CheckpointError(f"{folder}: {name[:80]!r} is not a plain file name: only files in the folder are opened")
    file = folder / name
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    allowed = [home]
    if _is_snapshot(home):
        repository = home.parent.parent
        allowed = [home, repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{file} is a link to {real}, outside the folder: copy the file into the folder")
    return file


def _is_snapshot(real: Path) -> bool:
    return real.parent.name == "snapshots" and "--" in real.parent.parent.name


def _refuse_adapter(folder: Path) -> None:
    if any(
        (folder / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    ):
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model: merge it into its base model first "
            "(peft: model.merge_and_unload().save_pretrained(...))"
        )


def _read_config(folder: Path) -> dict[str, Any] | None:
    for name in CONFIGS:
        if (folder / name).exists():
            return read_json(inside(folder, name), _MAX_CONFIG)
    return None


def _custom_code(config: Mapping[str, Any] | None, folder: Path) -> tuple[str, ...]:
    entries = (config or {}).get("auto_map")
    if not entries:
        return ()
    values = entries.values() if isinstance(entries, dict) else [entries]
    names = tuple(str(value)[:80] for value in values)[:20]
    logger.warning("%s: the configuration names custom code, which is not executed: %s", folder, shorten(names))
    return names


def _choose(folder: Path) -> Path:
    """The file of weights, or the index."""
    for name in WEIGHTS:
        if os.path.lexists(folder / name):
            return inside(folder, name)
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    for ending in _OTHER_WEIGHTS:
        found = [name for name in names if name.endswith(ending) and not _NOT_WEIGHTS.fullmatch(name)]
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} has several files of weights: {shorten(found)}; pass one of them to load()"
            )
        if found:
            return inside(folder, found[0])
    holds = shorten(names) or "nothing"
    below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _has_weights(Path(entry.path)))
    hint = f"; there are weights in its sub-folders {shorten(below)}: pass one of them" if below else ""
    raise CheckpointError(f"{folder} has no weights ({', '.join(WEIGHTS)}); it holds: {holds}{hint}")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    names = read_json(path, _MAX_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CorruptCheckpointError(f'{path}: expected {{"weight_map": {{tensor name: file name, ...}}}}')
    return names


def _shards(folder: Path, index: Path, files: set[str]) -> list[Path]:
    if len(files) > _MAX_SHARDS:
        raise CorruptCheckpointError(f"{index} names {len(files)} files; at most {_MAX_SHARDS} are opened")
    shards = [inside(folder, name) for name in sorted(files)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there, download them: {shorten(missing)}")
    return shards


def _open_shards(
    index: Path, shards: Iterable[Path], names: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    tensors: dict[str, np.ndarray] = {}
    replaced: dict[str, None] = {}
    problems = []
    for shard in shards:
        file = open_file(shard)
        replaced.update(dict.fromkeys(file.replaced))
        for name, value in file.tensors.items():
            if name not in names:
                problems.append(f"{name} is in {shard.name}, but not in the index")
            elif names[name] != shard.name:
                problems.append(f"{name} is in {shard.name}, the index says {names[name]}")
            tensors[name] = value
    problems += [f"{name} is in the index, but not in {file}" for name, file in names.items() if name not in tensors]
    if problems:
        raise CorruptCheckpointError(f"{index} and its shards do not agree: {shorten(problems, width=240)}")
    return {name: tensors[name] for name in names}, tuple(replaced)
