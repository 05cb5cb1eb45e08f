"""What the layers of lrnnx and of the original S4 have in common: the kernel's tensors, and the sizes they give."""

from __future__ import annotations

from typing import Any

import numpy as np

from .format import Reading, Rename, Shapes

DENSE: dict[str, Shapes] = {
    "input_linear.weight": ("H", "d"),
    "input_linear.bias": ("H",),
    "input_gate.0.weight": ("g", "d"),
    "input_gate.0.bias": ("g",),
    "output_gate.weight": ("g", "c*H"),
    "output_gate.bias": ("g",),
    "output_linear.0.weight": ("o", "w"),
    "output_linear.0.bias": ("o",),
}
ASSUMED = (
    "transposed", "l_max", "dt_transform", "dt_fast", "real_transform", "imag_transform", "swap_channels",
)  # fmt: skip
_ACTIVATIONS = ("id", "gelu", "relu", "silu", "tanh", "sigmoid", "elu", "softplus")
COUNTER = (Rename("{rest}l_kernel", "{rest}l_kernel", write=lambda value: value.astype(np.int64)),)


def kernel(low_rank: bool, copies: str = "c") -> tuple[dict[str, Shapes], dict[str, Shapes]]:
    """The names and shapes of the system: what is always there, and what is not there for real systems."""
    shapes: dict[str, Shapes] = {
        "inv_dt": ("H", "t"),
        "C": [(copies, "H", "n", 2), (copies, "H", "n")],
        "B": [(1, "S", "n", 2), (1, "S", "n")],
        "A_real": ("S", "n"),
    }
    if low_rank:
        shapes["P"] = ("r", "S", "n", 2)
    return shapes, {"A_imag": ("S", "n")}


def arguments(reading: Reading) -> dict[str, Any]:
    """Constructor arguments from the sizes."""
    sizes, names = reading.sizes, reading.tensors
    C = next(value for name, value in names.items() if name == "C" or name.endswith(".kernel.C"))
    H, is_real = sizes["H"], C.ndim == 3
    found: dict[str, Any] = {
        "d_model": sizes.get("d", H),
        "channels": sizes["c"],
        "d_state": 2 * sizes["n"],
        "n_ssm": sizes["S"],
        "is_real": is_real,
        "dt_tie": sizes["t"] == 1,
    }
    if "r" in sizes:
        found["rank"] = sizes["r"]
    if "input_linear.weight" in names:
        found["bottleneck"] = max(1, found["d_model"] // H)
    if "input_gate.0.weight" in names:
        found["gate"] = sizes["g"] // H
    return found


def final_act(reading: Reading, doubles: bool) -> dict[str, Any]:
    """The activation after the output projection, as far as its rows tell; asks for it where they do not.

    Args:
        reading: with the sizes of the layer.
        doubles: with "glu" the projection has twice the width.
    """
    weight = reading.tensors.get("output_linear.0.weight")
    if "final_act" in reading.given:
        return {}
    if weight is None:
        return {"final_act": None}
    if doubles and weight.shape[0] != 2 * reading.sizes.get("d", reading.sizes["H"]):
        reading.asked["final_act"] = _ACTIVATIONS
    return {}
