"""RecurrentGemma as Hugging Face writes it; our class has the same names."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import CheckpointError
from .format import Format, Reading, Shapes
from .inference import agree, count, tied
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


def _arguments(reading: Reading) -> dict[str, Any]:
    config = reading.config
    if config is None:
        raise CheckpointError("the attention's window is not in the tensors: put config.json into the file's folder")
    layers = count(reading.tensors, f"{_LAYER}.temporal_pre_norm.weight")
    agree(config, {"hidden_size": reading.sizes["H"], "num_hidden_layers": layers})
    if not tied(reading, "lm_head.weight", "model.embed_tokens.weight"):
        config = {**config, "tie_word_embeddings": False}
    cls = importlib.import_module(_MODULE).RecurrentGemmaConfig
    return {"config": cls.from_dict(config)}


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
