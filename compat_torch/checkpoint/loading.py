"""`load`: a checkpoint file in, the module it belongs to out."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, UnknownFormatError
from .formats import TABLE, CheckpointFormat, Fit
from .state_dict import read_state_dict, shorten

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

logger = logging.getLogger("compat_torch")

FORMATS: tuple[str, ...] = tuple(TABLE)
"""Names that `load(format=)` takes."""

_NOT_ASKED = frozenset({"self", "d_model", "d_state", "dtype", "param_dtype", "rngs"})


def load(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: DTypeLike | None = None,
    prefix: str = "",
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> nnx.Module:
    """Build the layer a checkpoint belongs to and load it, strictly; nothing in the file is executed.

    Args:
        path: a `.safetensors`, `.pt`, `.bin` or `.ckpt` file (told apart by content).
        format: one of `FORMATS`; by default found from names and shapes, and logged.
        dtype: floating dtype of the parameters; by default the file's.
        prefix: load the sub-tree below this dotted name, for a layer inside a bigger model.
        allow_nonfinite: accept NaN and infinite weights.
        **kwargs: constructor arguments that shapes cannot give (`discretization`, `conj_sym`, `reference`,
            `precision`, ...). `d_model` and `d_state` come from the file.

    Returns:
        the module in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: truncated, damaged, malicious or not a checkpoint.
        UnknownFormatError: the names and shapes are of no known format.
        StateDictMismatchError: missing, unexpected or mis-shaped tensors; all are listed.
        CheckpointError: an argument that the file cannot give is missing, or weights are NaN or infinite.
        TypeError: an argument that the class does not have.
        ValueError: an unknown `format`, or an argument's value that the class does not support.
    """
    if format is not None and format not in TABLE:
        raise ValueError(f"format={format!r} is not known; choose from {', '.join(map(repr, FORMATS))}")
    name = os.fspath(path)
    tensors = read_state_dict(path, prefix=prefix)
    entry, fit = _choose(tensors, format, name)
    module_class = getattr(importlib.import_module(entry.module), entry.class_name)
    _check_arguments(entry, module_class, kwargs)
    if not allow_nonfinite:
        _check_finite(tensors, name)

    sizes = entry.sizes(fit.sizes, kwargs)
    logger.info("%s: %s with %s", name, entry.name, sizes)
    return _build(module_class, {**sizes, **kwargs}, tensors, dtype)


def _build(module_class: type, arguments: dict[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> nnx.Module:
    from flax import nnx

    module = nnx.eval_shape(lambda: module_class(**arguments))
    module.load_state_dict(tensors, dtype=dtype)
    module.eval()
    return module


def _choose(tensors: Mapping[str, np.ndarray], format: str | None, path: str) -> tuple[CheckpointFormat, Fit]:
    fits = {name: entry.fit(tensors) for name, entry in TABLE.items()}
    if format is not None:
        if not fits[format].exact:
            raise TABLE[format].mismatch(fits[format], path)
        return TABLE[format], fits[format]
    exact = [name for name, fit in fits.items() if fit.exact]
    if len(exact) > 1:
        raise CheckpointError(f"{path} fits several formats, {', '.join(exact)}: pass load(path, format=...)")
    if exact:
        return TABLE[exact[0]], fits[exact[0]]

    closest = sorted(fits, key=lambda name: _likeness(TABLE[name], fits[name]), reverse=True)
    if _likeness(TABLE[closest[0]], fits[closest[0]]) >= 0.5:
        raise TABLE[closest[0]].mismatch(fits[closest[0]], path)
    found = shorten(f"{name} {value.shape}" for name, value in tensors.items())
    lines = [f"{path}: the names and shapes are of no known format.", f"  found: {found}"]
    lines += [f"  {name} needs: {TABLE[name].describe()}" for name in closest]
    lines += [f"  try load(path, prefix={layer!r}): it looks like {name}" for layer, name in _layers(tensors)]
    raise UnknownFormatError("\n".join(lines))


def _likeness(entry: CheckpointFormat, fit: Fit) -> float:
    """Share of names that the file and the format have in common, a mis-shaped one counting half."""
    common = len(entry.shapes) - len(fit.missing)
    return (common - 0.25 * len(fit.mismatched)) / (len(entry.shapes) + len(fit.unexpected))


def _layers(tensors: Mapping[str, np.ndarray], limit: int = 5) -> list[tuple[str, str]]:
    """Sub-trees that fit a format exactly, as (prefix, format name)."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        parent, _, leaf = name.rpartition(".")
        groups.setdefault(parent, {})[leaf] = value
    fitting = (
        (parent, name)
        for parent, group in groups.items()
        if parent
        for name, entry in TABLE.items()
        if entry.fit(group).exact
    )
    return [pair for pair, _ in zip(fitting, range(limit), strict=False)]


def _check_arguments(entry: CheckpointFormat, module_class: type, kwargs: Mapping[str, Any]) -> None:
    parameters = inspect.signature(module_class.__init__).parameters
    accepted = [name for name in parameters if name not in _NOT_ASKED]
    unknown = [name for name in kwargs if name not in accepted]
    if unknown:
        raise TypeError(
            f"load() got unexpected arguments {unknown} for {entry.name}; accepted: {', '.join(accepted)} "
            "(d_model and d_state come from the file)"
        )
    for name, values in entry.asks.items():
        if name not in kwargs:
            raise CheckpointError(
                f"a checkpoint of {entry.name} does not store `{name}`; "
                f"pass load(path, {name}=...) with one of {', '.join(map(repr, values))}"
            )


def _check_finite(tensors: Mapping[str, np.ndarray], path: str) -> None:
    bad = []
    for name, value in tensors.items():
        if value.dtype.kind not in "iub":
            count = int(np.count_nonzero(~np.isfinite(value)))
            if count:
                bad.append(f"{name} ({count} of {value.size})")
    if bad:
        raise CheckpointError(
            f"{path} has NaN or infinite weights: {shorten(bad)}; allow_nonfinite=True loads them anyway"
        )
