"""Exceptions raised while reading checkpoints and state dicts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

_LISTED = 12
_NAME = 80
_LINE = 160


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated, damaged or not a checkpoint at all."""


class UnknownFormatError(CheckpointError):
    """The file is readable, but its keys and shapes match no known format."""


class StateDictMismatchError(CheckpointError):
    """Keys or shapes of a state dict do not fit the module; the message has the first of each kind, shortened.

    Attributes:
        missing: names the module has and the state dict lacks.
        unexpected: names the state dict has and the module lacks.
        mismatched: lines "name: expected ..., got ..." for wrong shapes or dtypes.
    """

    def __init__(
        self,
        target: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
        known: Sequence[str] = (),
    ):
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.mismatched = list(mismatched)
        lines = [f"the state dict does not fit {target}:"]
        lines += _listed("missing", self.missing, _NAME)
        lines += _listed("unexpected", self.unexpected, _NAME, known)
        lines += _listed("mismatched", self.mismatched, _LINE)
        super().__init__("\n".join(lines))


def _listed(kind: str, items: Sequence[str], width: int, known: Sequence[str] = ()) -> Iterator[str]:
    """A line for each of the first items, and how many more there are."""
    for item in items[:_LISTED]:
        near = difflib.get_close_matches(item[:width], known, n=1)
        hint = f" (did you mean {_cut(near[0], width)!r}?)" if near else ""
        yield f"  {kind}: {_cut(item, width)}{hint}"
    if len(items) > _LISTED:
        yield f"  {kind}: {len(items) - _LISTED} more, in the attribute `{kind}` of this error"


def _cut(text: str, width: int) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


class ReferenceDefectWarning(UserWarning):
    """reference="lrnnx" reproduces a defect of the reference; reference="paper" does what was published."""
