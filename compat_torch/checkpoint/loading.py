"""`load` and `from_pretrained`: a checkpoint in, the module it belongs to out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spyx._collector import paused

from ..arrays import as_views, count_nonfinite
from ..errors import CheckpointError, StateDictMismatchError
from ..random import OneKey
from .detection import Content, Detection, choose, constructor, describe, read_content
from .formats import Fit, Format
from .hub import locate
from .placing import WORKERS, place, view_of
from .state_dict import shorten

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

logger = logging.getLogger("compat_torch")

_NOT_ASKED = frozenset({"self", "dtype", "param_dtype", "rngs", "args", "kwargs", "init_args", "layer_args", "config"})


def load(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: DTypeLike | None = None,
    prefix: str = "",
    rename: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    strict: bool = True,
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> nnx.Module:
    """Build the layer or model a checkpoint belongs to and load it, strictly; nothing in the file is executed.

    Args:
        path: a `.safetensors`, `.pt`, `.bin` or `.ckpt` file (told apart by content), or a folder with config.json.
        format: one of `FORMATS`; by default found from config.json, names and shapes, and logged.
        dtype: floating dtype of the parameters; by default the file's.
        prefix: load the sub-tree below this dotted name, for a layer inside a bigger model.
        rename: (regular expression, replacement) pairs, applied to every name of the file in turn.
        ignore: regular expressions; a name of the file in which one is found is left out.
        strict: raise for missing and unexpected names. Otherwise missing parameters are initialised at random and
            unexpected names are left out, and both are logged; wrong shapes raise all the same.
        allow_nonfinite: accept NaN and infinite weights.
        **kwargs: constructor arguments that the file cannot give (`discretization`, `conj_sym`, `reference`,
            `precision`, ...). What names and shapes say cannot be given.

    Returns:
        the module in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: truncated, damaged, malicious or not a checkpoint.
        UnknownFormatError: the names and shapes are of no known format.
        StateDictMismatchError: missing, unexpected or mis-shaped tensors; all are listed.
        CheckpointError: an argument that the file cannot give is missing, several formats fit, or weights are NaN
            or infinite.
        TypeError: an argument that the class does not have.
        ValueError: an unknown `format`, or an argument's value that the class does not support.
    """
    content = read_content(path, prefix=prefix, rename=rename, ignore=ignore)
    return _load(content, format, dtype, strict, allow_nonfinite, kwargs)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> nnx.Module:
    """Build and load the model of a folder, or of a repository on the Hugging Face hub.

    Args:
        path: a folder with config.json and weights (one file or shards), or a repository "owner/name".
        format, dtype, allow_nonfinite: as for `load`.
        revision: branch, tag or commit, for a repository.
        **kwargs: constructor arguments that config.json cannot give (`precision`; `mixer_kwargs` of a folder that
            lrnnx wrote), or that replace its entries.

    Returns:
        the module in eval mode.

    Raises:
        FileNotFoundError: there is neither such a folder nor a name of a repository.
        ImportError: a repository, and huggingface_hub is not installed.
        CheckpointError and others: as for `load`.
    """
    folder = locate(path, revision)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: use load({os.fspath(folder)!r}), or pass its folder")
    return _load(read_content(folder), format, dtype, True, allow_nonfinite, kwargs)


def _load(
    content: Content, format: str | None, dtype: Any, strict: bool, allow_nonfinite: bool, kwargs: Mapping[str, Any]
) -> Any:
    """The module that `build` gives, with arrays that do not depend on the file."""
    if dtype is not None:
        return build(content, format, dtype, strict, allow_nonfinite, kwargs).module
    with as_views():
        built = build(content, format, None, strict, True, kwargs)
    finite = place(built.module)
    if not allow_nonfinite:
        unknown = {name: value for name, value in built.tensors.items() if not finite.get(view_of(value), False)}
        check_finite(unknown, content.path)
    return built.module


@dataclass(frozen=True)
class Built:
    """A module, what its checkpoint was found to be, and the checkpoint's tensors, less those left out."""

    module: Any
    detection: Detection
    tensors: Mapping[str, np.ndarray]


@paused()
def build(
    content: Content, format: str | None, dtype: Any, strict: bool, allow_nonfinite: bool, kwargs: Mapping[str, Any]
) -> Built:
    """The module of a checkpoint that has been opened.

    Args:
        content: what `read_content` gave.
        format, dtype, strict, allow_nonfinite, kwargs: as for `load`.

    Raises:
        As `load`.
    """
    entry, fit, evidence = choose(content, format, strict)
    detection = describe(content, entry, fit, evidence, kwargs)
    _check_arguments(content.path, entry, detection, kwargs)
    _log(content.path, detection)
    arguments = dict(detection.arguments)
    if dtype is not None:
        arguments.pop("dtype", None)
    tensors = entry.canonical(content.tensors)
    if fit.unexpected:
        logger.warning("%s: left out: %s", content.path, shorten(fit.unexpected))
        left_out = set(fit.unexpected)
        tensors = {name: value for name, value in tensors.items() if name not in left_out}
    with ThreadPoolExecutor(1) as pool:
        finite = None if allow_nonfinite else pool.submit(check_finite, tensors, content.path)
        module = _construct(content, entry, fit, arguments)
    if finite is not None:
        finite.result()
    try:
        module.load_state_dict(entry.read(tensors), not fit.missing, dtype=dtype)
    except StateDictMismatchError as err:
        raise StateDictMismatchError(
            f"{entry.name} (read from {content.path})", err.missing, err.unexpected, err.mismatched, err.missing
        ) from err
    module.eval()
    return Built(module, detection, tensors)


def _construct(content: Content, entry: Format, fit: Fit, arguments: dict[str, Any]) -> Any:
    """The module: with shapes in place of arrays if all of them are in the file."""
    module_class = entry.load_class()
    if fit.missing:
        logger.warning("%s: initialised at random, because the file lacks it: %s", content.path, shorten(fit.missing))
    try:
        return module_class(**arguments) if fit.missing else _abstract(module_class, arguments)
    except (TypeError, ValueError) as err:
        if content.config is None:
            raise
        raise CheckpointError(f"{content.path}: config.json does not make a {entry.name}: {err}") from err


def _abstract(module_class: type, arguments: dict[str, Any]) -> Any:
    """The module with shapes in place of arrays."""
    import jax
    from flax import nnx

    return nnx.eval_shape(lambda: module_class(**arguments, rngs=OneKey(jax.random.key(0))))


def _log(path: str, detection: Detection) -> None:
    logger.info("%s: %s with %s (%s)", path, detection.format, detection.arguments, "; ".join(detection.evidence))
    if detection.assumed:
        assumed = ", ".join(f"{name}={value!r}" for name, value in detection.assumed.items())
        logger.info("%s: the file does not say, assumed: %s", path, assumed)


def _check_arguments(path: str, entry: Format, detection: Detection, kwargs: Mapping[str, Any]) -> None:
    """Raise for arguments that the class lacks, that the file settles, or that only the caller can give."""
    parameters = constructor(entry)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settled = detection.settled
    accepted = [name for name in parameters if name not in _NOT_ASKED and name not in settled]
    kwargs = {name: value for name, value in kwargs.items() if name not in detection.taken}
    unknown = [name for name in kwargs if name in settled or not (name in accepted or open_ended)]
    unknown += [name for name in kwargs if name in ("dtype", "param_dtype", "rngs") and name not in unknown]
    if unknown:
        raise TypeError(
            f"load() got unexpected arguments {unknown} for {entry.name}; accepted: {', '.join(accepted)} "
            f"({', '.join(sorted(settled))} come from the file)"
        )
    if detection.asks:
        lines = [f"  {_request(name, values)}" for name, values in detection.asks.items()]
        what = f"{path}: a checkpoint of {entry.name} does not store these arguments; pass them to load:"
        raise CheckpointError("\n".join([what, *lines]))


def _request(name: str, values: tuple[Any, ...]) -> str:
    expected = values[0] if len(values) == 1 else "one of " + ", ".join(map(repr, values))
    return f"{name}: {expected}" if "=" in name else f"{name}=...: {expected}"


def check_finite(tensors: Mapping[str, np.ndarray], path: str) -> None:
    """Raise CheckpointError if there are NaN or infinite values; the message says where and how many."""
    with ThreadPoolExecutor(WORKERS) as pool:
        counts = zip(tensors, pool.map(count_nonfinite, tensors.values()), strict=True)
    bad = [f"{name} ({count} of {tensors[name].size})" for name, count in counts if count]
    if bad:
        raise CheckpointError(
            f"{path} has NaN or infinite weights: {shorten(bad)}; allow_nonfinite=True loads them anyway"
        )
