"""The table of checkpoint formats: which names and shapes a class has, and what they say about its sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import StateDictMismatchError

Shape = tuple[str | int, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Fit:
    """How well a state dict fits a format; `sizes` has the value of every letter that could be solved."""

    sizes: dict[str, int]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True)
class CheckpointFormat:
    """One class's state dict.

    Attributes:
        name: what `format=` takes, such as "lrnnx.lti.S5".
        module, class_name: where the class is; imported only when it is built.
        shapes: name -> shape, in letters (solved from the file) and fixed numbers.
        sizes: (letters, keyword arguments) -> constructor sizes.
        asks: constructor arguments that shapes cannot give -> their values.
    """

    name: str
    module: str
    class_name: str
    shapes: Mapping[str, Shape]
    sizes: Callable[[Sizes, Mapping[str, object]], dict[str, int]]
    asks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fit(self, tensors: Mapping[str, np.ndarray]) -> Fit:
        """Compare names and shapes; letters take the value that most axes agree on."""
        common = [name for name in self.shapes if name in tensors]
        votes: dict[str, Counter[int]] = {}
        for name in common:
            expected, got = self.shapes[name], tensors[name].shape
            if len(expected) == len(got):
                for letter, size in zip(expected, got, strict=True):
                    if isinstance(letter, str):
                        votes.setdefault(letter, Counter())[size] += 1
        sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
        mismatched = [
            f"{name}: expected {self._shape(name, sizes)}, got {_text(tensors[name].shape)}"
            for name in common
            if tuple(sizes.get(str(axis), axis) for axis in self.shapes[name]) != tensors[name].shape
        ]
        return Fit(
            sizes,
            [name for name in self.shapes if name not in tensors],
            [name for name in tensors if name not in self.shapes],
            mismatched,
        )

    def describe(self) -> str:
        """The names and shapes, on one line."""
        return ", ".join(f"{name} {_text(shape)}" for name, shape in self.shapes.items())

    def mismatch(self, fit: Fit, path: str) -> StateDictMismatchError:
        """The error for a state dict that does not fit."""
        target = f"{self.name} (read from {path})"
        known = list(self.shapes)
        return StateDictMismatchError(target, fit.missing, fit.unexpected, fit.mismatched, known)

    def _shape(self, name: str, sizes: Sizes) -> str:
        shape = self.shapes[name]
        solved = tuple(sizes.get(str(axis), axis) for axis in shape)
        return _text(shape) if solved == shape else f"{_text(shape)} = {_text(solved)}"


def _text(shape: tuple[str | int, ...]) -> str:
    return str(shape).replace("'", "")


def _s5_sizes(letters: Sizes, kwargs: Mapping[str, object]) -> dict[str, int]:
    return {"d_model": letters["H"], "d_state": letters["N"] * (2 if kwargs.get("conj_sym") else 1)}


def _lru_sizes(letters: Sizes, kwargs: Mapping[str, object]) -> dict[str, int]:
    return {"d_model": letters["H"], "d_state": letters["N"]}


LRNNX_S5 = CheckpointFormat(
    name="lrnnx.lti.S5",
    module="compat_torch.models.lti",
    class_name="S5",
    shapes={"A": ("N", 2), "B": ("N", "H"), "log_dt": ("N",), "C": ("H", "N", 2), "D": ("H", "H")},
    sizes=_s5_sizes,
    asks={"discretization": ("zoh", "bilinear", "dirac", "no_discretization")},
)
LRNNX_LRU = CheckpointFormat(
    name="lrnnx.lti.LRU",
    module="compat_torch.models.lti",
    class_name="LRU",
    shapes={
        "nu_log": ("N",),
        "theta_log": ("N",),
        "gamma_log": ("N",),
        "B_re": ("N", "H"),
        "B_im": ("N", "H"),
        "C_re": ("H", "N"),
        "C_im": ("H", "N"),
        "D": ("H",),
    },
    sizes=_lru_sizes,
)

TABLE: dict[str, CheckpointFormat] = {entry.name: entry for entry in (LRNNX_S5, LRNNX_LRU)}
