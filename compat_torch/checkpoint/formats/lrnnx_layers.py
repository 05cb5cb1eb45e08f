"""The layers of lrnnx."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from . import s4_parts
from .format import Format, Reading
from .inference import ratio

_DISCRETIZATION = {
    "lti.S5": ("zoh", "bilinear", "dirac", "no_discretization"),
    "ltv.S5": ("zoh", "bilinear", "dirac"),
    "ltv.Mamba": ("mamba", "zoh", "bilinear", "dirac"),
}
MAMBA_SHAPES = {
    "in_proj.weight": ("2*I", "H"),
    "conv1d.weight": ("I", 1, "K"),
    "x_proj.weight": ("R+2*N", "I"),
    "dt_proj.weight": ("I", "R"),
    "dt_proj.bias": ("I",),
    "A_log": ("I", "N"),
    "D": ("I",),
    "out_proj.weight": ("H", "I"),
}
MAMBA_BIASES = {"in_proj.bias": ("2*I",), "conv1d.bias": ("I",), "out_proj.bias": ("H",)}


def _asks(name: str) -> dict[str, tuple[Any, ...]]:
    return {"discretization": _DISCRETIZATION[name]}


def _lti_s5(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {"d_model": sizes["H"], "d_state": sizes["N"] * (2 if reading.given.get("conj_sym") else 1)}


def _states(reading: Reading) -> dict[str, Any]:
    return {"d_model": reading.sizes["H"], "d_state": reading.sizes["N"]}


def _mamba(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {
        **_states(reading),
        "d_conv": sizes["K"],
        "expand": ratio(sizes["I"], sizes["H"]),
        "dt_rank": sizes["R"],
        "conv_bias": "conv1d.bias" in reading.tensors,
        "bias": "in_proj.bias" in reading.tensors,
    }


def _rglru(reading: Reading) -> dict[str, Any]:
    sizes = reading.sizes
    return {
        "d_model": sizes["H"],
        "d_conv": sizes["K"],
        "expand": ratio(sizes["I"], sizes["H"]),
        "conv_bias": "conv1d.bias" in reading.tensors,
        "bias": "in_proj.bias" in reading.tensors,
    }


def _fits(reading: Reading) -> str | None:
    return None


def _centaurus(
    name: str,
    mode: str,
    B: tuple[str, ...],
    C: tuple[str, ...],
    refuses: Callable[[Reading], str | None] = _fits,
) -> Format:
    def arguments(reading: Reading) -> dict[str, Any]:
        N = reading.sizes["N"]
        d_model = {"dws": N, "full": math.isqrt(N)}.get(mode) or reading.sizes["H"]
        return {"d_model": d_model, "d_state": N, "sub_state_dim": reading.sizes["M"]}

    shapes = {"A": ("N", "M"), "B": B, "C": C, "log_delta": ("N",)}
    return Format(
        name=f"lrnnx.lti.{name}",
        target=f"compat_torch.models.lti:{name}",
        shapes=shapes if mode == "pointwise" else {**shapes, "E": ("N", "M")},
        arguments=arguments,
        assumes=("discretization",),
        refuses=refuses,
        hint=mode,
    )


def _not_square(reading: Reading) -> str | None:
    N = reading.sizes["N"]
    return None if math.isqrt(N) ** 2 == N else f"N = {N} is not a square"


def _s4(name: str, own: dict[str, Any], assumes: tuple[str, ...]) -> Format:
    kernel, imaginary = s4_parts.kernel(name == "S4")
    copies = {f"layer.kernel.{leaf}": shape for leaf, shape in kernel.items()}
    copies_of_imaginary = {f"layer.kernel.{leaf}": shape for leaf, shape in imaginary.items()}
    return Format(
        name=f"lrnnx.lti.{name}",
        target=f"compat_torch.models.lti:{name}",
        shapes={**kernel, **copies, "D": ("c", "H"), **own},
        optional={**imaginary, **copies_of_imaginary, **s4_parts.DENSE},
        arguments=lambda reading: {
            **s4_parts.arguments(reading),
            **s4_parts.final_act(reading, doubles=reading.given.get("reference") == "paper"),
        },
        renames=s4_parts.COUNTER,
        assumes=(*s4_parts.ASSUMED, *assumes),
        ties=tuple((f"layer.kernel.{leaf}", leaf) for leaf in (*kernel, *imaginary)),
    )


LAYERS = (
    Format(
        name="lrnnx.lti.S5",
        target="compat_torch.models.lti:S5",
        shapes={"A": ("N", 2), "B": ("N", "H"), "log_dt": ("N",), "C": ("H", "N", 2), "D": ("H", "H")},
        arguments=_lti_s5,
        asks=_asks("lti.S5"),
        assumes=("conj_sym",),
    ),
    Format(
        name="lrnnx.lti.LRU",
        target="compat_torch.models.lti:LRU",
        shapes={
            **dict.fromkeys(("nu_log", "theta_log", "gamma_log"), ("N",)),
            **dict.fromkeys(("B_re", "B_im"), ("N", "H")),
            **dict.fromkeys(("C_re", "C_im"), ("H", "N")),
            "D": ("H",),
        },
        arguments=_states,
    ),
    _s4("S4", {"layer.kernel.l_kernel": ()}, ()),
    _s4("S4D", {}, ("disc",)),
    _centaurus("CentaurusNeck", "neck", ("N", "H"), ("H", "N")),
    _centaurus("CentaurusPWNeck", "pointwise", ("N*M", "H"), ("H", "N*M")),
    _centaurus("CentaurusDWS", "dws", ("N",), ("N",)),
    _centaurus("CentaurusFull", "full", ("N",), ("N",), _not_square),
    Format(
        name="lrnnx.ltv.Mamba",
        target="compat_torch.models.ltv:Mamba",
        shapes={**MAMBA_SHAPES, "dtA_proj.weight": ("I", "R"), "dtA_proj.bias": ("I",)},
        optional=MAMBA_BIASES,
        arguments=_mamba,
        asks=_asks("ltv.Mamba"),
    ),
    Format(
        name="lrnnx.ltv.S5",
        target="compat_torch.models.ltv:S5",
        shapes={"A": ("N", 2), "B": ("N", "H", 2), "C": ("H", "N", 2), "D": ("H",), "log_dt": ("N",)},
        arguments=_states,
        asks={**_asks("ltv.S5"), "conj_sym": (False, True)},
        assumes=("step_rescale",),
    ),
    Format(
        name="lrnnx.ltv.RGLRU",
        target="compat_torch.models.ltv:RGLRU",
        shapes={
            **dict.fromkeys(("gate_proj.weight", "in_proj.weight"), ("I", "H")),
            "conv1d.weight": ("I", 1, "K"),
            **dict.fromkeys(("recurrent_gate_proj.weight", "input_gate_proj.weight"), ("I", "I")),
            **dict.fromkeys(("recurrent_gate_proj.bias", "input_gate_proj.bias"), ("I",)),
            "a_log": ("I", 1),
            "out_proj.weight": ("H", "I"),
        },
        optional={
            **dict.fromkeys(("gate_proj.bias", "in_proj.bias", "conv1d.bias"), ("I",)),
            "out_proj.bias": ("H",),
        },
        arguments=_rglru,
        assumes=("c",),
    ),
    Format(
        name="lrnnx.ltv.S7",
        target="compat_torch.models.ltv:S7",
        shapes={
            "base_params": ("N",),
            **dict.fromkeys(("in_proj.weight", "gate_proj.weight"), ("H", "H")),
            "x_proj.weight": ("2*N+2*N*H+H", "H"),
        },
        arguments=_states,
    ),
)
MAMBA_LAYER = Format(
    name="mamba_ssm.Mamba",
    target="compat_torch.models.ltv:Mamba",
    shapes=MAMBA_SHAPES,
    optional=MAMBA_BIASES,
    arguments=_mamba,
    drops=("dtA_proj.{rest}",),
    unwritable=lambda layer: (
        None if layer.discretization == "mamba" else f"its discretization is {layer.discretization!r}, not 'mamba'"
    ),
)
