"""Which of our classes answers for a reference class, as pure functions of the reference's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from compat_torch import decode
from compat_torch.architectures.classifier import Classifier
from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.errors import ReferenceDefectWarning
from compat_torch.models import lti, ltv
from spyx.ssm import LRU

Params = Mapping[str, Array]


@dataclass(frozen=True)
class Subject:
    """One of our classes under test.

    Attributes:
        name: shown in the report.
        forward: `(kwargs, params, x, **inputs) -> y` in the reference's layout.
        steps: the same, one step at a time.
    """

    name: str
    forward: Callable[..., Array]
    steps: Callable[..., Array]


def subjects_of(cls: str) -> list[Subject]:
    """Our answers to a reference class "package.module:Class"; empty if there is none."""
    return SUBJECTS.get(cls, [])


def build(cls: type[nnx.Module], kwargs: dict[str, Any], params: Params) -> Any:
    """A module of ours with the reference's parameters, never initialised; differentiable in `params`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceDefectWarning)
        module: Any = nnx.eval_shape(lambda: cls(**kwargs))
    module.load_state_dict(params)
    module.eval()
    return module


def _compat(cls: type[nnx.Module]) -> Subject:
    def forward(kwargs: dict[str, Any], params: Params, x: Float[Array, "B L H"], **inputs: Array) -> Array:
        result = build(cls, kwargs, params)(x, **inputs)
        return result[0] if isinstance(result, tuple) else result

    def steps(kwargs: dict[str, Any], params: Params, x: Float[Array, "B L H"], **inputs: Array) -> Array:
        module = build(cls, kwargs, params)
        return decode(module, x, module.allocate_inference_cache(x.shape[0]), **inputs)[0]

    return Subject(f"{cls.__module__.split('.')[0]}.{cls.__name__}", forward, steps)


def _classifier() -> Subject:
    """The classifier, whose lrnn_cls a case has as ["module:Class", arguments] or a list of these."""
    plain = _compat(Classifier)

    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        layers = kwargs["lrnn_cls"]
        if isinstance(layers[0], str):
            layers = [layers] * kwargs["n_layers"]
        names, arguments = zip(*layers, strict=True)
        return plain.forward({**kwargs, "lrnn_cls": names, "lrnn_params": arguments}, params, x, **inputs)

    return Subject(plain.name, forward, plain.steps)


def _language_model() -> Subject:
    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        return build(LRNNLMHeadModel, kwargs, params)(x, **inputs).logits

    def steps(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        model = build(LRNNLMHeadModel, kwargs, params)

        def step(ids, cache):
            out, cache = model.step(ids[:, None], cache)
            return out.logits[:, 0], cache

        return _scan_steps(step, model.allocate_inference_cache(*x.shape), x)

    return Subject("compat_torch.LRNNLMHeadModel", forward, steps)


def _scan_steps(step: Callable, state: Any, x: Float[Array, "B L H"]) -> Float[Array, "B L H"]:
    def body(state, x_t):
        y_t, state = step(x_t, state)
        return state, y_t

    return jnp.swapaxes(jax.lax.scan(body, state, jnp.swapaxes(x, 0, 1))[1], 0, 1)


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
    return _scan_steps(layer.step, layer.initial_state(x.shape[0]), x)


SUBJECTS: dict[str, list[Subject]] = {
    "lrnnx.architectures.classifier:Classifier": [_classifier()],
    "lrnnx.architectures.language_model:LRNNLMHeadModel": [_language_model()],
    **{
        f"lrnnx.models.lti.centaurus:{cls.__name__}": [_compat(cls)]
        for cls in (lti.CentaurusNeck, lti.CentaurusPWNeck, lti.CentaurusDWS, lti.CentaurusFull)
    },
    "lrnnx.models.lti.s4:S4": [_compat(lti.S4)],
    "lrnnx.models.lti.s4d:S4D": [_compat(lti.S4D)],
    "lrnnx.models.lti.s5:S5": [_compat(lti.S5)],
    "lrnnx.models.ltv.mamba:Mamba": [_compat(ltv.Mamba)],
    "lrnnx.models.ltv.rglru:RGLRU": [_compat(ltv.RGLRU)],
    "lrnnx.models.ltv.s5:S5": [_compat(ltv.S5)],
    "lrnnx.models.ltv.s7:S7": [_compat(ltv.S7)],
    "lrnnx.models.lti.lru:LRU": [_compat(lti.LRU), Subject("spyx.LRU", _spyx_lru_forward, _spyx_lru_steps)],
}
