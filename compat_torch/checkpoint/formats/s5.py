"""S5 as its authors (lindermanlab/S5, flax) and as s5-pytorch write it."""

from __future__ import annotations

from typing import Any

from .format import Format, Reading, Shapes
from .inference import ratio

_SEQ: dict[str, Shapes] = {
    "Lambda": ("P",),
    "B": ("P", "H", 2),
    "C": ("H", "Q"),
    "D": ("H",),
    "log_step": ("P",),
}
_ASSUMED = ("liquid", "degree")


def _flax(reading: Reading) -> dict[str, Any]:
    sizes, names = reading.sizes, reading.tensors
    P = sizes["P"] * (2 if reading.given.get("conj_sym") else 1)
    found: dict[str, Any] = {"H": sizes["H"], "P": P}
    if "C1" in names:
        return {**found, "bidirectional": True}
    if names["C"].shape[1] == 2 * sizes["P"]:
        return {**found, "bidirectional": True, "C_init": "complex_normal"}
    return {**found, "bidirectional": False}


def _flax_refuses(reading: Reading) -> str | None:
    names, P = reading.tensors, reading.sizes["P"]
    if "C" in names and {"C1", "C2"} & names.keys():
        return "it has C and C1 or C2"
    if "C" not in names and not {"C1", "C2"} <= names.keys():
        return "it has neither C nor C1 and C2"
    return _width(names["C"].shape[1], P) if "C" in names else None


def _width(columns: int, P: int) -> str | None:
    return None if columns in (P, 2 * P) else f"C has {columns} columns, not {P} or {2 * P}"


def _pytorch(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {"width": sizes["H"], "state_width": sizes["P"], "bidir": sizes["Q"] == 2 * sizes["P"]}


def _pytorch_block(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {
        "dim": sizes["H"],
        "state_dim": sizes["P"],
        "bidir": sizes["Q"] == 2 * sizes["P"],
        "glu": sizes["e"] == 2 * sizes["F"],
        "ff_mult": ratio(sizes["F"], sizes["H"]),
    }


def _pytorch_refuses(reading: Reading) -> str | None:
    return _width(reading.sizes["Q"], reading.sizes["P"])


MODELS = (
    Format(
        name="s5.S5SSM",
        target="compat_torch.models.original.s5:S5SSM",
        shapes={
            **dict.fromkeys(("Lambda_re", "Lambda_im"), ("P",)),
            "B": ("P", "H", 2),
            "D": ("H",),
            "log_step": ("P", 1),
        },
        optional={"C": ("H", "Q", 2), "C1": ("H", "P", 2), "C2": ("H", "P", 2)},
        arguments=_flax,
        asks={"discretization": ("zoh", "bilinear"), "conj_sym": (True, False)},
        assumes=("clip_eigs", "step_rescale"),
        refuses=_flax_refuses,
    ),
    Format(
        name="s5_pytorch.S5",
        target="compat_torch.models.original.s5:S5",
        shapes={f"seq.{name}": shape for name, shape in _SEQ.items()},
        arguments=_pytorch,
        assumes=_ASSUMED,
        refuses=_pytorch_refuses,
    ),
    Format(
        name="s5_pytorch.S5Block",
        target="compat_torch.models.original.s5:S5Block",
        shapes={
            **{f"s5.seq.{name}": shape for name, shape in _SEQ.items()},
            **dict.fromkeys(("attn_norm.weight", "attn_norm.bias", "ff_norm.weight", "ff_norm.bias"), ("H",)),
            "ff_enc.weight": ("e", "H"),
            "ff_dec.weight": ("H", "F"),
        },
        arguments=_pytorch_block,
        assumes=_ASSUMED,
        refuses=_pytorch_refuses,
    ),
)
