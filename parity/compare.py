"""What "identical" means, and the check of one subject against one case.

y is our output, r32 the reference's, r64 the reference's in float64, err(a, b) = max|a - b| / max|b|.
float32: max|y - r32| <= 1e-5 max(1, max|r64|) + 2 max|r32 - r64| and err(y, r64) <= 2 err(r32, r64) + 8 eps32;
gradients 5e-5 max(1, max|g|), steps 3e-5 max(1, max|y|). float64: max|y - r64| <= 1e-10 max(1, max|r64|).
bfloat16: 1e-2 max(1, max|r64|), where r64 is our float64 output, proven by the float64 check, for the same
rounded weights and inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from .case import Arrays, Case, Run
from .subjects import Subject

Precision = Literal["float32", "float64", "bfloat16"]
Verdict = Literal["identical", "differs", "unsupported"]

EPS32 = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Row:
    """The outcome of one subject on one case.

    Attributes:
        case, subject: names.
        forward: largest max|y - r| / max(1, max|r64|) over the runs, r as in the module docstring.
        step, gradient: the same for steps and for the worst gradient; None where none is stored or compared.
        relative: largest err(y, r64) / (err(r32, r64) + 4 eps32): at most 2 is as close to the truth as the reference.
        verdict: "identical", "differs" or "unsupported".
        note: what differs, or why it is unsupported.
    """

    case: str
    subject: str
    forward: float | None
    step: float | None
    gradient: float | None
    relative: float | None
    verdict: Verdict
    note: str = ""


def unsupported(case: str, cls: str) -> Row:
    """The row of a case whose class does not exist here."""
    return Row(case, "-", None, None, None, None, "unsupported", f"no class for {cls} yet")


def check(case: Case, subject: Subject, precision: Precision = "float32") -> Row:
    """Run a subject on every run of a case: forward, steps and gradients.

    An exception of the subject is a difference, named in the row; it does not end the report.
    """
    scores = _Scores()
    try:
        with _x64(precision == "float64"):
            for run in case.runs:
                _check_run(case, subject, run, precision, scores)
    except Exception as err:
        scores.notes.append(f"{type(err).__name__}: {err}")
    verdict: Verdict = "differs" if scores.notes else "identical"
    worst = scores.worst
    return Row(
        case.name, subject.name, worst.get("forward"), worst.get("step"), worst.get("gradient"),
        worst.get("relative"), verdict, "; ".join(scores.notes),
    )  # fmt: skip


class _Scores:
    """The worst value of each measure, and a note for each limit that was passed."""

    def __init__(self):
        self.worst: dict[str, float] = {}
        self.notes: list[str] = []

    def add(self, measure: str, value: float, limit: float, what: str) -> None:
        if not value <= self.worst.get(measure, -np.inf):
            self.worst[measure] = value
        if not value <= limit:
            self.notes.append(f"{what}: {measure} {value:.2g} > {limit:.2g}")


def _x64(on: bool) -> contextlib.AbstractContextManager:
    return jax.enable_x64(True) if on else contextlib.nullcontext()


def _check_run(case: Case, subject: Subject, run: Run, precision: Precision, scores: _Scores) -> None:
    dtype = jnp.dtype(precision)
    params = {name: value.astype(dtype) for name, value in case.weights.items()}
    x = run.x.astype(dtype)
    forward = jax.jit(lambda params, x: subject.forward(case.kwargs, params, x))
    y = _to_float64(forward(params, x))
    if precision == "bfloat16":
        with _x64(True):
            wide = {name: value.astype(np.float64) for name, value in params.items()}
            r64 = np.asarray(forward(wide, x.astype(np.float64)))
        scores.add("forward", _distance(y, r64, r64), 1e-2, run.name)
        return
    _check_forward(y, run, precision, scores)
    if run.step is not None:
        steps = _to_float64(jax.jit(lambda params, x: subject.steps(case.kwargs, params, x))(params, x))
        scores.add("step", _distance(steps, run.step, run.y), 3e-5, f"{run.name} step")
    if run.w is not None:
        w = run.w.astype(dtype)
        gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(forward(params, x) * w), argnums=(0, 1)))
        of_params, of_x = gradient(params, x)
        for name, ours, theirs in _paired(of_params, of_x, run.grads):
            scores.add("gradient", _distance(_to_float64(ours), theirs, theirs), 5e-5, f"{run.name} grad.{name}")


def _check_forward(y: np.ndarray, run: Run, precision: Precision, scores: _Scores) -> None:
    scale = max(1.0, _largest(run.y64))
    if precision == "float64":
        scores.add("forward", _distance(y, run.y64, run.y64), 1e-10, run.name)
        return
    own = _largest(run.y - run.y64)
    scores.add("forward", _distance(y, run.y, run.y64), 1e-5 + 2 * own / scale, run.name)
    size = _largest(run.y64) or 1.0
    scores.add("relative", _largest(y - run.y64) / size / (own / size + 4 * EPS32), 2.0, run.name)


def _paired(params: Arrays, x: jax.Array, stored: Arrays) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """(name, our gradient, the reference's); a parameter that the reference's graph does not reach has none: 0."""
    ours = {**params, "x": x}
    for name in sorted(ours.keys() | stored.keys()):
        if name not in ours:
            raise KeyError(f"the reference has a gradient for {name!r}, ours has none")
        yield name, ours[name], stored.get(name, np.zeros(ours[name].shape))


def _to_float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _distance(ours: np.ndarray, theirs: np.ndarray, scale_of: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"expected shape {theirs.shape}, got {ours.shape}")
    return _largest(ours - theirs) / max(1.0, _largest(scale_of))
