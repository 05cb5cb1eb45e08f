"""RecurrentGemma as Hugging Face writes it; our class has the same names."""

from __future__ import annotations

import importlib
from typing import Any

from .format import Format, Reading, Shapes
from .inference import agree, completed, count, tied, untied
from .mamba import claims_hf, write_hf

_MODULE = "compat_torch.architectures.recurrent_gemma"
_LAYER = "model.layers.{i}"
_MLP: dict[str, Shapes] = {
    "gate_proj.weight": ("F", "H"),
    "gate_proj.bias": ("F",),
    "up_proj.weight": ("F", "H"),
    "up_proj.bias": ("F",),
    "down_proj.weight": ("H", "F"),
    "down_proj.bias": ("H",),
}


_ASSUMED = ("logits_soft_cap", "rms_norm_eps", "hidden_activation", "rope_theta", "partial_rotary_factor")
_WINDOW = {"attention_window_size": ("how many steps attention sees",)}
_HEADS = {"num_attention_heads": ("the number of heads",)}


def _arguments(reading: Reading) -> dict[str, Any]:
    config = reading.config
    cls = importlib.import_module(_MODULE).RecurrentGemmaConfig
    same = tied(reading, "lm_head.weight", "model.embed_tokens.weight")
    if config is None:
        return _inferred(reading, cls, same)
    agree(config, {"hidden_size": reading.sizes["H"], "num_hidden_layers": _depth(reading)})
    return {"config": untied(cls.from_dict(config), same)}


def _depth(reading: Reading) -> int:
    return count(reading.tensors, f"{_LAYER}.temporal_pre_norm.weight")


def _inferred(reading: Reading, cls: Any, same: bool) -> dict[str, Any]:
    """{"config": ...} from names and shapes, and from what the caller gives of the rest."""
    sizes, depth = reading.sizes, _depth(reading)
    blocks = [reading.below(f"model.layers.{i}.temporal_block").tensors for i in range(depth)]
    recurrent = next((block for block in blocks if "rg_lru.recurrent_param" in block), None)
    attention = next((block for block in blocks if "q_proj.weight" in block), None)
    found = {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["H"],
        "num_hidden_layers": depth,
        "intermediate_size": 2 * sizes["F"],
        "block_types": ["recurrent" if "rg_lru.recurrent_param" in block else "attention" for block in blocks],
        "tie_word_embeddings": same,
    }
    if recurrent is not None:
        found["num_attention_heads"] = recurrent["rg_lru.input_gate_weight"].shape[0]
        found["lru_width"] = recurrent["linear_x.weight"].shape[0]
        found["conv1d_width"] = recurrent["conv_1d.weight"].shape[2]
    heads = found.get("num_attention_heads", reading.given.get("num_attention_heads"))
    if attention is not None:
        found["attention_bias"] = "q_proj.bias" in attention
        if heads is not None:
            found["num_key_value_heads"] = attention["k_proj.weight"].shape[0] * heads // sizes["H"]
    asks = {**({} if recurrent else _HEADS), **(_WINDOW if attention else {})}
    stated = completed(reading, cls, found, asks, _ASSUMED)
    return {} if reading.asked else {"config": cls.from_dict(stated)}


MODELS = (
    Format(
        name="hf.recurrent_gemma",
        target=f"{_MODULE}:RecurrentGemma",
        shapes={
            "model.embed_tokens.weight": ("V", "H"),
            f"{_LAYER}.temporal_pre_norm.weight": ("H",),
            f"{_LAYER}.channel_pre_norm.weight": ("H",),
            f"{_LAYER}.temporal_block.{{rest}}": None,
            **{f"{_LAYER}.mlp_block.{name}": shape for name, shape in _MLP.items()},
            "model.final_norm.weight": ("H",),
            "lm_head.weight": ("V", "H"),
        },
        arguments=_arguments,
        claims=claims_hf("recurrent_gemma"),
        ties=(("lm_head.weight", "model.embed_tokens.weight"),),
        config=write_hf("RecurrentGemmaForCausalLM"),
        prefix="model.",
    ),
)
