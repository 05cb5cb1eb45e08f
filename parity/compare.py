"""What "identical" means, and the check of one subject against one case.

y is our output, r32 the reference's, r64 the reference's in float64, err(a, b) = max|a - b| / max|b|.
float32: max|y - r32| <= 1e-5 max(1, max|r64|) + 2 max|r32 - r64| and err(y, r64) <= 2 err(r32, r64) + 8 eps32;
gradients 5e-5 max(1, max|g|), or, where the reference's float32 gradient is further from its float64 gradient than
that, nearer to that one than the reference's; steps 3e-5 max(1, max|y|).
float64: max|y - r64| <= 1e-10 max(1, max|r64|).
Where a case has weights from before the first forward (S4), float32 is checked for both, and r64 belongs to those.
bfloat16: 1e-2 max(1, max|r64|), where r64 is our float64 output, proven by the float64 check, for the same
rounded weights and inputs; or, where the reference in bfloat16 is further from it than that, no further than it. A case
that the reference ran in bfloat16 is checked in bfloat16 whatever is asked for.
Hidden states of language models: 1e-5 max(1, max|r32|). Tokens chosen for their logits: the same, up to the first
choice that a difference of the logits as large as the one measured can change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from .case import STEP_LIMIT, Arrays, Case, Run, case_class, largest, read_case
from .subjects import Subject, subjects_of
from .subjects.language import LanguageSubject

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
        note: what differs, why it is unsupported, or what the reference got wrong.
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


def check_folder(path: Path, precision: Precision = "float32") -> list[Row]:
    """The rows of a case folder, one for each of our answers to its class."""
    cls = case_class(path)
    found = subjects_of(cls)
    if not found:
        return [unsupported(path.name, cls)]
    case = read_case(path)
    return [check(case, subject, precision) for subject in found]


def check(case: Case, subject: Subject, precision: Precision = "float32") -> Row:
    """Run a subject on every run of a case: forward, steps and gradients.

    An exception of the subject is a difference, named in the row; it does not end the report.
    """
    scores = Scores()
    precision = cast(Precision, case.recorded_in or precision)
    try:
        with _x64(precision == "float64"):
            for run in case.runs:
                _check_run(case, subject, run, precision, scores)
    except Exception as err:
        scores.notes.append(f"{type(err).__name__}: {err}")
    return scores.row(case.name, subject.name, case.remark)


class Scores:
    """The worst value of each measure, and a note for each limit that was passed."""

    def __init__(self):
        self.worst: dict[str, float] = {}
        self.notes: list[str] = []
        self.remarks: list[str] = []

    def add(self, measure: str, value: float, limit: float, what: str) -> None:
        if not value <= self.worst.get(measure, -np.inf):
            self.worst[measure] = value
        if not value <= limit:
            self.notes.append(f"{what}: {measure} {value:.2g} > {limit:.2g}")

    def row(self, case: str, subject: str, remark: str = "") -> Row:
        """The outcome, with everything there is to say about it."""
        note = "; ".join(filter(None, [*self.notes, remark, *self.remarks]))
        verdict: Verdict = "differs" if self.notes else "identical"
        forward, step, gradient, relative = (self.worst.get(m) for m in ("forward", "step", "gradient", "relative"))
        return Row(case, subject, forward, step, gradient, relative, verdict, note)


def _x64(on: bool) -> contextlib.AbstractContextManager:
    return jax.enable_x64(True) if on else contextlib.nullcontext()


def _check_run(case: Case, subject: Subject, run: Run, precision: Precision, scores: Scores) -> None:
    dtype = jnp.dtype(precision)
    params = {name: _cast(value, dtype) for name, value in case.weights.items()}
    initial = params if case.initial is None else {name: _cast(value, dtype) for name, value in case.initial.items()}
    inputs = {name: _cast(value, dtype) for name, value in run.inputs.items()}
    x = _cast(run.x, dtype)

    def visible(x):
        return x if run.visible is None else x * run.visible.astype(x.dtype)

    forward = jax.jit(lambda params, x, inputs=inputs: subject.forward(case.kwargs, params, visible(x), **inputs))
    y = _to_float64(forward(params, x))
    if precision == "bfloat16":
        with _x64(True):
            wide = jax.tree.map(lambda value: _cast(value, jnp.dtype(np.float64)), (params, x, inputs))
            r64 = np.asarray(forward(*wide))
        limit = 1e-2
        if run.y_bfloat16 is not None and (own := distance(run.y_bfloat16, r64, r64)) > limit:
            limit = own
            scores.remarks.append(f"the reference in bfloat16 is off by {own:.2g}")
        scores.add("forward", distance(y, r64, r64), limit, run.name)
        if case.recorded_in == precision:
            if run.step is not None:
                steps = _to_float64(jax.jit(partial(subject.steps, case.kwargs))(params, x))
                scores.add("step", distance(steps, r64, r64), 1e-2, f"{run.name} step")
            _check_tokens(case, subject, run, params, largest(y - run.y), scores)
        return
    if case.initial is not None:
        check_forward(_to_float64(forward(initial, x)), run, precision, scores)
    if case.initial is None or precision == "float32":
        check_forward(y, run, precision, scores)
    for name, copy in case.copies.items():
        values = {name: _cast(value, dtype) for name, value in copy.items()}
        check_forward(_to_float64(forward(values, x)), replace(run, name=f"{run.name} {name}"), precision, scores)
    if isinstance(subject, LanguageSubject) and precision == "float32":
        states = jax.jit(partial(subject.hidden_states, case.kwargs))(params, x)
        for i, (ours, theirs) in enumerate(zip(states, run.hidden_states, strict=True)):
            off = distance(_to_float64(ours), theirs, theirs)
            scores.add("forward", off, 1e-5, f"{run.name} hidden_states.{i}")
    _check_tokens(case, subject, run, params, largest(y - run.y), scores)
    if run.step is not None:
        by_steps = jax.jit(lambda params, x: subject.steps(case.kwargs, params, x, **inputs))
        steps = _to_float64(by_steps(params, x))
        scores.add("step", distance(steps, run.step, run.y), STEP_LIMIT, f"{run.name} step")
    if run.w is not None:
        w = run.w.astype(dtype)
        trained = {name: value for name, value in params.items() if jnp.issubdtype(value.dtype, jnp.inexact)}
        start = {**trained, "x": x} if jnp.issubdtype(x.dtype, jnp.inexact) else trained

        def loss(given):
            values = {**params, **given}
            at = values.pop("x", x)
            return jnp.sum(forward(values, at) * w)

        for name, ours, theirs in paired(jax.jit(jax.grad(loss))(start), run.grads):
            check_gradient(_to_float64(ours), theirs, run.grads64.get(name), f"{run.name} grad.{name}", scores)


def check_forward(y: np.ndarray, run: Run, precision: Precision, scores: Scores) -> None:
    """Score outputs against those of the run."""
    scale = max(1.0, largest(run.y64))
    if precision == "float64":
        scores.add("forward", distance(y, run.y64, run.y64), 1e-10, run.name)
        return
    own = largest(run.y - run.y64)
    scores.add("forward", distance(y, run.y, run.y64), 1e-5 + 2 * own / scale, run.name)
    size = largest(run.y64) or 1.0
    scores.add("relative", largest(y - run.y64) / size / (own / size + 4 * EPS32), 2.0, run.name)


def _check_tokens(case: Case, subject: Subject, run: Run, params: Arrays, error: float, scores: Scores) -> None:
    """The tokens that a language model chooses; `error` is by how much logits were found to differ."""
    if run.greedy is None or not isinstance(subject, LanguageSubject):
        return
    prompt, ids, margins = _cast(run.greedy.prompt, jnp.dtype(np.float32)), run.greedy.ids, run.greedy.margins
    new = ids.shape[1] - prompt.shape[1]
    chosen = np.asarray(jax.jit(partial(subject.greedy, case.kwargs, count=new))(params, prompt))
    for row, (ours, theirs) in enumerate(zip(chosen, ids[:, -new:], strict=True)):
        differing = np.flatnonzero(ours != theirs)
        if differing.size and margins[row, differing[0]] > 2 * error:
            scores.notes.append(f"{run.name} token {differing[0]}: {ours[differing[0]]}, not {theirs[differing[0]]}")
        elif differing.size:
            gap, at = margins[row, differing[0]], differing[0]
            scores.remarks.append(f"{at} of {new} tokens compared: the next choice is by {gap:.1g} of its logit")


def check_gradient(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray | None, what: str, scores: Scores) -> None:
    """Score one gradient against the reference's, or against the exact one where the reference is far from it."""
    limit = 5e-5
    if exact is not None and (own := distance(theirs, exact, exact)) > limit:
        theirs, limit = exact, own
        scores.remarks.append(f"the reference's {what} is off by {own:.0e}: compared with its float64 gradient")
    scores.add("gradient", distance(ours, theirs, theirs), limit, what)


def paired(gradients: Arrays, stored: Arrays) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """(name, our gradient, the reference's); a parameter that the reference's graph does not reach has none: 0.

    Gradients with respect to a complex parameter are stored as (dL/dRe, dL/dIm); JAX gives dL/dRe - i dL/dIm.
    """
    ours = {name: in_parts(jnp.conj(value)) for name, value in gradients.items()}
    for name in sorted(ours.keys() | stored.keys()):
        if name not in ours:
            raise KeyError(f"the reference has a gradient for {name!r}, ours has none")
        yield name, ours[name], stored.get(name, np.zeros(ours[name].shape))


def _cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` with its real parts in `dtype` (a complex value, for which no bfloat16 exists, in complex64 of them)."""
    if np.iscomplexobj(value):
        re, im = (
            part.astype(dtype).astype(np.result_type(dtype, np.float32)) for part in (np.real(value), np.imag(value))
        )
        return re + 1j * im
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value.astype(dtype)
    return value.astype(np.int32) if value.dtype == np.int64 else value


def in_parts(value: jax.Array) -> jax.Array:
    """A complex value as (re, im) on a trailing axis."""
    return jnp.stack([value.real, value.imag], -1) if jnp.iscomplexobj(value) else value


def _to_float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def distance(ours: np.ndarray, theirs: np.ndarray, scale_of: np.ndarray) -> float:
    """max|ours - theirs| / max(1, max|scale_of|).

    Raises:
        ValueError: they have different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"expected shape {theirs.shape}, got {ours.shape}")
    return largest(ours - theirs) / max(1.0, largest(scale_of))
