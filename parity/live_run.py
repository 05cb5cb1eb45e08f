"""Running an installed lrnnx on a CPU, and keeping what it computes."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from .case import Case, Run
from .torch_run import gradients, in_float64, output_of

LRNNX = "lrnnx==1.0.0.post1"
INSTALL = f"""pip install torch
pip install --no-build-isolation --no-deps {LRNNX}
pip install einops opt-einsum triton"""

_SCANS = ("selective_scan", "simplified_scan", "rglru_scan", "s7_scan")


class ReferenceMissingError(ImportError):
    """The reference library is not installed; the message says how to install it."""


def import_class(cls: str) -> Any:
    """The reference class "package.module:Class", its CUDA kernels replaced by the reference's own CPU functions.

    Raises:
        ReferenceMissingError: lrnnx cannot be imported.
    """
    module, name = cls.split(":")
    for extension in ("selective_scan_cuda", "simplified_scan_cuda"):
        sys.modules.setdefault(extension, types.ModuleType(extension))
    try:
        found = importlib.import_module(module)
        for scan in _SCANS:
            if hasattr(found, f"{scan}_fn"):
                on_cpu = getattr(importlib.import_module(f"lrnnx.ops.{scan}"), f"{scan}_ref")
                vars(found).update({f"{scan}_fn": on_cpu, "selective_state_update": None})
        return getattr(found, name)
    except ImportError as err:
        raise ReferenceMissingError(
            f"the reference cannot be imported ({err}); in an environment of its own, install it with\n{INSTALL}"
        ) from err


def record(
    case: Case,
    model: Any,
    x: Any,
    inputs: dict[str, Any],
    steps: Callable[[Any], np.ndarray] | None = None,
    *,
    time_axis: int = 1,
) -> Case:
    """The case with the weights of `model` and one run of it: float32, float64, gradients, steps.

    Args:
        case: name, class and arguments; whatever else it has is replaced.
        model: a torch module; its weights may change (S4 rewrites C in its first forward).
        x: input tensor.
        inputs: further arguments of the model, tensors by name.
        steps: outputs step by step of the model, in the layout of y; None where the reference has none.
        time_axis: of x.
    """
    import torch

    initial, model64 = _weights(model), copy.deepcopy(model)
    given = x.clone().requires_grad_(x.is_floating_point())
    y = output_of(model(given, **inputs))
    w = torch.randn(y.shape)
    grads = gradients(model, given, y, w)
    weights = _weights(model)
    with torch.no_grad():
        stepped = None if steps is None else steps(model)
    y64, grads64 = in_float64(model64, x, inputs, w)
    run = Run(
        name=f"L={x.shape[time_axis]}", x=x.numpy(), y=y.detach().numpy(), y64=y64, w=w.numpy(), grads=grads,
        grads64=grads64, step=stepped, inputs={name: value.numpy() for name, value in inputs.items()},
    )  # fmt: skip
    changed = any(not np.array_equal(initial[name], weights[name]) for name in weights)
    return Case(
        case.name, case.cls, case.kwargs, weights, (run,), initial=initial if changed else None, remark=case.remark
    )


def versions() -> dict[str, str]:
    """Versions of the reference and its torch, for the report."""
    return {name: metadata.version(name) for name in ("lrnnx", "torch")}


def _weights(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}
