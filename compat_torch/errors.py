"""Exceptions raised while reading checkpoints and state dicts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated, damaged or not a checkpoint at all."""


class UnknownFormatError(CheckpointError):
    """The file is readable, but its keys and shapes match no known format."""


class StateDictMismatchError(CheckpointError):
    """Keys or shapes of a state dict do not fit the module.

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
        lines += [f"  missing: {name}" for name in self.missing]
        for name in self.unexpected:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            lines.append(f"  unexpected: {name}{hint}")
        lines += [f"  mismatched: {line}" for line in self.mismatched]
        super().__init__("\n".join(lines))


class ReferenceDefectWarning(UserWarning):
    """reference="lrnnx" reproduces a defect of the reference; reference="paper" does what was published."""
