"""`from_torch`: a live torch module in, the JAX module that computes the same out."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flax import nnx

from .. import interop
from ..checkpoint.detection import Content, choose, describe
from ..checkpoint.formats import TABLE, Fit, Format
from ._attributes import read_arguments, take_hints
from .module import JaxModule

# Pattern of the class path -> name of the checkpoint format; None: config and names tell which one.
KNOWN: dict[str, str | None] = {
    "lrnnx.models.lti.s5:S5": "lrnnx.lti.S5",
    "lrnnx.models.lti.lru:LRU": "lrnnx.lti.LRU",
    "lrnnx.models.lti.s4:S4": "lrnnx.lti.S4",
    "lrnnx.models.lti.s4d:S4D": "lrnnx.lti.S4D",
    **{
        f"lrnnx.models.lti.centaurus:Centaurus{m}": f"lrnnx.lti.Centaurus{m}" for m in ("Neck", "PWNeck", "DWS", "Full")
    },
    "lrnnx.models.ltv.mamba:Mamba": "lrnnx.ltv.Mamba",
    "lrnnx.models.ltv.s5:S5": "lrnnx.ltv.S5",
    "lrnnx.models.ltv.rglru:RGLRU": "lrnnx.ltv.RGLRU",
    "lrnnx.models.ltv.s7:S7": "lrnnx.ltv.S7",
    "lrnnx.architectures.language_model:LRNNLMHeadModel": "lrnnx.lm",
    "lrnnx.architectures.classifier:Classifier": "lrnnx.classifier",
    "mamba_ssm.modules.mamba_simple:Mamba": "mamba_ssm.Mamba",
    "mamba_ssm.models.mixer_seq_simple:MambaLMHeadModel": None,
    "transformers.models.mamba.modeling_mamba:MambaForCausalLM": "hf.mamba",
    "transformers.models.mamba2.modeling_mamba2:Mamba2ForCausalLM": "hf.mamba2",
    "transformers.models.falcon_mamba.modeling_falcon_mamba:FalconMambaForCausalLM": "hf.falcon_mamba",
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma:RecurrentGemmaForCausalLM": "hf.recurrent_gemma",
    "*s4:S4Block": "s4.S4Block",
    "*s4block:S4Block": "s4.S4Block",
    "*s4d:S4D": "s4.S4D",
    "s5.s5_model:S5": "s5_pytorch.S5",
    "s5.s5_model:S5Block": "s5_pytorch.S5Block",
}


def from_torch(module: torch.nn.Module, *, dtype: Any = None, **kwargs: Any) -> Any:
    """The JAX module of a torch module, with copies of its weights, in the same mode.

    Args:
        module: one of `compat_torch.nn` or made by `wrap`; or a layer or model of lrnnx, mamba_ssm, transformers,
            state-spaces/s4 or s5-pytorch, recognised by the path of its class (see `KNOWN`) and the names and shapes of
            its parameters. Constructor arguments are read off its attributes and its configuration.
        dtype: of the floating point parameters; None keeps them. Not for a module of `compat_torch.nn`.
        **kwargs: constructor arguments of the JAX class, which replace what was read off (`reference`, `precision`, and
            what a module does not keep as an attribute).

    Returns:
        An NNX module.

    Raises:
        TypeError: the class is not known: the message lists those that are; or `kwargs` for a module of
            `compat_torch.nn`.
        ValueError: an argument is not to be found in the module: it is named.
        CheckpointError: the parameters are not those of the class.
    """
    if isinstance(module, JaxModule):
        if kwargs or dtype is not None:
            raise TypeError(f"from_torch: a {type(module).__name__} of compat_torch.nn takes no further arguments")
        return module.to_jax()
    content, entry, fit, evidence = _recognised(module)
    tensors, path = content.tensors, content.path
    given = {**_arguments(module, entry, kwargs), **kwargs}
    detection = describe(content, entry, fit, evidence, given)
    if detection.asks:
        raise ValueError(f"from_torch: {path} does not tell {', '.join(detection.asks)}: pass it to from_torch")
    cls = entry.load_class()
    result: Any = nnx.eval_shape(lambda: cls(**detection.arguments))
    result.load_state_dict(entry.read(entry.canonical(tensors)), dtype=dtype)
    take_hints(result, module)
    result.train() if module.training else result.eval()
    return result


def format_of(module: torch.nn.Module) -> Format | None:
    """The format of the state_dict of a module that `from_torch` takes; None if its names are those of our classes.

    Raises:
        TypeError: the class is not known. CheckpointError: the parameters are not those of the class.
    """
    return None if isinstance(module, JaxModule) else _recognised(module)[1]


def _recognised(module: torch.nn.Module) -> tuple[Content, Format, Fit, tuple[str, ...]]:
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    known = next((pattern for pattern in KNOWN if fnmatch.fnmatchcase(path, pattern)), None)
    if known is None:
        raise TypeError(
            f"from_torch does not know {path}; it knows the modules of compat_torch.nn and "
            + ", ".join(KNOWN)
            + ". compat_torch.load reads a checkpoint by its names and shapes"
        )
    tensors = {name: interop.to_numpy(tensor) for name, tensor in module.state_dict().items()}
    content = Content(path, tensors, _configuration(module), {}, (), ())
    return content, *choose(content, KNOWN[known])


def _configuration(module: Any) -> dict[str, Any] | None:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return dict(vars(config)) if dataclasses.is_dataclass(config) else None


def _arguments(module: Any, entry: Format, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors of a layer or model do not say, off its attributes.

    Raises:
        ValueError: it is not there.
    """
    return _MODELS[entry.name](module) if entry.name in _MODELS else read_arguments(module, entry, given)


def _layer(module: Any) -> dict[str, Any]:
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    name = KNOWN.get(path)
    return {} if name is None else _arguments(module, TABLE[name], {})


def _language_model(module: Any) -> dict[str, Any]:
    """The arguments of the model and, as the first block of each kind has them, of its mixers."""
    names = ("d_state", "vocab_size", "norm_epsilon", "residual_in_fp32", "pad_vocab_size_multiple")
    kwargs: dict[str, dict[str, Any]] = {}
    for kind, block in zip(module.mixer_types, module.backbone.layers, strict=True):
        names_of_attention = ("num_heads", "num_heads_kv", "head_dim", "mlp_dim", "causal", "rotary_emb_dim")
        own = _layer(block.mixer)
        if kind == "attn":
            own = {name: getattr(block.mixer, name) for name in names_of_attention if hasattr(block.mixer, name)}
        if own != kwargs.setdefault(kind, own):
            raise ValueError(f"from_torch: the {kind} layers have different arguments, {kwargs[kind]} and {own}")
    return {
        **{name: getattr(module, name) for name in names},
        "mixer_types": list(module.mixer_types),
        "mixer_kwargs": kwargs,
    }


def _classifier(module: Any) -> dict[str, Any]:
    blocks = [*module.blocks, module.final_block]
    values = {
        "pooling": module.pooling,
        "intermediate_pooling": [block.intermediate_pooling for block in blocks],
        "pooling_factor": [block.pooling_factor for block in blocks],
        "dropout": module.final_block.dropout.p,
        "lrnn_params": [_layer(block.lrnn) for block in blocks],
    }
    if getattr(module, "has_embedding", False):
        values["padding_idx"] = module.embedding.token_embedding.padding_idx
    return values


_MODELS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lrnnx.lm": _language_model,
    "lrnnx.classifier": _classifier,
    **{name: lambda module: {} for name in TABLE if name.startswith(("hf.", "mamba_ssm.mamba"))},
}
