"""The whole models of lrnnx: language model and classifier, whose layers are told by their own tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError
from ..state_dict import shorten
from . import s4_parts
from .format import Config, Format, Reading
from .inference import agree, count, tied
from .lrnnx_layers import LAYERS

_BY_NAME = {layer.name: layer for layer in LAYERS}
_NOT_ARGUMENTS = ("architectures", "model_type", "torch_dtype", "transformers_version")
_NO_DEFAULT = (("attn", "num_heads"), ("S5", "discretization"))
_MIXERS = {
    "S5": ("lrnnx.lti.S5",),
    "LRU": ("lrnnx.lti.LRU",),
    "S4": ("lrnnx.lti.S4",),
    "S4D": ("lrnnx.lti.S4D",),
    "Centaurus": tuple(f"lrnnx.lti.Centaurus{mode}" for mode in ("Neck", "PWNeck", "DWS", "Full")),
    "Mamba": ("lrnnx.ltv.Mamba",),
    "RGLRU": ("lrnnx.ltv.RGLRU",),
    "S7": ("lrnnx.ltv.S7",),
}
_ATTENTION = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias", "conv1d.weight", "conv1d.bias"}


def _layer(
    reading: Reading, where: str, d_model: int, among: Iterable[str] = _BY_NAME
) -> tuple[Format, dict[str, Any]]:
    """The format of the layer below `where`, and its arguments.

    Raises:
        CheckpointError: no layer has these tensors.
    """
    inner = reading.below(where)
    fitting = []
    for name in among:
        fit = (layer := _BY_NAME[name]).fit(inner.tensors)
        found = replace(inner, sizes=fit.sizes)
        if fit.exact and layer.refuses(found) is None:
            arguments = layer.arguments(found)
            if arguments["d_model"] == d_model:
                fitting.append((layer, arguments))
    if not fitting:
        found = shorten(f"{name} {value.shape}" for name, value in inner.tensors.items()) or "nothing"
        raise CheckpointError(f"{where} is no layer of lrnnx of width {d_model}; it has: {found}")
    return fitting[0]


def _language_model(reading: Reading) -> dict[str, Any]:
    """What config.json says, filled up from names and shapes: lrnnx's own has no `mixer_kwargs`."""
    names, sizes = reading.tensors, reading.sizes
    config = {key: value for key, value in (reading.config or {}).items() if key not in _NOT_ARGUMENTS}
    stated = {**config, **reading.given}
    mixers, kwargs, d_state = _mixers(reading, stated, infer="mixer_kwargs" not in config or bool(reading.given))
    _ask(reading, mixers, kwargs, stated="mixer_kwargs" in stated)
    fc1 = names.get("backbone.layers.0.mlp.fc1.weight")
    found = {"d_model": sizes["H"], "n_layer": len(mixers), "mixer_types": mixers}
    if d_state is not None:
        found["d_state"] = d_state
    agree(config, found)
    result = {
        "d_state": 1,
        **found,
        "vocab_size": sizes["V"],
        "d_intermediate": 0 if fc1 is None else fc1.shape[0] // 2,
        "rms_norm": "backbone.norm_f.bias" not in names,
        "tie_embeddings": True,
        **config,
        "mixer_kwargs": {mixer: arguments for mixer, arguments in kwargs.items() if arguments},
    }
    if not isinstance(result["tie_embeddings"], bool):
        raise CheckpointError(f"tie_embeddings must be true or false, got {str(result['tie_embeddings'])[:60]}")
    if not tied(reading, "lm_head.weight", "backbone.embedding.weight"):
        result["tie_embeddings"] = False
    return result


def _mixers(reading: Reading, stated: Config, infer: bool) -> tuple[list[str], dict[str, dict[str, Any]], int | None]:
    """(name of each mixer, their arguments, d_state of those that have it).

    Args:
        stated: what config.json and the caller say.
        infer: complete the stated arguments of the mixers by those that shapes give.
    """
    expected = list(stated.get("mixer_types") or [])
    kwargs = {mixer: dict(arguments) for mixer, arguments in (stated.get("mixer_kwargs") or {}).items()}
    mixers: list[str] = []
    d_state = None
    for i in range(count(reading.tensors, "backbone.layers.{i}.norm.weight")):
        where = f"backbone.layers.{i}.mixer"
        inner = reading.below(where).tensors
        if set(inner) <= _ATTENTION and "in_proj.weight" in inner:
            mixers.append("attn")
            continue
        name = str(expected[i]) if i < len(expected) else ""
        given = {"reference": stated.get("reference", "lrnnx"), **kwargs.get(name, {})}
        among = _MIXERS.get(name) or [name for names in _MIXERS.values() for name in names]
        layer, arguments = _layer(replace(reading, given=given), where, reading.sizes["H"], among)
        mixer = next(mixer for mixer, names in _MIXERS.items() if layer.name in names)
        mixers.append(mixer)
        d_state = arguments.get("d_state", d_state)
        if infer:
            own = {key: value for key, value in arguments.items() if key not in ("d_model", "d_state")}
            own |= {"mode": layer.hint} if mixer == "Centaurus" else {}
            kwargs[mixer] = {**own, **kwargs.get(mixer, {})}
    return mixers, kwargs, d_state


def _ask(reading: Reading, mixers: list[str], kwargs: dict[str, dict[str, Any]], stated: bool) -> None:
    """Ask for the arguments of mixers that nothing gives.

    Once someone has stated `mixer_kwargs`, what is not in them has the reference's default, if there is one.
    """
    for mixer in dict.fromkeys(mixers):
        asks = {"num_heads": ("the number of heads",)} if mixer == "attn" else _BY_NAME[_MIXERS[mixer][0]].asks
        for name, values in asks.items():
            if name not in kwargs.get(mixer, {}) and not (stated and (mixer, name) not in _NO_DEFAULT):
                reading.asked[f"mixer_kwargs={{{mixer!r}: {{{name!r}: ...}}}}"] = values


def _claims_language_model(config: Config) -> str | None:
    return "config.json has mixer_types" if "mixer_types" in config else None


def _classifier(reading: Reading) -> dict[str, Any]:
    names, sizes = reading.tensors, reading.sizes
    n_layers = 1 + count(names, "blocks.{i}.norm.weight")
    given = reading.given.get("lrnn_params") or {}
    per_block = given if isinstance(given, list | tuple) else [given] * n_layers
    reference = reading.given.get("reference", "lrnnx")
    layers, params = [], []
    for i in range(n_layers):
        where = f"blocks.{i}.lrnn" if i < n_layers - 1 else "final_block.lrnn"
        own = per_block[i] if i < len(per_block) else {}
        layer, arguments = _layer(replace(reading, given={"reference": reference, **own}), where, sizes["H"])
        for name in layer.asks.keys() - own.keys():
            reading.asked[f"lrnn_params=[...] with {{{name!r}: ...}} for {where}"] = layer.asks[name]
        layers.append(layer.name.removeprefix("lrnnx."))
        params.append({**{key: value for key, value in arguments.items() if key != "d_model"}, **own})
    found: dict[str, Any] = {
        "input_dim": sizes.get("D", sizes.get("E", sizes["H"])),
        "num_classes": sizes["O"],
        "d_model": sizes["H"],
        "n_layers": n_layers,
        "lrnn_cls": layers,
        "lrnn_params": params,
    }
    if "V" in sizes:
        found |= {"vocab_size": sizes["V"], "embedding_dim": sizes["E"]}
    return found


_NORMS = {"norm.weight": ("H",)}
_NORM_BIASES = {"norm.bias": ("H",)}

MODELS = (
    Format(
        name="lrnnx.lm",
        target="compat_torch.architectures.language_model:LRNNLMHeadModel",
        shapes={
            "backbone.embedding.weight": ("V", "H"),
            "backbone.layers.{i}.norm.weight": ("H",),
            "backbone.layers.{i}.mixer.{rest}": None,
            "backbone.norm_f.weight": ("H",),
            "lm_head.weight": ("V", "H"),
        },
        optional={
            "backbone.layers.{i}.norm.bias": ("H",),
            "backbone.layers.{i}.norm2.weight": ("H",),
            "backbone.layers.{i}.norm2.bias": ("H",),
            "backbone.layers.{i}.mlp.{rest}": None,
            "backbone.norm_f.bias": ("H",),
        },
        arguments=_language_model,
        renames=s4_parts.COUNTER,
        merges=("mixer_kwargs",),
        overridable=True,
        claims=_claims_language_model,
        ties=(("lm_head.weight", "backbone.embedding.weight"),),
        config=lambda model: model.config,
        filename="pytorch_model.bin",
    ),
    Format(
        name="lrnnx.classifier",
        target="compat_torch.architectures.classifier:Classifier",
        shapes={
            "final_block.lrnn.{rest}": None,
            **{f"final_block.{name}": shape for name, shape in (_NORMS | _NORM_BIASES).items()},
            "final_block.output_proj.weight": ("O", "H"),
            "final_block.output_proj.bias": ("O",),
        },
        optional={
            "blocks.{i}.lrnn.{rest}": None,
            **{f"blocks.{{i}}.{name}": shape for name, shape in (_NORMS | _NORM_BIASES).items()},
            "input_proj.weight": ("H", "D"),
            "input_proj.bias": ("H",),
            "embedding.token_embedding.weight": ("V", "E"),
            "embed_proj.weight": ("H", "E"),
            "embed_proj.bias": ("H",),
        },
        arguments=_classifier,
        merges=("lrnn_params",),
        renames=s4_parts.COUNTER,
        asks={"pooling": ("last", "mean", "max"), "intermediate_pooling": ("none", "stride", "mean", "max")},
        assumes=("pooling_factor", "dropout", "padding_idx"),
    ),
)
