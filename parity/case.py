"""A reference case: weights, inputs and what the reference made of them."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from compat_torch.checkpoint.state_dict import open_file

GOLDEN = Path(__file__).parent / "golden"

Arrays = dict[str, np.ndarray]

STEP_LIMIT = 3e-5  # of steps, relative to max(1, max|y|)

_RECORDED = {"x", "input_ids", "labels", "y", "logits", "y64", "logits64", "w"}


@dataclass(frozen=True)
class Continuation:
    """Tokens that the reference's language model chose, each the most likely one.

    Attributes:
        prompt: (B, P).
        ids: the prompt and the new tokens, (B, P + new).
        margins: by how much the logit of each new token is above the next best, (B, new).
    """

    prompt: np.ndarray
    ids: np.ndarray
    margins: np.ndarray


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
        grads64: the same gradients of the reference in float64; may be empty.
        step: output of the reference, step by step.
        inputs: what the reference got besides `x`, by argument name, such as integration_timesteps.
        visible: where `x` counts, 1 or 0, broadcast against it; None is everywhere.
        y_bfloat16: output of the reference with weights and arithmetic in bfloat16, where that is far from float64.
        hidden_states: of a language model.
        greedy: of a language model.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    y64: np.ndarray
    w: np.ndarray | None = None
    grads: Arrays = field(default_factory=dict)
    grads64: Arrays = field(default_factory=dict)
    step: np.ndarray | None = None
    inputs: Arrays = field(default_factory=dict)
    visible: np.ndarray | None = None
    y_bfloat16: np.ndarray | None = None
    hidden_states: tuple[np.ndarray, ...] = ()
    greedy: Continuation | None = None


@dataclass(frozen=True)
class Case:
    """A reference module with its weights and its runs.

    Attributes:
        name: unique name.
        cls: the reference class, "package.module:Class".
        kwargs: its constructor arguments; "step_mode" is not one, but how an S4Block steps.
        weights: its state_dict.
        runs: at least one.
        initial: its state_dict before the first forward, where that differs (S4); the outputs are the same.
        remark: what of the reference's record is known to be wrong, and what stands in for it.
        copies: the same weights from other files, under the names these have.
        recorded_in: the precision in which the reference ran, and in which the case is always checked; None is float32.
    """

    name: str
    cls: str
    kwargs: dict[str, Any]
    weights: Arrays
    runs: tuple[Run, ...]
    initial: Arrays | None = None
    remark: str = ""
    copies: dict[str, Arrays] = field(default_factory=dict)
    recorded_in: str | None = None


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
    """Read a case folder: case.json, weights, io and io_L<n>.safetensors; weights_init and grads64 where they exist.

    Where there is io_amended.safetensors, made by the reference without a defect that its metadata names in "remark",
    it takes the place of io.safetensors. A case of transformers has a folder hf in place of the weights.
    """
    meta = json.loads((path / "case.json").read_text())
    first_run, remark = path / "io.safetensors", ""
    if (path / "io_amended.safetensors").exists():
        first_run = path / "io_amended.safetensors"
        with safe_open(first_run, "numpy") as file:
            remark = file.metadata()["remark"]
    if meta.get("kind") == "hf":
        return amended(replace(_read_language_model(path, meta, load_file(first_run)), remark=remark))
    files = [first_run, *sorted(path.glob("io_L*.safetensors"), key=_length_of)]
    time_axis = meta.get("time_axis", 0 if meta.get("kind") == "flax" else 1)
    runs = tuple(run for file in files for run in _split_lengths(_read_run(file, time_axis), time_axis))
    if meta.get("kind") == "digits":
        runs = _split_loss(runs[0], load_file(first_run)["labels"])
    weights = load_file(path / "weights.safetensors")
    first = path / "weights_init.safetensors"
    initial = load_file(first) if first.exists() else None
    exact = path / "grads64.safetensors"
    if exact.exists():
        runs = (replace(runs[0], grads64=_grads(load_file(exact), "grad64.")), *runs[1:])
    kwargs, mode = meta["kwargs"], meta.get("step_kind", "").partition(":")[2]
    if mode:
        kwargs = {**kwargs, "step_mode": mode}
    return amended(Case(path.name, meta["cls"], kwargs, weights, runs, initial, remark))


def amended(case: Case) -> Case:
    """The case with the right answer in place of what the reference is known to compute wrongly."""
    remarks, runs = [case.remark], []
    wrong_step = case.cls == "lrnnx.models.ltv.mamba:Mamba" and case.kwargs.get("discretization") == "bilinear"
    wrong = "uses exp(dt A)"
    if case.cls == "transformers:Mamba2ForCausalLM" and case.kwargs["config"]["time_step_limit"] != _NO_LIMIT:
        wrong_step, wrong = True, "forgets time_step_limit"
    if case.kwargs.get("step_mode") == "diagonal":
        wrong_step, wrong = True, "loses digits in an ill-conditioned eigenbasis"
    sees_all = "attn" in case.kwargs.get("mixer_types", ()) and not case.kwargs["mixer_kwargs"]["attn"].get("causal")
    for run in case.runs:
        if run.step is not None and sees_all:
            remarks.append("the reference's step skips its attention layer, which is not causal: no step to compare")
            run = replace(run, step=None)
        if run.step is not None and (wrong_step or _step_is_inaccurate(run)):
            why = wrong if wrong_step else f"is off by {largest(run.step - run.y64):.0e}"
            remarks.append(f"the reference's step {why}: steps compared with its float64 forward")
            run = replace(run, step=run.y64.astype(run.step.dtype))
        if "lengths" in run.inputs and run.y.ndim > 2:
            remarks.append("the reference's outputs past the lengths are not 0: compared as they are without lengths")
        runs.append(run)
    return replace(case, runs=tuple(runs), remark="; ".join(filter(None, remarks)))


_NO_LIMIT = [0.0, {"__float__": "Infinity"}]


def _step_is_inaccurate(run: Run) -> bool:
    """Whether the steps are the forward pass, but further from float64 than the limit of the comparison."""
    limit = STEP_LIMIT * max(1.0, largest(run.y))
    return run.step is not None and largest(run.step - run.y) <= limit < largest(run.step - run.y64)


def largest(array: np.ndarray) -> float:
    """max|array|, 0 of an empty one."""
    return float(np.max(np.abs(array), initial=0.0))


def _read_language_model(path: Path, meta: dict[str, Any], io: Arrays) -> Case:
    """A case of transformers: its folder hf, the same weights in other files, and what the model made of the tokens.

    Gradients are those of the mean cross entropy of each next token.
    """
    ids, logits = io["input_ids"], io["logits"]
    logits64 = io.get("logits64", logits.astype(np.float64))
    rounded = path / "io_bfloat16.safetensors"
    grads, w = path / "grads.safetensors", None
    if grads.exists():
        w = np.zeros(logits.shape, np.float32)
        w[:, :-1] = _cross_entropy_weights(logits64[:, :-1], ids[:, 1:])
    best = np.sort(io["greedy_logits"], -1)
    run = Run(
        name=f"L={ids.shape[1]}",
        x=ids,
        y=logits,
        y64=logits64,
        w=w,
        grads=_grads(load_file(grads), "grad.") if grads.exists() else {},
        step=io.get("step.logits"),
        y_bfloat16=load_file(rounded)["logits"] if rounded.exists() else None,
        hidden_states=tuple(io[f"hidden_states.{i}"] for i in range(meta["hidden_states"])),
        greedy=Continuation(io["prompt_ids"], io["greedy_ids"], best[..., -1] - best[..., -2]),
    )
    config = json.loads((path / "hf" / "config.json").read_text())
    weights, *others = (folder for folder in _weight_files(path) if folder[1])
    recorded_in = None if meta["dtype"] == "float32" else meta["dtype"]
    return Case(
        path.name, meta["cls"], {"config": config}, _read_files(weights[1]), (run,),
        copies={name: _read_files(files) for name, files in others}, recorded_in=recorded_in,
    )  # fmt: skip


def _weight_files(path: Path) -> list[tuple[str, list[Path]]]:
    names = ("hf/*.safetensors", "hf_sharded/*.safetensors", "mamba_ssm/*.bin", "*.bin")
    return [(name, sorted(path.glob(name))) for name in names]


def _read_files(files: list[Path]) -> Arrays:
    return {name: value for file in files for name, value in open_file(file).tensors.items()}


def _split_lengths(run: Run, time_axis: int) -> list[Run]:
    """A run with lengths as two: what the reference did, zeros for padding and no lengths; and what it means.

    Outputs that are pooled over time, (B, ...) of two axes, depend on the lengths in the reference too: one run.
    """
    if "lengths" not in run.inputs or run.y.ndim < 3:
        return [run]
    shape = [-1, 1, 1]
    shape[time_axis] = run.x.shape[time_axis]
    visible = np.arange(run.x.shape[time_axis]) < run.inputs["lengths"][:, None]
    visible = visible.reshape(shape).astype(run.x.dtype)
    others = {name: value for name, value in run.inputs.items() if name != "lengths"}
    padded = replace(run, name=f"{run.name} padded", inputs=others, visible=visible)
    masked = replace(
        run, name=f"{run.name} lengths", y=run.y * visible, y64=run.y64 * visible, w=None, grads={}, step=None
    )
    return [padded, masked]


def _split_loss(run: Run, labels: np.ndarray, items: int = 16) -> tuple[Run, Run]:
    """A classifier's run as two: all outputs, and the first `items`, whose mean cross entropy has the gradients."""
    first = replace(run, name=f"first {items}", x=run.x[:items], y=run.y[:items], y64=run.y64[:items])
    return replace(run, grads={}), replace(first, w=_cross_entropy_weights(first.y64, labels[:items]))


def _cross_entropy_weights(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """w for which sum(logits * w) has the gradients of the mean cross entropy at these logits (..., classes)."""
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return ((probabilities - np.eye(logits.shape[-1])[labels]) / labels.size).astype(np.float32)


def _length_of(file: Path) -> int:
    return int(file.stem.removeprefix("io_L"))


def _grads(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _read_run(file: Path, time_axis: int) -> Run:
    io = load_file(file)
    inputs = {name: value for name, value in io.items() if name not in _RECORDED and "." not in name}
    x, y = "x" if "x" in io else "input_ids", "y" if "y" in io else "logits"
    return Run(
        name=f"L={io[x].shape[time_axis]}",
        x=io[x],
        y=io[y],
        y64=io[f"{y}64"],
        w=io.get("w"),
        grads=_grads(io, "grad."),
        step=io.get(f"step.{y}"),
        inputs=inputs,
    )
