"""What formats of whole models read off names, tensors and config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .format import Config, Reading, fields


def count(names: Iterable[str], template: str) -> int:
    """One more than the greatest {i} for which a name matches the template."""
    return 1 + max((int(found[0]) for name in names if (found := fields(template, name))), default=-1)


def tied(reading: Reading, copy: str, original: str) -> bool:
    """The copy is absent, or equal to the original."""
    tensors = reading.tensors
    if copy not in tensors or original not in tensors:
        return copy not in tensors
    return bool(np.array_equal(tensors[copy], tensors[original], equal_nan=tensors[copy].dtype.kind == "f"))


def untied(config: Any, same: bool) -> Any:
    """The configuration, with a head of its own unless the head's tensor is the `same` as the embedding's."""
    return config if same else dataclasses.replace(config, tie_word_embeddings=False)


def agree(config: Config, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the configuration contradicts the tensors."""
    for name, value in found.items():
        if name in config and config[name] != value:
            raise CheckpointError(f"config.json says {name} = {str(config[name])[:60]}, the tensors say {value}")


def ratio(inner: int, outer: int) -> int | float:
    """A factor f with int(f * outer) == inner, an integer if there is one."""
    if inner % outer == 0:
        return inner // outer
    factor = inner / outer
    return factor if int(factor * outer) == inner else math.nextafter(factor, math.inf)


def completed(
    reading: Reading,
    cls: Any,
    found: Mapping[str, Any],
    asks: Mapping[str, tuple[Any, ...]],
    assumes: Sequence[str],
) -> dict[str, Any]:
    """The configuration of a file without config.json: what the tensors say, completed by what the caller gives.

    Args:
        reading: its `taken`, `asked` and `assumed` are filled.
        cls: a dataclass, the configuration.
        found: fields that follow from the tensors; these cannot be given.
        asks: fields that the caller must give -> their values.
        assumes: fields that change the outputs and have a default.
    """
    defaults = {entry.name: entry.default for entry in dataclasses.fields(cls) if entry.metadata}
    given = {name: value for name, value in reading.given.items() if name in defaults and name not in found}
    reading.taken.update(given)
    reading.asked.update({name: values for name, values in asks.items() if name not in given})
    reading.assumed.update({name: defaults[name] for name in assumes if name not in given})
    return {**given, **found}
