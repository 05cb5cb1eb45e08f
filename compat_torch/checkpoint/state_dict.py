"""From a checkpoint file to one flat dict of arrays: finding the state_dict, prefixes, sub-trees."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CheckpointError, CorruptCheckpointError
from .records import Record, as_plain
from .safetensors_file import read_safetensors
from .source import Kind, kind_of, open_source
from .torch_legacy import read_torch_legacy
from .torch_zip import TorchContents, read_torch_zip

logger = logging.getLogger("compat_torch")

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "ema")
"""Keys under which training scripts keep the state_dict, in the order they are tried."""

PREFIXES = ("module.", "_orig_mod.", "model.", "ema.")
"""Prefixes that wrappers (DataParallel, torch.compile, Lightning, EMA copies) put before every name."""


MAX_NAME = 500
"""Characters a tensor's name may have."""


@dataclass(frozen=True)
class StateFile:
    """One checkpoint file, as it is.

    Attributes:
        path, kind: where it is, and what its content says it is.
        tensors: name -> read-only array, a view of the memory-mapped file wherever possible; names as stored.
        replaced: dotted names of pickled classes and functions that became inert records.
        hyper_parameters: the dict of that name beside the weights (Lightning files), as plain containers.
    """

    path: str
    kind: Kind
    tensors: dict[str, np.ndarray]
    replaced: tuple[str, ...] = ()
    hyper_parameters: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str], *, prefix: str = "") -> dict[str, np.ndarray]:
    """Read the state_dict of a `.safetensors`, `.pt`, `.bin` or `.ckpt` file; nothing in it is executed.

    The kind of file is told by its content. A state_dict inside a bigger checkpoint (Lightning, training
    scripts) is found; prefixes that all names share (`module.`, `_orig_mod.`, `model.`, `ema.`) are taken off
    and logged.

    Args:
        path: the file.
        prefix: read only the sub-tree below this dotted name, which is taken off the names.

    Returns:
        name -> read-only array, a view of the memory-mapped file wherever possible; do not overwrite the file
        in place while such views are in use.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: truncated, damaged, malicious or not a checkpoint.
        CheckpointError: no state_dict in it, entries that are not tensors, or nothing below `prefix`.
    """
    file = open_file(path, prefix=prefix)
    tensors, stripped = strip_prefixes(file.tensors)
    if stripped:
        logger.info("%s: took the prefix %r off all names", file.path, stripped)
    return tensors


def open_file(path: str | os.PathLike[str], *, prefix: str = "") -> StateFile:
    """Open a checkpoint file as `read_state_dict` does, but leave the names as they are stored.

    Args:
        path: the file.
        prefix: as for `read_state_dict`.

    Raises:
        FileNotFoundError, CorruptCheckpointError, CheckpointError: as `read_state_dict`.
    """
    source = open_source(path)
    kind = kind_of(source)
    if kind == "safetensors":
        contents = TorchContents(None, ())
        tensors: dict[str, Any] = dict(read_safetensors(source))
    else:
        contents = read_torch_zip(source) if kind == "torch zip" else read_torch_legacy(source)
        _log_replaced(source.path, contents)
        tensors, prefix = find_state_dict(contents.content, source.path, prefix)
    if prefix:
        tensors = select(tensors, prefix, source.path)
    _check_entries(tensors, source.path)
    return StateFile(source.path, kind, tensors, contents.replaced, _hyper_parameters(contents.content, source.path))


def find_state_dict(content: object, path: str, prefix: str = "") -> tuple[dict[str, Any], str]:
    """Descend from the saved object to the dict that holds tensors.

    Args:
        content: what torch.save was given.
        path: for messages.
        prefix: a dotted name; where its first part names the dict to descend into, that part is used up.

    Returns:
        the dict, and what is left of `prefix`.

    Raises:
        CheckpointError: there is no such dict.
    """
    for _ in range(4):
        if not isinstance(content, dict):
            what = _describe(content)
            raise CheckpointError(f"{path} holds {what}, not a state_dict: save model.state_dict()")
        head, _, rest = prefix.partition(".")
        found = [name for name in WRAPPERS if _may_hold_tensors(content.get(name))]
        if head in found:
            found, prefix = [head], rest
        if not found:
            break
        logger.info("%s: reading the state_dict under %r", path, found[0])
        content = content[found[0]]
    if not isinstance(content, dict) or not any(isinstance(value, np.ndarray) for value in content.values()):
        raise CheckpointError(f"{path} holds no state_dict; it has: {_entries(content)}")
    return content, prefix


def select(tensors: Mapping[str, Any], prefix: str, path: str) -> dict[str, Any]:
    """The entries below the dotted name `prefix`, with it taken off.

    Raises:
        CheckpointError: there are none, with or without the prefixes of wrappers.
    """
    prefix = prefix if prefix.endswith(".") else prefix + "."
    for candidate in (tensors, strip_prefixes(tensors)[0]):
        chosen = {
            name.removeprefix(prefix): value
            for name, value in candidate.items()
            if isinstance(name, str) and name.startswith(prefix)
        }
        if chosen:
            return chosen
    parents = {name.rpartition(".")[0] for name in tensors if isinstance(name, str)}
    raise CheckpointError(f"{path} has nothing below prefix={prefix!r}; it has: {shorten(sorted(parents))}")


def strip_prefixes(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Take off the prefixes of wrappers that every name carries; returns the renamed dict and the prefix."""
    names, stripped = list(tensors), ""
    while names and all(isinstance(name, str) for name in names):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        stripped += prefix
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, tensors.values(), strict=True)), stripped


def shorten(items: Iterable[object], limit: int = 12, width: int = 80) -> str:
    """The first `limit` items, each cut to `width` characters, and how many more there are."""
    texts = [str(item)[:width] for item in items]
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _hyper_parameters(content: object, path: str) -> dict[str, Any]:
    if not isinstance(content, dict) or "hyper_parameters" not in content:
        return {}
    try:
        plain = as_plain(content["hyper_parameters"])
    except CheckpointError as err:
        raise type(err)(f"{path}: hyper_parameters: {err}") from err
    return plain if isinstance(plain, dict) else {}


def _check_entries(tensors: Mapping[Any, Any], path: str) -> None:
    wrong = [
        f"{str(name)[:80]!r} ({_describe(value)})"
        for name, value in tensors.items()
        if not (isinstance(name, str) and isinstance(value, np.ndarray))
    ]
    if wrong:
        raise CheckpointError(f"{path}: these entries of the state_dict are not tensors: {shorten(wrong)}")
    if not tensors:
        raise CheckpointError(f"{path} holds an empty state_dict")
    if long := [name[:80] for name in tensors if len(name) > MAX_NAME]:
        raise CorruptCheckpointError(f"{path}: names of tensors are longer than {MAX_NAME}: {shorten(long)}...")


def _may_hold_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, np.ndarray | dict) for item in value.values())


def _describe(value: object) -> str:
    if isinstance(value, Record):
        return f"a pickled {value.name[:80]} object"
    return "a tensor" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _entries(content: object) -> str:
    if not isinstance(content, dict):
        return _describe(content)
    return shorten(f"{str(key)[:40]!r} ({_describe(value)})" for key, value in content.items()) or "nothing"


def _log_replaced(path: str, contents: TorchContents) -> None:
    if contents.replaced:
        logger.warning(
            "%s: replaced by inert records, nothing was imported or called: %s",
            path,
            shorten(ascii(name) for name in contents.replaced),
        )
