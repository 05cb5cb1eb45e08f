"""Whole models made on the spot by an installed lrnnx, with fresh random weights and inputs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .case import Case, Run, amended
from .live_run import import_class, record

LANGUAGE_MODEL = "lrnnx.architectures.language_model:LRNNLMHeadModel"
CLASSIFIER = "lrnnx.architectures.classifier:Classifier"
UNET = "lrnnx.architectures.lru_unet:LRUUnet"

_VARYING = {
    "Mamba": "lrnnx.models.ltv.mamba:Mamba",
    "RGLRU": "lrnnx.models.ltv.rglru:RGLRU",
    "S7": "lrnnx.models.ltv.s7:S7",
}
_LRU = ["lrnnx.models.lti.lru:LRU", {"d_model": 6, "d_state": 5}]
_S5 = ["lrnnx.models.lti.s5:S5", {"d_model": 6, "d_state": 5, "discretization": "zoh"}]
_MAMBA = [_VARYING["Mamba"], {"d_model": 6, "d_state": 4}]
_EVENT_S5 = ["lrnnx.models.ltv.s5:S5", {"d_model": 6, "d_state": 4, "discretization": "dirac"}]


@dataclass(frozen=True)
class Model:
    """What to build and feed.

    Attributes:
        cls: the reference class, "package.module:Class".
        label: part of the name.
        kwargs: its constructor arguments, as a case has them.
        batch, length: of the input.
        event: with random integration_timesteps.
        lengths: valid steps of each row; empty is all.
        prompt: tokens that our language model takes as a prompt before its steps; the reference has steps only.
    """

    cls: str
    label: str
    kwargs: dict[str, Any]
    batch: int
    length: int
    event: bool = False
    lengths: tuple[int, ...] = ()
    prompt: int = 0

    @property
    def name(self) -> str:
        """For the report."""
        sizes = f"{self.batch}x{self.length}"
        return "_".join(filter(None, (self.cls.split(":")[1].lower(), self.label, "event" * self.event, sizes)))


def models() -> list[Model]:
    """Every live case of a whole model."""
    return [*_language_models(), *_classifiers(), *_unets()]


def _language_models() -> list[Model]:
    s4 = {"transposed": False, "verbose": False}
    s5, slow = {"discretization": "zoh"}, {"use_fast_path": False}
    attention = {"num_heads": 4, "num_heads_kv": 2, "causal": True, "d_conv": 3}

    def make(label: str, mixers: str, batch: int, length: int, options: dict[str, Any], **kwargs: Any) -> Model:
        types = mixers.split()
        about = {
            "d_model": 8, "d_state": 4, "n_layer": len(types), "vocab_size": 13, "mixer_types": types,
            "fused_add_norm": False, **kwargs,
        }  # fmt: skip
        given = {name: value for name, value in options.items() if name in ("event", "lengths", "prompt")}
        mixer_kwargs = {name: value for name, value in options.items() if name in types}
        if mixer_kwargs:
            about["mixer_kwargs"] = mixer_kwargs
        return Model(LANGUAGE_MODEL, label, about, batch, length, **given)

    return [
        make("lti", "LRU S5 Centaurus", 2, 17, {"S5": s5, "Centaurus": {"sub_state_dim": 3}, "lengths": (17, 6)}),
        make(
            "s4_untied", "S4 S4D", 2, 11, {"S4": {**s4, "l_max": 16}, "S4D": s4, "prompt": 5, "lengths": (3, 11)},
            tie_embeddings=False, rms_norm=False,
        ),
        make("ltv_mlp", "Mamba RGLRU S7", 3, 13, {"S7": slow, "prompt": 6, "lengths": (13, 1, 7)}, d_intermediate=20),
        make(
            "events_untied", "Mamba LRU", 2, 12, {"event": True, "prompt": 1}, tie_embeddings=False,
            residual_in_fp32=True, pad_vocab_size_multiple=1,
        ),
        make("s7_events", "S7 Mamba S5", 1, 19, {"S7": slow, "S5": s5, "event": True}, norm_epsilon=1e-3),
        make("attention_causal", "LRU attn Mamba", 2, 9, {"attn": attention, "prompt": 4, "lengths": (9, 4)}),
        make("attention", "attn S5", 2, 10, {"attn": {"num_heads": 2, "head_dim": 3, "mlp_dim": 4}, "S5": s5}),
        make("one_token", "RGLRU S4D", 1, 1, {"S4D": s4}, rms_norm=False, d_intermediate=5),
    ]  # fmt: skip


def _classifiers() -> list[Model]:
    def make(label: str, layers: list[Any], batch: int, length: int, options: dict[str, Any], **kwargs: Any) -> Model:
        n_layers = 2 if isinstance(layers[0], str) else len(layers)
        about = {
            "input_dim": 3, "num_classes": 5, "d_model": 6, "d_state": 5, "n_layers": n_layers, "lrnn_cls": layers,
            **kwargs,
        }  # fmt: skip
        return Model(CLASSIFIER, label, about, batch, length, **options)

    gated = [
        [_VARYING["RGLRU"], {"d_model": 6}],
        [_VARYING["S7"], {"d_model": 6, "d_state": 3, "use_fast_path": False}],
    ]
    centaurus = ["lrnnx.models.lti.centaurus:CentaurusNeck", {"d_model": 6, "d_state": 5, "sub_state_dim": 2}]
    return [
        make("last", _LRU, 3, 17, {}, pooling="last"),
        make("last_lengths", [_S5, _LRU], 3, 17, {"lengths": (17, 1, 8)}, pooling="last"),
        make(
            "mean_of_means", [_LRU, _MAMBA, _S5], 3, 19, {"lengths": (19, 7, 12)}, pooling="mean",
            intermediate_pooling=["mean", "mean", "none"], pooling_factor=[3, 2, 2],
        ),
        make(
            "max_of_maxima", gated, 2, 14, {"lengths": (14, 13)}, pooling="max", intermediate_pooling="max",
            pooling_factor=[2, 3],
        ),
        make(
            "max_of_strides", [centaurus, _LRU], 2, 13, {"lengths": (5, 13)}, pooling="max",
            intermediate_pooling=["stride", "stride"], pooling_factor=3,
        ),
        make("mean_of_vectors", _MAMBA, 1, 1, {}, pooling="mean", num_classes=0, output_dim=2),
        make(
            "tokens", _LRU, 2, 11, {"lengths": (11, 4)}, pooling="mean", vocab_size=9, embedding_dim=4, padding_idx=2,
        ),
        make(
            "mamba", [_MAMBA, _EVENT_S5], 2, 12, {"event": True, "lengths": (12, 5)}, pooling="mean",
            intermediate_pooling=["mean", "none"],
        ),
        make("strides", [_EVENT_S5, _MAMBA], 3, 10, {"event": True}, intermediate_pooling="stride"),
    ]  # fmt: skip


def _unets() -> list[Model]:
    """With four channels or more: LayerNorm of two nearly equal channels magnifies rounding a hundredfold."""

    def make(label: str, batch: int, length: int, **kwargs: Any) -> Model:
        return Model(UNET, label, kwargs, batch, length)

    return [
        make("default_factors", 2, 24, in_channels=4, out_channels=4, channels=[8, 16]),
        make("ragged", 1, 19, in_channels=4, out_channels=3, channels=[8, 16], resample_factors=[2, 2]),
        make("not_causal", 2, 30, in_channels=5, out_channels=5, channels=[10], resample_factors=[5], causal=False),
    ]


def model_cases(seed: int) -> Iterator[Case]:
    """Run the installed reference on every whole model, in eval mode.

    Args:
        seed: of weights and inputs.

    Raises:
        ReferenceMissingError: lrnnx cannot be imported.
    """
    makers: dict[str, Callable[[Model], Case]] = {
        LANGUAGE_MODEL: _language_model, CLASSIFIER: _classifier, UNET: _unet
    }  # fmt: skip
    for index, about in enumerate(models()):
        import torch

        torch.manual_seed(seed + index)
        np.random.seed(seed + index)
        yield amended(makers[about.cls](about))


def _language_model(about: Model) -> Case:
    """Steps that skip the attention layers, as the reference's do, are replaced by its forward pass in float64."""
    import torch

    for cls in _VARYING.values():
        import_class(cls)
    model = _perturbed(import_class(about.cls)(**about.kwargs))
    ids = torch.randint(about.kwargs["vocab_size"], (about.batch, about.length))
    kwargs = {**about.kwargs, "prompt": about.prompt} if about.prompt else about.kwargs
    inputs, attends = _timesteps(about), "attn" in about.kwargs["mixer_types"]
    case = record(
        Case(about.name, about.cls, kwargs, {}, ()), model, ids, inputs,
        None if attends else functools.partial(_language_model_steps, ids=ids, timesteps=inputs),
    )  # fmt: skip
    (run,) = case.runs
    if attends and about.kwargs["mixer_kwargs"]["attn"].get("causal"):
        run = replace(run, step=run.y64.astype(np.float32))
        remark = "the reference's step skips its attention layer: steps compared with its float64 forward"
        case = replace(case, runs=(run,), remark=remark)
    return replace(case, runs=(run, *_valid_part(run, about.lengths)))


def _language_model_steps(model: Any, ids: Any, timesteps: dict[str, Any]) -> np.ndarray:
    import torch

    caches, logits = model.allocate_inference_cache(*ids.shape), []
    for t in range(ids.shape[1]):
        now = {name: value[:, t : t + 1] for name, value in timesteps.items()}
        logits.append(model.step(ids[:, t : t + 1], caches, **now).logits.clone())
    return torch.cat(logits, 1).numpy()


def _valid_part(run: Run, lengths: tuple[int, ...]) -> tuple[Run, ...]:
    """The run again, with lengths: what comes after them does not change what comes before, and is 0."""
    if not lengths:
        return ()
    valid = (np.arange(run.x.shape[1]) < np.asarray(lengths)[:, None])[..., None].astype(np.float32)
    inputs = {**run.inputs, "lengths": np.asarray(lengths)}
    return (Run(name=f"{run.name} lengths", x=run.x, y=run.y * valid, y64=run.y64 * valid, inputs=inputs),)


def classifier(cls: str, kwargs: dict[str, Any]) -> Any:
    """The reference's, where `kwargs` has lrnn_cls as ["module:Class", arguments] or a list of these."""
    layers = kwargs["lrnn_cls"]
    if isinstance(layers[0], str):
        made: Any = functools.partial(import_class(layers[0]), **layers[1])
    else:
        made = [functools.partial(import_class(name), **arguments) for name, arguments in layers]
    return import_class(cls)(**{**kwargs, "lrnn_cls": made})


def _classifier(about: Model) -> Case:
    import torch

    model = _perturbed(classifier(about.cls, about.kwargs))
    shape = (about.batch, about.length)
    tokens = about.kwargs.get("vocab_size")
    x = torch.randint(tokens, shape) if tokens else torch.randn(*shape, about.kwargs["input_dim"])
    inputs = _timesteps(about)
    if about.lengths:
        inputs["lengths"] = torch.tensor(about.lengths)
    return record(Case(about.name, about.cls, about.kwargs, {}, ()), model, x, inputs)


def _unet(about: Model) -> Case:
    """The reference cannot be constructed as it is: it gives LRU names of arguments that LRU does not have."""
    import torch

    unet, lru = import_class(about.cls), import_class("lrnnx.models.lti.lru:LRU")
    vars(importlib.import_module(unet.__module__))["LRU"] = lambda N, H: lru(d_model=H, d_state=N)
    model = _perturbed(unet(**about.kwargs))
    x = torch.randn(about.batch, about.kwargs.get("in_channels", 1), about.length)
    remark = "the reference raises, for it gives LRU names of arguments that it does not have: run with the right ones"
    return record(Case(about.name, about.cls, about.kwargs, {}, (), remark=remark), model, x, {}, time_axis=2)


def _perturbed(model: Any) -> Any:
    """In eval mode, with no parameter at a constant initial value."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
            if not parameter.any():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _timesteps(about: Model) -> dict[str, Any]:
    """Random integration_timesteps, 0 past the lengths: the reference adds those of the padding to the last window."""
    import torch

    if not about.event:
        return {}
    timesteps = 0.1 + 2 * torch.rand(about.batch, about.length)
    if about.lengths:
        timesteps *= torch.arange(about.length) < torch.tensor(about.lengths)[:, None]
    return {"integration_timesteps": timesteps}
