"""`detect`: which format a checkpoint is in, and what its class needs to be built."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import CheckpointError, UnknownFormatError
from .folder import CONFIGS, inside, open_folder
from .formats import FORMATS, TABLE, Fit, Format, Reading
from .json_file import read_json
from .s4_versions import upgrade
from .state_dict import open_file, shorten, strip_prefixes

V = TypeVar("V")

logger = logging.getLogger("compat_torch")

Tensors = Mapping[str, np.ndarray]

_MAX_CONFIG = 4 << 20
_NEUTRAL = frozenset({"self", "dtype", "param_dtype", "rngs"})


@dataclass(frozen=True)
class Detection:
    """What a checkpoint is.

    Attributes:
        format: one of `FORMATS`.
        target: "module:Class" that it is read into.
        evidence: why, in words.
        arguments: constructor arguments: the caller's, and those from names, shapes, config.json and stored
            hyper-parameters.
        settled: names of arguments that follow from the file alone.
        asks: arguments that only the caller can give (a name, or "name={...: ...}" for a part of one) -> their values.
        taken: names of the caller's arguments that went into a configuration.
        assumed: arguments that nothing in the file gives -> the class's defaults, which are used.
        config: config.json, if there is one.
        tensors: name -> array, prefixes of wrappers taken off, S4 layers at version 4; views of the mapped file.
    """

    format: str
    target: str
    evidence: tuple[str, ...]
    arguments: dict[str, Any]
    settled: frozenset[str]
    asks: dict[str, tuple[Any, ...]]
    taken: frozenset[str]
    assumed: dict[str, Any]
    config: dict[str, Any] | None
    tensors: Tensors = field(repr=False)


@dataclass(frozen=True)
class Content:
    """A checkpoint file or folder: names cleaned, nothing decided yet."""

    path: str
    tensors: Tensors
    config: dict[str, Any] | None
    hyper_parameters: Mapping[str, Any]
    notes: tuple[str, ...]
    ignored: tuple[str, ...]


def detect(path: str | os.PathLike[str], *, format: str | None = None, prefix: str = "", **kwargs: Any) -> Detection:
    """Find the format of a checkpoint from its names, shapes and config.json; of the weights, tied ones are compared.

    Args:
        path: a file, or a folder with config.json and weights.
        format: one of `FORMATS`: only see whether it fits, and what it gives.
        prefix: look at the sub-tree below this dotted name.
        **kwargs: constructor arguments, as `load` takes them: some others follow from them.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        UnknownFormatError, StateDictMismatchError: no format fits; the message says what is near.
        CheckpointError: damaged files, several formats fit, or a model that is close to a format but not supported.
        ValueError: an unknown `format`.
    """
    content = read_content(path, prefix=prefix)
    entry, fit, evidence = choose(content, format)
    return describe(content, entry, fit, evidence, kwargs)


def read_content(
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    rename: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    seek_config: bool = True,
) -> Content:
    """The tensors of a file or a folder, with wrappers' prefixes taken off and the caller's renames applied.

    Args:
        path, prefix, rename, ignore: as for `load`.
        seek_config: look for the configuration in a file's folder, too.
    """
    name = os.fspath(path)
    if Path(name).is_dir():
        folder = open_folder(name)
        raw, config, hyper = folder.tensors, folder.config, {}
        if prefix:
            raise CheckpointError(f"{name} is a folder: prefix={prefix!r} is for files; pass the file of weights")
    else:
        file = open_file(name, prefix=prefix)
        raw, hyper = file.tensors, file.hyper_parameters
        config = None
    if adapters := [key for key in raw if "lora_A" in key or "lora_B" in key]:
        raise CheckpointError(f"{name} holds LoRA adapters ({shorten(adapters, 3)}): merge them into the model first")
    tensors, stripped = strip_prefixes(raw)
    notes = [f"took the prefix {stripped!r} off all names"] if stripped else []
    ignored = tuple(key for key in tensors if matches(ignore, key))
    for key in ignored:
        del tensors[key]
    tensors = renamed(tensors, rename, name)
    tensors, layers = upgrade(tensors, name)
    if layers:
        notes.append(f"converted {layers} S4 layers of an older version to version 4")
    for note in notes:
        logger.info("%s: %s", name, note)
    if seek_config and config is None and not prefix:
        config = _config_beside(Path(name), tensors)
    return Content(name, tensors, config, hyper, tuple(notes), ignored)


def _config_beside(file: Path, tensors: Tensors) -> dict[str, Any] | None:
    """The configuration in the file's folder, if it is of a format that the file fits."""
    found = next((file.parent / name for name in CONFIGS if (file.parent / name).is_file()), None)
    if found is None:
        return None
    config = read_json(inside(file.parent, found.name), _MAX_CONFIG)
    if not any(TABLE[name].fit(tensors).exact for name in _claims(config, os.fspath(found))):
        return None
    logger.info("%s: using %s", file, found)
    return config


def renamed(tensors: Mapping[str, V], rename: Sequence[tuple[str, str]], path: str) -> dict[str, V]:
    """Apply every (regular expression, replacement) to every name.

    Raises:
        CheckpointError: two names become the same. ValueError: not pairs of regular expression and replacement.
    """
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in rename):
        raise ValueError(f"rename must be a list of (regular expression, replacement), got {rename!r}")
    result: dict[str, V] = {}
    for name, value in tensors.items():
        target = name
        for pattern, replacement in rename:
            target = _compiled(pattern).sub(replacement, target)
        if target in result:
            raise CheckpointError(f"{path}: rename gives two tensors the name {target[:80]}, one is {name[:80]}")
        result[target] = value
    return result


def matches(patterns: Iterable[str], name: str) -> bool:
    """One of the regular expressions is found in the name.

    Raises:
        ValueError: a string in place of a list of them, or not a regular expression.
    """
    if isinstance(patterns, str):
        raise ValueError(f"ignore must be a list of regular expressions, got {patterns!r}")
    return any(_compiled(pattern).search(name) for pattern in patterns)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as err:
        raise ValueError(f"{pattern!r} is not a regular expression: {err}") from err


def choose(content: Content, format: str | None, strict: bool = True) -> tuple[Format, Fit, tuple[str, ...]]:
    """The format that fits, how it does, and the evidence."""
    if format is not None and format not in TABLE:
        raise ValueError(f"format={format!r} is not known; choose from {', '.join(map(repr, FORMATS))}")
    if format is not None:
        return _accept(content, format, f"format={format!r} was given", strict)
    if claims := _claims(content.config, content.path):
        name, evidence = next(iter(claims.items()))
        return _accept(content, name, evidence, strict)
    if content.config is not None and "model_type" in content.config:
        known = ", ".join(name.removeprefix("hf.") for name in FORMATS if name.startswith("hf."))
        wanted = str(content.config["model_type"])[:60]
        raise UnknownFormatError(f"{content.path}: model_type {wanted!r} is not supported; supported are {known}")
    return _by_names(content, strict)


def describe(
    content: Content, entry: Format, fit: Fit, evidence: tuple[str, ...], given: Mapping[str, Any]
) -> Detection:
    """The detection: what the format infers, asks for and assumes."""
    parameters = constructor(entry)
    hyper = _usable(content.hyper_parameters, entry, parameters)
    reading = Reading(entry.canonical(content.tensors), fit.sizes, content.config, {**hyper, **given})
    try:
        inferred = entry.arguments(reading)
    except CheckpointError as err:
        raise type(err)(f"{content.path}: {err}") from err
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise CheckpointError(
            f"{content.path}: the tensors and config.json do not make a {entry.name} ({type(err).__name__}: {err})"
        ) from err
    hyper = {name: value for name, value in hyper.items() if name not in inferred}
    unknown = [name for name in inferred if name not in parameters]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise CheckpointError(f"{content.path}: config.json has {shorten(unknown)}, which {entry.name} does not know")
    given = {name: value for name, value in given.items() if name not in reading.taken}
    known = {**hyper, **inferred, **given}
    settled = frozenset() if entry.overridable else frozenset(inferred) - {*entry.merges, *entry.asks, *entry.assumes}
    asks = {name: values for name, values in entry.asks.items() if name not in known} | reading.asked
    assumed = {name: parameters[name].default for name in entry.assumes if name not in known and name in parameters}
    if hyper:
        evidence = (*evidence, f"hyper_parameters give {', '.join(hyper)}")
    merged = {name: inferred[name] for name in entry.merges if name in inferred}
    return Detection(
        format=entry.name,
        target=entry.target,
        evidence=(*content.notes, *evidence),
        arguments={**hyper, **inferred, **given, **merged},
        settled=settled,
        asks=asks,
        taken=frozenset(reading.taken),
        assumed=assumed | reading.assumed,
        config=content.config,
        tensors=content.tensors,
    )


def constructor(entry: Format) -> Mapping[str, inspect.Parameter]:
    """The constructor's parameters, by name."""
    return inspect.signature(entry.load_class().__init__).parameters


def _usable(hyper: Mapping[str, Any], entry: Format, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the file does not give otherwise, at the top or below one key ("model", "layer", ...)."""
    wanted = {*entry.asks, *entry.assumes, *entry.merges, *(parameters if entry.overridable else ())} - _NEUTRAL
    places = [*(value for value in hyper.values() if isinstance(value, Mapping)), hyper]
    return {name: value for place in places for name, value in place.items() if name in wanted and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _claims(config: Mapping[str, Any] | None, path: str) -> dict[str, str]:
    """The formats that the configuration is of, and the evidence."""
    claims = {}
    for name, entry in TABLE.items():
        try:
            found = None if config is None else entry.claims(config)
        except CheckpointError as err:
            raise CheckpointError(f"{path}: {err}") from err
        if found:
            claims[name] = found
    return claims


def _accept(content: Content, name: str, why: str, strict: bool) -> tuple[Format, Fit, tuple[str, ...]]:
    """A format that is settled: its names and shapes must fit."""
    entry = TABLE[name]
    fit = entry.fit(content.tensors)
    if fit.mismatched or (strict and not fit.exact):
        raise entry.mismatch(fit, content.path)
    if reason := entry.refuses(Reading(entry.canonical(content.tensors), fit.sizes)):
        raise CheckpointError(f"{content.path} is not of format {name}: {reason}")
    return entry, fit, (why, _names(content))


def _by_names(content: Content, strict: bool) -> tuple[Format, Fit, tuple[str, ...]]:
    fits = {name: entry.fit(content.tensors) for name, entry in TABLE.items()}
    exact = {name: fit for name, fit in fits.items() if fit.exact and not _refused(content, name, fit)}
    most = max((fit.specific for fit in exact.values()), default=0)
    best = [name for name, fit in exact.items() if fit.specific == most]
    if len(best) > 1:
        options = ", ".join(
            f"{name!r} (mode {TABLE[name].hint!r})" if TABLE[name].hint else repr(name) for name in best
        )
        raise CheckpointError(f"{content.path} fits several formats: pass load(path, format=...) with one of {options}")
    if best:
        return TABLE[best[0]], fits[best[0]], ("names and shapes are those of this format alone", _names(content))
    likeness = {name: _likeness(fit) for name, fit in fits.items()}
    closest = sorted(likeness, key=lambda name: likeness[name], reverse=True)
    first = closest[0]
    if likeness[first] >= 0.5:
        return _accept(content, first, "names and shapes are nearest to this format", strict)
    found = shorten(f"{name} {value.shape}" for name, value in content.tensors.items())
    lines = [f"{content.path}: the names and shapes are of no known format.", f"  found: {found}"]
    lines += [f"  {name} needs: {TABLE[name].describe()}" for name in closest[:3] if likeness[name] > 0]
    lines.append(f"  known formats: {', '.join(FORMATS)}")
    lines += [f"  try load(path, prefix={layer!r}): it looks like {name}" for layer, name in _layers(content.tensors)]
    raise UnknownFormatError("\n".join(lines))


def _refused(content: Content, name: str, fit: Fit) -> str | None:
    return TABLE[name].refuses(Reading(TABLE[name].canonical(content.tensors), fit.sizes))


def _names(content: Content) -> str:
    return f"{len(content.tensors)} tensors: {shorten(content.tensors, 4)}"


def _likeness(fit: Fit) -> float:
    """Share of names that the file and the format have in common, a mis-shaped one counting half."""
    return (fit.specific - 0.25 * len(fit.mismatched)) / (fit.specific + len(fit.missing) + len(fit.unexpected) or 1)


def _layers(tensors: Tensors, limit: int = 5) -> list[tuple[str, str]]:
    """Sub-trees that fit a format exactly, as (prefix, format name); the outermost ones."""
    parents = {name.rsplit(".", cut)[0] for name in tensors for cut in range(1, min(4, name.count(".") + 1))}
    trees: dict[str, dict[str, np.ndarray]] = {parent: {} for parent in sorted(parents, key=_depth)[:300]}
    lengths = {len(parent) for parent in trees}
    for name, value in tensors.items():
        for dot in lengths:
            if name[dot : dot + 1] == "." and (tree := trees.get(name[:dot])) is not None:
                tree[name[dot + 1 :]] = value
    found: list[tuple[str, str]] = []
    for parent, tree in trees.items():
        if any(parent.startswith(f"{outer}.") for outer, _ in found):
            continue
        name = next((name for name, entry in TABLE.items() if _is(entry, Reading(tree))), None)
        if name is not None:
            found.append((parent, name))
            if len(found) == limit:
                break
    return found


def _depth(name: str) -> tuple[int, str]:
    return name.count("."), name


def _is(entry: Format, reading: Reading) -> bool:
    if not entry.covers(reading.tensors):
        return False
    fit = entry.fit(reading.tensors)
    return fit.exact and entry.refuses(replace(reading, sizes=fit.sizes)) is None
