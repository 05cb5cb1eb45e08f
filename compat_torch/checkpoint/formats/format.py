"""What a checkpoint format is: the names and shapes of one class, and what they say about its arguments."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ...errors import StateDictMismatchError

Tensors = Mapping[str, np.ndarray]
Config = Mapping[str, Any]
Shape = tuple[str | int, ...]
Shapes = Shape | list[Shape] | None
Sizes = Mapping[str, int]


def unchanged(value: np.ndarray) -> np.ndarray:
    """The array itself."""
    return value


@dataclass(frozen=True)
class Rename:
    """A name in the file and the name in our class, where they differ, and how their values do.

    Attributes:
        theirs, ours: templates with the same placeholders: `{i}` is an integer, `{rest}` anything.
        read: the file's array -> ours.
        write: our array -> the file's.
    """

    theirs: str
    ours: str
    read: Callable[[np.ndarray], np.ndarray] = unchanged
    write: Callable[[np.ndarray], np.ndarray] = unchanged


@dataclass(frozen=True)
class Reading:
    """What a format infers constructor arguments from.

    Attributes:
        tensors: the file's, by the file's names.
        sizes: the letters of the shapes that could be solved.
        config: config.json, if there is one.
        given: arguments of the caller, and hyper-parameters stored beside the weights.
        asked: filled while arguments are inferred: what only the caller can give (a name, or "name={...: ...}") -> its
            values.
        taken: filled likewise: names of what is given that went into a configuration.
        assumed: filled likewise: fields of a configuration that nothing gives -> their defaults.
    """

    tensors: Tensors
    sizes: Sizes = field(default_factory=dict)
    config: Config | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    asked: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    assumed: dict[str, Any] = field(default_factory=dict)

    def below(self, prefix: str) -> Reading:
        """The tensors below a dotted name, which is taken off."""
        start = f"{prefix}."
        inner = {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        return Reading(inner, config=self.config, given=self.given)


@dataclass(frozen=True)
class Fit:
    """How well a state dict fits a format.

    Attributes:
        sizes: the value of every letter that could be solved.
        missing, unexpected: names. mismatched: lines "name: expected ..., got ...".
        specific: how many names matched an entry of the table that is not a wildcard.
    """

    sizes: dict[str, int]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    specific: int

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True)
class Format:
    """One class's checkpoints.

    Attributes:
        name: what `format=` takes, such as "lrnnx.lti.S5".
        target: "module:Class"; imported only when it is built.
        shapes: name -> shape: letters (solved from the file), numbers, and sums of products of them, such as "R+2*N".
            A list holds alternatives of different rank; None is any shape. In a name `{i}` is any integer (the name
            must be there for each, from 0 on) and `{rest}` anything.
        arguments: constructor arguments from a `Reading`.
        optional: names that may be absent, with their shapes.
        renames: where names or values differ from the class's own.
        asks: arguments that nothing in the file gives -> their values; the caller must pass them.
        assumes: arguments that nothing in the file gives, which are left at the class's default and logged.
        merges: arguments of the caller that `arguments` completes; its result is what counts.
        overridable: what `arguments` infers may be replaced by the caller.
        claims: evidence in config.json that this is the format, or None. Raises CheckpointError for what is close to
            the format, but not supported.
        ties: pairs (copy, original) of names of one tensor; one of the two is enough.
        refuses: why a state dict with fitting names and shapes is nevertheless not of this format, or None.
        config: config.json of a model, if the format has one.
        filename: of the weights beside config.json. A torch file has a tensor that is tied in the module under each of
            its names, as torch.save writes it, a safetensors file without its copies.
        drops: our names (templates) that the format does not have.
        unwritable: why a module of the class cannot be written in this format, or None.
        prefix: names may come with or without it.
        hint: the mode of the class, where several formats differ in nothing else.
    """

    name: str
    target: str
    shapes: Mapping[str, Shapes]
    arguments: Callable[[Reading], dict[str, Any]]
    optional: Mapping[str, Shapes] = field(default_factory=dict)
    renames: tuple[Rename, ...] = ()
    asks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    assumes: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()
    overridable: bool = False
    claims: Callable[[Config], str | None] = lambda config: None
    refuses: Callable[[Reading], str | None] = lambda reading: None
    ties: tuple[tuple[str, str], ...] = ()
    config: Callable[[Any], dict[str, Any]] | None = None
    filename: str = "model.safetensors"
    drops: tuple[str, ...] = ()
    unwritable: Callable[[Any], str | None] = lambda module: None
    prefix: str = ""
    hint: str = ""

    def load_class(self) -> type:
        """The class, imported."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)

    @cached_property
    def table(self) -> dict[str, Shapes]:
        """Every name with its shape."""
        return {**self.shapes, **self.optional}

    def canonical(self, tensors: Tensors) -> Tensors:
        """The tensors with `prefix` put back before the names, if it is missing from all that should have it."""
        if not self.prefix:
            return tensors
        fixed = {name for name in self.table if not name.startswith(self.prefix)}
        if any(name.startswith(self.prefix) for name in tensors):
            return tensors
        return {name if name in fixed else self.prefix + name: value for name, value in tensors.items()}

    def fit(self, tensors: Tensors) -> Fit:
        """Compare names and shapes; a letter takes the value that most axes agree on."""
        tensors = self.canonical(tensors)
        matched: dict[str, str] = {}
        unexpected, indices = [], set()
        for name in tensors:
            pattern = self._entry(name)
            if pattern is None:
                unexpected.append(name)
                continue
            matched[name] = pattern
            if "{i}" in pattern:
                indices.add(int(fields(pattern, name)[0]))
        known = {name: self._shape(pattern, tensors[name].ndim) for name, pattern in matched.items()}
        sizes = _solve((shape, tensors[name].shape) for name, shape in known.items() if shape is not None)
        mismatched = [
            f"{name}: expected {_wanted(shape, sizes)}, got {_text(tensors[name].shape)}"
            for name, shape in known.items()
            if shape is not None and not _fits(shape, tensors[name].shape, sizes)
        ]
        used = set(matched.values())
        last = min(max(indices, default=-1), len(tensors))
        return Fit(sizes, list(self._missing(tensors, used, last)), unexpected, mismatched, self._specific(matched))

    def describe(self) -> str:
        """The names and shapes, on one line."""
        return ", ".join(f"{name} {_either(shape)}" for name, shape in self.shapes.items())

    def mismatch(self, fit: Fit, path: str) -> StateDictMismatchError:
        """The error for a state dict that does not fit."""
        target = f"{self.name} (read from {path})"
        return StateDictMismatchError(target, fit.missing, fit.unexpected, fit.mismatched, list(self.table))

    def read(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """The tensors under our names, with our values."""
        result = {}
        for name, value in self.canonical(tensors).items():
            for rename in self.renames:
                if (ours := substitute(rename.theirs, rename.ours, name)) is not None:
                    name, value = ours, rename.read(value)
                    break
            result[name] = value
        return result

    def written(self, name: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
        """The file's name for one of our names, and what turns our value into the file's; None if it has none."""
        if any(compiled(template).fullmatch(name) for template in self.drops):
            return None
        for rename in self.renames:
            if (theirs := substitute(rename.ours, rename.theirs, name)) is not None:
                return theirs, rename.write
        return name, unchanged

    def covers(self, tensors: Tensors) -> bool:
        """Every name has an entry in the table."""
        return all(self._entry(name) is not None for name in self.canonical(tensors))

    def _entry(self, name: str) -> str | None:
        if name in self.table:
            return name
        expression, names = self._templates
        match = expression.fullmatch(name)
        return None if match is None else names[str(match.lastgroup)]

    @cached_property
    def _templates(self) -> tuple[re.Pattern[str], dict[str, str]]:
        """One expression for all names with placeholders, and the name that each of its named groups stands for."""
        names = {f"t{number}": name for number, name in enumerate(self.table) if "{" in name}
        groups = (f"(?P<{group}>{compiled(name).pattern})" for group, name in names.items())
        return re.compile("|".join(groups) or "(?!)"), names

    @staticmethod
    def _specific(matched: Mapping[str, str]) -> int:
        return sum("{rest}" not in pattern for pattern in matched.values())

    def _shape(self, pattern: str, rank: int) -> Shape | None:
        shapes = self.table[pattern]
        if not isinstance(shapes, list):
            return shapes
        return next((shape for shape in shapes if len(shape) == rank), shapes[0])

    def _missing(self, tensors: Tensors, used: set[str], last: int) -> Iterator[str]:
        twins = {twin for pair in self.ties for twin in pair if used.intersection(pair)}
        for pattern in self.shapes:
            if pattern in twins:
                continue
            if "{rest}" in pattern or last < 0:
                if pattern not in used:
                    yield pattern
            elif "{i}" in pattern:
                names = (pattern.replace("{i}", str(i)) for i in range(last + 1))
                yield from (name for name in names if name not in tensors)
            elif pattern not in tensors:
                yield pattern


@lru_cache(maxsize=1024)
def compiled(template: str) -> re.Pattern[str]:
    """The regular expression of a template with placeholders."""
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d{1,6})").replace(r"\{rest\}", "(.*)"))


def fields(template: str, name: str) -> tuple[str, ...]:
    """What stands for the placeholders of a template that matches the name; () if it does not match."""
    match = compiled(template).fullmatch(name)
    return () if match is None else match.groups()


def substitute(template: str, into: str, name: str) -> str | None:
    """The name with the pieces it has in `template` put into another template; None if it does not match."""
    match = compiled(template).fullmatch(name)
    if match is None:
        return None
    pieces = iter(match.groups())
    return re.sub(r"\{(i|rest)\}", lambda _: next(pieces), into)


def _solve(pairs: Iterator[tuple[Shape, tuple[int, ...]]]) -> dict[str, int]:
    votes: dict[str, Counter[int]] = {}
    for shape, got in pairs:
        if len(shape) == len(got):
            for axis, size in zip(shape, got, strict=True):
                if isinstance(axis, str) and axis.isidentifier():
                    votes.setdefault(axis, Counter())[size] += 1
    return {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}


def _size(axis: str | int, sizes: Sizes) -> int | None:
    """The value of a number, a letter or a sum of products; None where a letter is unknown."""
    if isinstance(axis, int):
        return axis
    total = 0
    for term in axis.split("+"):
        product = 1
        for factor in term.split("*"):
            value = int(factor) if factor.isdigit() else sizes.get(factor)
            if value is None:
                return None
            product *= value
        total += product
    return total


def _fits(shape: Shape, got: tuple[int, ...], sizes: Sizes) -> bool:
    return len(shape) == len(got) and all(_size(axis, sizes) in (None, n) for axis, n in zip(shape, got, strict=True))


def _wanted(shape: Shape, sizes: Sizes) -> str:
    solved = tuple(axis if (size := _size(axis, sizes)) is None else size for axis in shape)
    return _text(shape) if solved == shape else f"{_text(shape)} = {_text(solved)}"


def _either(shapes: Shapes) -> str:
    if shapes is None:
        return "of any shape"
    return " or ".join(map(_text, shapes)) if isinstance(shapes, list) else _text(shapes)


def _text(shape: tuple[str | int, ...]) -> str:
    return str(shape).replace("'", "")
