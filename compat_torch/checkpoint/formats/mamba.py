"""Mamba, Mamba-2 and Falcon Mamba, as state-spaces and as Hugging Face write them.

Our classes have the names of state-spaces (Falcon Mamba: of Hugging Face) and the configurations of Hugging Face.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ... import state
from ...architectures.config import is_integer
from ...errors import CheckpointError
from .format import Config, Format, Reading, Rename, Shapes
from .inference import agree, completed, count, ratio, tied, untied
from .lrnnx_layers import MAMBA_BIASES, MAMBA_SHAPES

_MAMBA1 = "compat_torch.architectures.mamba_lm"
_MAMBA2 = "compat_torch.architectures.mamba2_lm"
_EMBEDDING = Rename("backbone.embeddings.weight", "backbone.embedding.weight")
Arguments = Callable[[Reading], dict[str, Any]]


@dataclass(frozen=True)
class Bare:
    """How the configuration of a file without config.json is made.

    Attributes:
        sizes: Hugging Face's fields that names and shapes give.
        assumes: fields that change the outputs and have a default.
        asks: fields that only the caller can give -> their values.
    """

    sizes: Callable[[Reading], dict[str, Any]]
    assumes: tuple[str, ...]
    asks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SOURCE = "mamba_ssm"
_NOT_HF = (_SOURCE, "pad_vocab_size_multiple", "d_ssm", "D_has_hdim")

_MIXER2: dict[str, Shapes] = {
    "in_proj.weight": ("p", "H"),
    "conv1d.weight": ("E", 1, "K"),
    "dt_bias": ("h",),
    "A_log": ("h",),
    "D": ("D",),
    "out_proj.weight": ("H", "I"),
}
_OPTIONAL2: dict[str, Shapes] = {
    "norm.weight": ("s",),
    "in_proj.bias": ("p",),
    "conv1d.bias": ("E",),
    "out_proj.bias": ("H",),
}


def _names(embedding: str, mixer: Mapping[str, Shapes]) -> dict[str, Shapes]:
    return {
        f"backbone.{embedding}.weight": ("V", "H"),
        "backbone.layers.{i}.norm.weight": ("H",),
        **{f"backbone.layers.{{i}}.mixer.{name}": shape for name, shape in mixer.items()},
        "backbone.norm_f.weight": ("H",),
        "lm_head.weight": ("V", "H"),
    }


def _optional(mixer: Mapping[str, Shapes]) -> dict[str, Shapes]:
    return {f"backbone.layers.{{i}}.mixer.{name}": shape for name, shape in mixer.items()}


def _has(reading: Reading, leaf: str) -> bool:
    return f"backbone.layers.0.mixer.{leaf}" in reading.tensors


def _sizes1(reading: Reading) -> dict[str, Any]:
    """Hugging Face's fields that names and shapes of Mamba-1 give."""
    sizes = reading.sizes
    return {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["H"],
        "num_hidden_layers": count(reading.tensors, "backbone.layers.{i}.norm.weight"),
        "state_size": sizes["N"],
        "conv_kernel": sizes["K"],
        "expand": ratio(sizes["I"], sizes["H"]),
        "intermediate_size": sizes["I"],
        "time_step_rank": sizes["R"],
        "use_bias": _has(reading, "in_proj.bias"),
        "use_conv_bias": _has(reading, "conv1d.bias"),
    }


def _sizes2(reading: Reading) -> dict[str, Any]:
    """Hugging Face's fields that names and shapes of Mamba-2 give, the states with the caller's number of groups."""
    sizes = reading.sizes
    channels = sizes.get("s", sizes["I"])
    found = {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["H"],
        "num_hidden_layers": count(reading.tensors, "backbone.layers.{i}.norm.weight"),
        "conv_kernel": sizes["K"],
        "expand": ratio(sizes["I"], sizes["H"]),
        "num_heads": sizes["h"],
        "head_dim": channels // sizes["h"],
        "D_has_hdim": sizes["D"] != sizes["h"],
        "use_bias": _has(reading, "in_proj.bias"),
        "use_conv_bias": _has(reading, "conv1d.bias"),
    }
    if channels != sizes["I"]:
        found["d_ssm"] = channels
    states, groups = (sizes["E"] - channels) // 2, reading.given.get("n_groups")
    if groups is not None:
        if not is_integer(groups, 1, states) or states % groups:
            raise CheckpointError(
                f"n_groups must be a divisor of {states}, the states of all groups, got {str(groups)[:40]}"
            )
        found["state_size"] = states // groups
    return found


_ASSUMED = ("layer_norm_epsilon", "residual_in_fp32")
_BARE1 = Bare(_sizes1, _ASSUMED)
_BARE_FALCON = Bare(_sizes1, (*_ASSUMED, "mixer_rms_eps"))
_BARE2 = Bare(
    _sizes2, (*_ASSUMED, "time_step_limit"), {"n_groups": ("the number of groups of heads that share B and C",)}
)


def _configuration(reading: Reading, target: str, bare: Bare, stated: Config | None) -> dict[str, Any]:
    """{"config": ...} from what is stated, or else from the tensors and the caller; the tensors tie the head."""
    module, _, name = target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    embedding = next(name for name in reading.tensors if name.startswith("backbone.embedding"))
    same = tied(reading, "lm_head.weight", embedding)
    if stated is None:
        stated = completed(reading, cls, {**bare.sizes(reading), "tie_word_embeddings": same}, bare.asks, bare.assumes)
        return {} if reading.asked else {"config": cls.from_dict(stated)}
    layers = count(reading.tensors, "backbone.layers.{i}.norm.weight")
    agree(stated, {"hidden_size": reading.sizes["H"], "num_hidden_layers": layers})
    return {"config": untied(cls.from_dict(stated), same)}


def _from_hf(target: str, bare: Bare) -> Arguments:
    return lambda reading: _configuration(reading, target, bare, reading.config)


def _from_mamba_ssm(target: str, layer: str, bare: Bare) -> Arguments:
    def arguments(reading: Reading) -> dict[str, Any]:
        stated = None if reading.config is None else _read_mamba_ssm(_standard(reading.config), layer)
        if stated is not None and layer == "Mamba2":
            stated["num_heads"] = reading.sizes["h"]
        return _configuration(reading, target, bare, stated)

    return arguments


def claims_hf(model_type: str) -> Callable[[Config], str | None]:
    """Evidence for a model type of transformers."""

    def claims(config: Config) -> str | None:
        ours = config.get("model_type") == model_type and not _is_mistral(config)
        return f"config.json has model_type {model_type!r}" if ours else None

    return claims


def _is_mistral(config: Config) -> bool:
    """It is the params.json of Mistral's Mamba-2 (Codestral)."""
    return {"dim", "n_layers", "n_groups"} <= config.keys()


def _standard(config: Config) -> Config:
    """The config.json of state-spaces that a params.json of Mistral stands for; others as they are."""
    if not _is_mistral(config):
        return config
    kept = {name: value for name, value in config.items() if name not in ("dim", "n_layers", "n_groups", "model_type")}
    own = {"layer": "Mamba2", "ngroups": config["n_groups"]}
    return {"d_model": config["dim"], "n_layer": config["n_layers"], "ssm_cfg": own, **kept}


def _claims_mamba_ssm(layer: str) -> Callable[[Config], str | None]:
    def claims(config: Config) -> str | None:
        mistral = _is_mistral(config)
        config = _standard(config)
        if "model_type" in config or "mixer_types" in config or not {"d_model", "n_layer"} <= config.keys():
            return None
        cfg = config.get("ssm_cfg") or {}
        found = cfg.get("layer", "Mamba1") if isinstance(cfg, Mapping) else cfg
        if found not in ("Mamba1", "Mamba2"):
            raise CheckpointError(f"ssm_cfg has layer {str(found)[:40]!r}, which is not supported: Mamba1 or Mamba2 is")
        if found != layer:
            return None
        for name, what in (("attn_layer_idx", "attention layers"), ("d_intermediate", "MLP layers")):
            if config.get(name):
                raise CheckpointError(f"{name} = {str(config[name])[:40]}: a hybrid with {what} is not supported")
        if not config.get("rms_norm", True):
            raise CheckpointError("rms_norm = False: a model with LayerNorm is not supported")
        return f"config.json has {'dim, n_layers, n_groups' if mistral else f'd_model, n_layer and ssm_cfg of {found}'}"

    return claims


_FIELDS = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
_OPTIONS = {
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_word_embeddings", True),
}
_SSM1 = {
    "d_state": ("state_size", 16), "d_conv": ("conv_kernel", 4), "expand": ("expand", 2), "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}  # fmt: skip
_SSM2 = {
    **_SSM1,
    "d_state": ("state_size", 128), "headdim": ("head_dim", 64), "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256), "d_ssm": ("d_ssm", None), "D_has_hdim": ("D_has_hdim", False),
}  # fmt: skip
_FIXED = {"rmsnorm": True, "norm_before_gate": False}
_INITIAL = {
    "layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "A_init_range", "dt_limit",
    "dt_rank", "use_mem_eff_path", "conv_init",
}  # fmt: skip


def _read_mamba_ssm(config: Config, layer: str) -> dict[str, Any]:
    """Hugging Face's fields of a config.json of state-spaces, which is kept whole under "mamba_ssm".

    Raises:
        CheckpointError: missing entries, or settings of the layer that are not supported.
    """
    cfg = config.get("ssm_cfg") or {}
    table = _SSM1 if layer == "Mamba1" else _SSM2
    if missing := [name for name in _FIELDS if name not in config]:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    fixed = _FIXED if layer == "Mamba2" else {}
    for name, value in cfg.items():
        if name not in table and name not in _INITIAL and (name not in fixed or value != fixed[name]):
            raise CheckpointError(f"ssm_cfg has {name[:40]} = {str(value)[:40]}, which is not supported")
    result: dict[str, Any] = {ours: config[name] for name, ours in _FIELDS.items()}
    result |= {ours: config.get(name, default) for name, (ours, default) in _OPTIONS.items()}
    result |= {ours: cfg.get(name, default) for name, (ours, default) in table.items()}
    result["pad_vocab_size_multiple"] = config.get("pad_vocab_size_multiple", 8)
    if layer == "Mamba1":
        rank = cfg.get("dt_rank", "auto")
        result["time_step_rank"] = math.ceil(config["d_model"] / 16) if rank == "auto" else rank
    else:
        if "dt_limit" in cfg:
            result["time_step_limit"] = list(cfg["dt_limit"])
        if result["d_ssm"] is None:
            del result["d_ssm"]
    return {**result, _SOURCE: dict(config)}


def _write_mamba_ssm(layer: str) -> Callable[[Any], dict[str, Any]]:
    table, multiple = (_SSM1, 8) if layer == "Mamba1" else (_SSM2, 16)

    def config(model: Any) -> dict[str, Any]:
        ours = model.config.to_dict()
        source = ours.get(_SOURCE, {})
        fits = model.config.padded_vocab_size == -(-ours["vocab_size"] // multiple) * multiple
        ssm: dict[str, Any] = {} if layer == "Mamba1" else {"layer": "Mamba2"}
        ssm |= {name: ours[field] for name, (field, default) in table.items() if ours.get(field, default) != default}
        if layer == "Mamba1" and ours["time_step_rank"] != math.ceil(ours["hidden_size"] / 16):
            ssm["dt_rank"] = ours["time_step_rank"]
        if layer == "Mamba2" and tuple(model.config.time_step_limit) != (0.0, math.inf):
            ssm["dt_limit"] = list(ours["time_step_limit"])
        return {
            **{name: ours[field] for name, field in _FIELDS.items()},
            "d_intermediate": 0,
            "ssm_cfg": ssm,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": multiple if fits else ours["pad_vocab_size_multiple"],
            **{name: ours[field] for name, (field, _) in _OPTIONS.items()},
            **source,
            "tie_embeddings": ours["tie_word_embeddings"],
        }

    return config


def _unwritable(model: Any) -> str | None:
    eps = model.config.layer_norm_epsilon
    return None if eps == 1e-5 else f"layer_norm_epsilon = {eps}, and state-spaces has 1e-5 always"


def write_hf(architecture: str) -> Callable[[Any], dict[str, Any]]:
    """config.json of a model, for transformers' class of that name."""

    def config(model: Any) -> dict[str, Any]:
        ours = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_HF}
        dtype = str(next(state.entries(model)).variable.get_value().dtype)
        key = "torch_dtype" if "torch_dtype" in ours else "dtype"
        return {"architectures": [architecture], **ours, "vocab_size": model.config.padded_vocab_size, key: dtype}

    return config


def _unlike_hf(model: Any) -> str | None:
    config = model.config
    if getattr(config, "D_has_hdim", False):
        return "D_has_hdim = True, and transformers has one D a head"
    if getattr(config, "d_ssm", None) not in (None, int(config.expand * config.hidden_size)):
        return f"d_ssm = {config.d_ssm}, and transformers has no channels beside the recurrence"
    return None


def _hf(
    name: str,
    module: str,
    cls: str,
    config: str,
    mixer: Mapping[str, Shapes],
    optional: Mapping[str, Shapes],
    bare: Bare,
    renames: tuple[Rename, ...] = (_EMBEDDING,),
) -> Format:
    architecture = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[name] + "ForCausalLM"
    return Format(
        name=f"hf.{name}",
        target=f"{module}:{cls}",
        shapes=_names("embeddings", mixer),
        optional=_optional(optional),
        arguments=_from_hf(f"{module}:{config}", bare),
        renames=renames,
        claims=claims_hf(name),
        ties=(("lm_head.weight", "backbone.embeddings.weight"),),
        config=write_hf(architecture),
        unwritable=_unlike_hf,
        prefix="backbone.",
    )


def _mamba_ssm(
    name: str,
    layer: str,
    module: str,
    cls: str,
    config: str,
    mixer: Mapping[str, Shapes],
    optional: Mapping[str, Shapes],
    bare: Bare,
) -> Format:
    return Format(
        name=f"mamba_ssm.{name}",
        target=f"{module}:{cls}",
        shapes=_names("embedding", mixer),
        optional=_optional(optional),
        arguments=_from_mamba_ssm(f"{module}:{config}", layer, bare),
        claims=_claims_mamba_ssm(layer),
        ties=(("lm_head.weight", "backbone.embedding.weight"),),
        config=_write_mamba_ssm(layer),
        unwritable=_unwritable,
        filename="pytorch_model.bin",
    )


MODELS = (
    _hf("mamba", _MAMBA1, "MambaLMHeadModel", "MambaConfig", MAMBA_SHAPES, MAMBA_BIASES, _BARE1),
    _hf("mamba2", _MAMBA2, "Mamba2LMHeadModel", "Mamba2Config", _MIXER2, _OPTIONAL2, _BARE2),
    _hf("falcon_mamba", _MAMBA1, "FalconMamba", "FalconMambaConfig", MAMBA_SHAPES, MAMBA_BIASES, _BARE_FALCON, ()),
    _mamba_ssm("mamba", "Mamba1", _MAMBA1, "MambaLMHeadModel", "MambaConfig", MAMBA_SHAPES, MAMBA_BIASES, _BARE1),
    _mamba_ssm("mamba2", "Mamba2", _MAMBA2, "Mamba2LMHeadModel", "Mamba2Config", _MIXER2, _OPTIONAL2, _BARE2),
)
