"""Our answers to the classes of lrnnx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from compat_torch.architectures.classifier import Classifier
from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.architectures.lru_unet import LRUUnet
from compat_torch.models import lti, ltv
from spyx.ssm import LRU

from .base import Params, Subject, build, compat, scan_steps


def _classifier() -> Subject:
    """The classifier, whose lrnn_cls a case has as ["module:Class", arguments] or a list of these."""
    plain = compat(Classifier)

    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        layers = kwargs["lrnn_cls"]
        if isinstance(layers[0], str):
            layers = [layers] * kwargs["n_layers"]
        names, arguments = zip(*layers, strict=True)
        return plain.forward({**kwargs, "lrnn_cls": names, "lrnn_params": arguments}, params, x, **inputs)

    return Subject(plain.name, forward, plain.steps)


def _language_model() -> Subject:
    """The language model; a case may have, as "prompt" beside the arguments, how many tokens go before the steps."""

    def make(kwargs: dict[str, Any], params: Params) -> tuple[Any, int]:
        arguments = {name: value for name, value in kwargs.items() if name != "prompt"}
        return build(LRNNLMHeadModel, arguments, params), kwargs.get("prompt", 0)

    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        return make(kwargs, params)[0](x, **inputs).logits

    def steps(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        model, prompt = make(kwargs, params)
        arrays = {"input_ids": x, **inputs}
        first = {name: value[:, :prompt] for name, value in arrays.items()}
        rest = {name: jnp.swapaxes(value[:, prompt:], 0, 1)[..., None] for name, value in arrays.items()}

        def step(cache, now):
            out, cache = model.step(caches=cache, **now)
            return cache, out.logits[:, 0]

        out, cache = model.prefill(cache=model.allocate_inference_cache(*x.shape), **first)
        logits = jax.lax.scan(step, cache, rest)[1]
        return jnp.concatenate([out.logits, jnp.swapaxes(logits, 0, 1)], 1)

    return Subject("compat_torch.LRNNLMHeadModel", forward, steps)


def spyx_lru(params: Params, **kwargs: Any) -> LRU:
    """`spyx.ssm.LRU` from lrnnx LRU parameters: nu = nu_log, theta = exp(theta_log), B = exp(gamma_log) B."""
    d_state, d_model = params["B_re"].shape
    layer = nnx.eval_shape(lambda: LRU(d_model, d_state, precision="highest", rngs=nnx.Rngs(0), **kwargs))
    gamma = jnp.exp(params["gamma_log"])[:, None]
    values = {
        "nu": params["nu_log"],
        "theta": jnp.exp(params["theta_log"]),
        "B_re": gamma * params["B_re"],
        "B_im": gamma * params["B_im"],
        **{name: params[name] for name in ("C_re", "C_im", "D")},
    }
    for name, value in values.items():
        getattr(layer, name).set_value(value)
    return layer


def _spyx_lru_forward(kwargs, params: Params, x: Float[Array, "B L H"]) -> Float[Array, "B L H"]:
    return jnp.swapaxes(spyx_lru(params)(jnp.swapaxes(x, 0, 1)), 0, 1)


def _spyx_lru_steps(kwargs, params: Params, x: Float[Array, "B L H"]) -> Float[Array, "B L H"]:
    layer = spyx_lru(params)
    return scan_steps(layer.step, layer.initial_state(x.shape[0]), x)


SUBJECTS: dict[str, list[Subject]] = {
    "lrnnx.architectures.classifier:Classifier": [_classifier()],
    "lrnnx.architectures.language_model:LRNNLMHeadModel": [_language_model()],
    "lrnnx.architectures.lru_unet:LRUUnet": [compat(LRUUnet)],
    **{
        f"lrnnx.models.lti.centaurus:{cls.__name__}": [compat(cls)]
        for cls in (lti.CentaurusNeck, lti.CentaurusPWNeck, lti.CentaurusDWS, lti.CentaurusFull)
    },
    "lrnnx.models.lti.s4:S4": [compat(lti.S4)],
    "lrnnx.models.lti.s4d:S4D": [compat(lti.S4D)],
    "lrnnx.models.lti.s5:S5": [compat(lti.S5)],
    "lrnnx.models.ltv.mamba:Mamba": [compat(ltv.Mamba)],
    "lrnnx.models.ltv.rglru:RGLRU": [compat(ltv.RGLRU)],
    "lrnnx.models.ltv.s5:S5": [compat(ltv.S5)],
    "lrnnx.models.ltv.s7:S7": [compat(ltv.S7)],
    "lrnnx.models.lti.lru:LRU": [compat(lti.LRU), Subject("spyx.LRU", _spyx_lru_forward, _spyx_lru_steps)],
}
