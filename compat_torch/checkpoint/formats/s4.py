"""S4 as its authors (state-spaces/s4) write it, version 4."""

from __future__ import annotations

from typing import Any

from . import s4_parts
from .format import Format, Reading, Shapes
from .inference import count

_DIAGONAL: dict[str, Shapes] = {
    "D": ("H",),
    "kernel.C": ("H", "n", 2),
    "kernel.log_dt": ("H",),
    **dict.fromkeys(("kernel.log_A_real", "kernel.A_imag"), ("H", "n")),
    "output_linear.0.weight": ("2*H", "H", 1),
    "output_linear.0.bias": ("2*H",),
}


def _block(reading: Reading) -> dict[str, Any]:
    sizes, low_rank = reading.sizes, "layer.kernel.P" in reading.tensors
    found = s4_parts.arguments(reading)
    if found["is_real"]:
        found["d_state"] = sizes["n"]
    return {
        **found,
        **s4_parts.final_act(reading, doubles=True),
        "mode": "dplr" if low_rank else "diag",
        "bidirectional": sizes["k"] == 2 * sizes["c"],
    }


def _block_refuses(reading: Reading) -> str | None:
    copies, channels = reading.sizes["k"], reading.sizes["c"]
    if copies in (channels, 2 * channels):
        return None
    return f"layer.kernel.C has {copies} rows, and layer.D {channels}"


def _block_format(low_rank: bool) -> dict[str, Any]:
    kernel, imaginary = s4_parts.kernel(low_rank, copies="k")
    return {
        "shapes": {
            "layer.D": ("c", "H"),
            **{f"layer.kernel.{name}": shape for name, shape in kernel.items() if name != "P"},
        },
        "optional": {
            **{f"layer.kernel.{name}": shape for name, shape in imaginary.items()},
            "layer.kernel.P": ("r", "S", "n", 2),
            "layer.kernel.l_kernel": (),
            **s4_parts.DENSE,
        },
    }


def _diagonal(reading: Reading) -> dict[str, Any]:
    return {"d_model": reading.sizes["H"], "d_state": 2 * reading.sizes["n"]}


def _model(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {
        "d_input": sizes["I"],
        "d_output": sizes["O"],
        "d_model": sizes["H"],
        "d_state": 2 * sizes["n"],
        "n_layers": count(reading.tensors, "norms.{i}.weight"),
    }


MODELS = (
    Format(
        name="s4.S4Block",
        target="compat_torch.models.original.s4:S4Block",
        **_block_format(True),
        arguments=_block,
        renames=s4_parts.COUNTER,
        assumes=(*s4_parts.ASSUMED, "disc", "activation", "gate_act", "mult_act", "bandlimit"),
        refuses=_block_refuses,
    ),
    Format(
        name="s4.S4D",
        target="compat_torch.models.original.s4:S4D",
        shapes=_DIAGONAL,
        arguments=_diagonal,
        assumes=("transposed",),
    ),
    Format(
        name="s4.S4Model",
        target="compat_torch.architectures.original:S4Model",
        shapes={
            "encoder.weight": ("H", "I"),
            "encoder.bias": ("H",),
            **{f"s4_layers.{{i}}.{name}": shape for name, shape in _DIAGONAL.items()},
            **dict.fromkeys(("norms.{i}.weight", "norms.{i}.bias"), ("H",)),
            "decoder.weight": ("O", "H"),
            "decoder.bias": ("O",),
        },
        arguments=_model,
        assumes=("prenorm", "dropout"),
    ),
)
