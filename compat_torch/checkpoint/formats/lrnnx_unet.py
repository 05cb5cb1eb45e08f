"""The U-Net of lrnnx, whose levels have widths of their own."""

from __future__ import annotations

from typing import Any

from .format import Format, Reading, Shapes
from .inference import count
from .lrnnx_layers import LAYERS

_LRU = next(layer for layer in LAYERS if layer.name == "lrnnx.lti.LRU")
_LAST = {"nu_log": ("C",), "D": ("C",), "B_re": ("C", "C")}


def _block(where: str) -> dict[str, Shapes]:
    """The names of an LRU; of which width, the constructed class knows."""
    return {f"{where}.0.lru_layer.{name}": None for name in _LRU.shapes}


def _norm(where: str) -> dict[str, Shapes]:
    return {f"{where}.1.norm.{name}": None for name in ("weight", "bias")}


def _arguments(reading: Reading) -> dict[str, Any]:
    tensors, channels = reading.tensors, reading.sizes["C"]
    depth = count(tensors, "down_ssms.{i}.1.conv.weight")
    kernels = [tensors[f"down_ssms.{i}.1.conv.weight"].shape for i in range(depth)]
    return {
        "in_channels": channels,
        "out_channels": reading.sizes.get("O", channels),
        "channels": [wider for wider, _, _ in kernels],
        "resample_factors": [factor for _, _, factor in kernels],
    }


_BLOCKS = ("down_ssms.{i}.0", "hid_ssms.0", "hid_ssms.1", "up_ssms.{i}.1", "last_ssms.0")

MODELS = (
    Format(
        name="lrnnx.lru_unet",
        target="compat_torch.architectures.lru_unet:LRUUnet",
        shapes={
            **{name: None for where in (*_BLOCKS, "last_ssms.1") for name in _block(where)},
            **{f"last_ssms.1.0.lru_layer.{name}": shape for name, shape in _LAST.items()},
            **dict.fromkeys(("down_ssms.{i}.1.conv.weight", "down_ssms.{i}.1.conv.bias")),
            **dict.fromkeys(("up_ssms.{i}.0.deconv.weight", "up_ssms.{i}.0.deconv.bias")),
        },
        optional={
            **{name: None for where in _BLOCKS for name in _norm(where)},
            "final_proj.weight": ("O", "C", 1),
        },
        arguments=_arguments,
        asks={"causal": (False, True)},
    ),
)
