"""A reference case: weights, inputs and what the reference made of them."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """One forward pass of the reference, in float32 and float64, with gradients and steps where stored.

    Attributes:
        name: which pass of the case, such as "L=200".
        x: input in the reference's layout.
        y: output of the reference in float32.
        y64: output of the reference in float64.
        w: weights of the loss sum(y * w); None where no gradients are stored.
        grads: gradients of that loss by parameter name, and of the input under "x".
        step: output of the reference, step by step.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    y64: np.ndarray
    w: np.ndarray | None = None
    grads: Arrays = field(default_factory=dict)
    step: np.ndarray | None = None


@dataclass(frozen=True)
class Case:
    """A reference module with its weights and its runs.

    Attributes:
        name: unique name.
        cls: the reference class, "package.module:Class".
        kwargs: its constructor arguments.
        weights: its state_dict.
        runs: at least one.
    """

    name: str
    cls: str
    kwargs: dict[str, Any]
    weights: Arrays
    runs: tuple[Run, ...]


def find_cases(folder: Path, pattern: str = "*") -> list[Path]:
    """Folders of the cases whose name matches `pattern` (a glob, or a part of the name), sorted.

    Raises:
        FileNotFoundError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reference cases at {folder}")
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    paths = (path.parent for path in folder.glob("*/case.json"))
    return sorted(path for path in paths if fnmatch.fnmatchcase(path.name, glob))


def case_class(path: Path) -> str:
    """The reference class of a case folder, without reading its arrays."""
    return json.loads((path / "case.json").read_text())["cls"]


def read_case(path: Path) -> Case:
    """Read a case folder: case.json, weights.safetensors, io.safetensors and io_L<n>.safetensors."""
    meta = json.loads((path / "case.json").read_text())
    files = [path / "io.safetensors", *sorted(path.glob("io_L*.safetensors"), key=_length_of)]
    runs = tuple(_read_run(file, meta.get("time_axis", 1)) for file in files)
    return Case(path.name, meta["cls"], meta["kwargs"], load_file(path / "weights.safetensors"), runs)


def _length_of(file: Path) -> int:
    return int(file.stem.removeprefix("io_L"))


def _read_run(file: Path, time_axis: int) -> Run:
    io = load_file(file)
    grads = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    return Run(
        name=f"L={io['x'].shape[time_axis]}",
        x=io["x"],
        y=io["y"],
        y64=io["y64"],
        w=io.get("w"),
        grads=grads,
        step=io.get("step.y"),
    )
