"""Our answers to the classes of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from compat_torch.architectures.causal_lm import CausalLM
from compat_torch.architectures.mamba2_lm import Mamba2LMHeadModel
from compat_torch.architectures.mamba_lm import FalconMamba, MambaLMHeadModel
from compat_torch.architectures.recurrent_gemma import RecurrentGemma

from .base import Params, Subject, build, scan_steps


@dataclass(frozen=True)
class LanguageSubject(Subject):
    """A language model under test.

    Attributes:
        hidden_states: `(kwargs, params, input_ids) -> tuple of (B, L, H)`.
        greedy: `(kwargs, params, prompt, count) -> (B, count)`, the most likely tokens one after the other.
    """

    hidden_states: Callable[..., tuple[Array, ...]]
    greedy: Callable[..., Array]


def language_model(cls: type[CausalLM], rename: Callable[[str], str] = lambda name: name) -> LanguageSubject:
    """A class of compat_torch: called, and step by step. `rename` gives our name for one of a file's."""

    def make(kwargs: dict[str, Any], params: Params) -> Any:
        config = cls.config_class.from_dict(kwargs["config"])
        return build(cls, {"config": config}, {rename(name): value for name, value in params.items()})

    def forward(kwargs: dict[str, Any], params: Params, x: Int[Array, "B L"]) -> Array:
        return make(kwargs, params)(x).logits

    def hidden_states(kwargs: dict[str, Any], params: Params, x: Int[Array, "B L"]) -> tuple[Array, ...]:
        return make(kwargs, params)(x, output_hidden_states=True).hidden_states

    def steps(kwargs: dict[str, Any], params: Params, x: Int[Array, "B L"]) -> Array:
        model = make(kwargs, params)

        def step(ids, cache):
            out, after = model.step(ids[:, None], cache)
            return out.logits[:, 0], _as_before(after, cache)

        return scan_steps(step, model.allocate_inference_cache(*x.shape), x)

    def greedy(kwargs: dict[str, Any], params: Params, prompt: Int[Array, "B P"], count: int) -> Array:
        model = make(kwargs, params)
        cache = model.allocate_inference_cache(prompt.shape[0], prompt.shape[1] + count)
        out, after = model.prefill(prompt, cache)

        def step(carry, _):
            out, after = model.step(carry[0][:, None], carry[1])
            return (jnp.argmax(out.logits[:, 0], -1), _as_before(after, carry[1])), carry[0]

        start = (jnp.argmax(out.logits[:, -1], -1), _as_before(after, cache))
        return jax.lax.scan(step, start, length=count)[1].T

    return LanguageSubject(f"compat_torch.{cls.__name__}", forward, steps, hidden_states, greedy)


def _as_before(after: Any, before: Any) -> Any:
    return jax.tree.map(lambda new, old: new.astype(old.dtype), after, before)


def _state_spaces_name(name: str) -> str:
    return name.replace("backbone.embeddings.", "backbone.embedding.")


SUBJECTS: dict[str, list[Subject]] = {
    "transformers:MambaForCausalLM": [language_model(MambaLMHeadModel, _state_spaces_name)],
    "transformers:Mamba2ForCausalLM": [language_model(Mamba2LMHeadModel, _state_spaces_name)],
    "transformers:FalconMambaForCausalLM": [language_model(FalconMamba)],
    "transformers:RecurrentGemmaForCausalLM": [language_model(RecurrentGemma)],
}
