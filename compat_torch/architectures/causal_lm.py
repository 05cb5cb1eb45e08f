"""What all language models with a Hugging Face configuration share: calls, padding, head, cache, files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops.dtypes import widen
from spyx.ops.scan import check_lengths

from .. import state
from ..core.base import parameter_dtype
from ..core.layers import linear
from ..interop import torch_in_torch_out
from .config import CausalLMConfig

__all__ = ["Caches", "CausalLM", "CausalLMConfig", "CausalLMOutput", "TiedHead", "compact"]

Caches = dict[int, Any]


class CausalLMOutput(NamedTuple):
    """Result of a language model.

    Attributes:
        logits: (B, L, padded vocabulary).
        hidden_states: on request, as transformers has them: (B, L, H) each, the last one after the final norm.
    """

    logits: Float[Array, "B L V"]
    hidden_states: tuple[Float[Array, "B L H"], ...] | None = None


class TiedHead(nnx.Module):
    """Logits by the rows of the embedding, which it shares."""

    def __init__(self, weight: nnx.Param, precision: Any):
        self.weight, self.precision = weight, precision

    def __call__(self, x: Float[Array, "*L H"]) -> Float[Array, "*L V"]:
        """x W^T."""
        return jnp.einsum("...h,vh->...v", x, self.weight[...].astype(x.dtype), precision=self.precision)


class CausalLM(nnx.Module):
    """A language model: token ids (B, L) -> logits (B, L, padded vocabulary).

    A subclass has a `config_class`, makes `lm_head` by `_head`, and supplies `_run`, `_step` and
    `allocate_inference_cache`.

    Args:
        config: of the subclass's `config_class`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the activations; None is that of the parameters.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Raises:
        TypeError: a `config` of another class; `dtype` or `param_dtype` is not real floating point.
    """

    config_class: ClassVar[type[CausalLMConfig]] = CausalLMConfig
    config: Any
    lm_head: Any

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise TypeError(
                f"{self._name} takes a {expected} (from_dict reads a config.json), got {type(config).__name__}"
            )
        self.config = config
        self.precision, self.dtype = precision, dtype
        self.param_dtype = parameter_dtype(self._name, dtype, param_dtype)

    def _run(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"] | None, cache: Caches | None, keep_all: bool
    ) -> tuple[tuple[Float[Array, "B L H"], ...], Caches]:
        """The hidden states, of which the last one is after the final norm, and the cache after them ({} without one).

        Past `lengths` the hidden states may be anything. Unless `keep_all`, only the last one is needed.
        """
        raise NotImplementedError

    def _step(self, ids: Int[Array, " B"], cache: Caches) -> tuple[Float[Array, "B H"], Caches]:
        """The hidden state of one token after the final norm, and the cache after it."""
        raise NotImplementedError

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Caches:
        """{layer index: cache of its mixer} at the start of sequences of at most `max_seqlen` tokens.

        Args:
            batch_size: rows B.
            max_seqlen: bounds attention layers; the state of a recurrence does not grow.
            dtype: of what the cache stores of the inputs; None is that of the parameters.
        """
        raise NotImplementedError

    @torch_in_torch_out
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Int[Array, "B L"] | None = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits of whole sequences.

        Args:
            input_ids: integer, shape (B, L).
            attention_mask: integer or bool, shape (B, L): a token with 0 is as if it were not there, so that rows
                padded on either side give what they give alone; outputs at its place are 0.
            lengths: int, shape (B,): valid tokens of each row, in place of a mask; outputs past them are 0.
            output_hidden_states: return the hidden states too.

        Returns:
            `CausalLMOutput(logits, hidden_states)`; logits (B, L, padded vocabulary), float32 or wider.

        Raises:
            ValueError: wrong shapes; both a mask and lengths; ids outside the vocabulary, where their values are known
                (not under jit). TypeError: ids, mask or lengths that are not integers.
        """
        ids, order = self._tokens(input_ids), None
        if attention_mask is not None:
            if lengths is not None:
                raise ValueError(f"{self._name}: give attention_mask or lengths, not both")
            ids, lengths, order = compact(ids, attention_mask)
        ids, lengths = self._valid(ids, lengths)
        states, _ = self._run(ids, lengths, None, output_hidden_states)
        states = tuple(_place(x, lengths, order) for x in states)
        return CausalLMOutput(self._logits(states[-1]), states if output_hidden_states else None)

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """The same as calling the model."""
        return self(*args, **kwargs)

    @torch_in_torch_out
    def prefill(
        self,
        input_ids: Int[Array, "B L"],
        cache: Caches,
        *,
        lengths: Int[Array, " B"] | None = None,
        last_only: bool = False,
    ) -> tuple[CausalLMOutput, Caches]:
        """`(output, cache)`: the prompt, or a piece of it, by the parallel form.

        Args:
            input_ids: integer, shape (B, L). For rows padded on the left see `compact`.
            cache: of `allocate_inference_cache`, or of the piece before. It is left as it is.
            lengths: int, shape (B,): valid tokens of each row; the cache is that after the last valid one.
            last_only: only the logits of the last valid token of each row, (B, 1, padded vocabulary).

        Raises:
            ValueError, TypeError: as a call; a cache that does not fit.
        """
        ids, lengths = self._valid(self._tokens(input_ids), lengths)
        if cache is None:
            raise ValueError(
                f"{self._name}: prefill needs a cache; make one with allocate_inference_cache(batch_size, max_seqlen)"
            )
        states, after = self._run(ids, lengths, cache, False)
        hidden = _place(states[-1], lengths, None)
        if last_only:
            hidden = hidden[:, -1:] if lengths is None else _last(hidden, lengths)
        return CausalLMOutput(self._logits(hidden)), after

    @torch_in_torch_out
    def step(self, input_ids: Int[Array, "B 1"], cache: Caches) -> tuple[CausalLMOutput, Caches]:
        """One token: `(output, cache)` from ids (B, 1) and the cache before it, which is left as it is.

        Raises:
            ValueError, TypeError: as a call; more than one token; a cache that does not fit.
        """
        ids = self._tokens(input_ids)
        check_one_token(self._name, ids)
        hidden, after = self._step(self._valid(ids, None)[0][:, 0], cache)
        return CausalLMOutput(self._logits(hidden)[:, None]), after

    def state_dict(self) -> dict[str, jax.Array]:
        """Parameters under the reference's names and shapes; see `compat_torch.state_dict`."""
        return state.state_dict(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, dtype: DTypeLike | None = None
    ) -> state.IncompatibleKeys:
        """Load the reference's state_dict, all or nothing; see `compat_torch.load_state_dict`."""
        return state.load_state_dict(self, state_dict, strict, dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        format: str | None = None,
        source: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a folder that `from_pretrained` and the reference read; see `compat_torch.checkpoint.save_pretrained`.

        Args:
            save_directory: made if it is not there; otherwise it must be empty.
            format: "hf" or "mamba_ssm", where the class has them; None is the first with weights in safetensors.
            source: the folder the model came from: tokenizer, generation_config.json, licence and README are copied.
            overwrite: replace a folder that this method wrote.
        """
        from .. import checkpoint

        checkpoint.save_pretrained(self, save_directory, format=format, source=source, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """A model from a folder, in eval mode; see `compat_torch.checkpoint.from_pretrained`.

        Raises:
            TypeError: the folder holds a model of another class.
        """
        from .. import checkpoint

        model = checkpoint.from_pretrained(path, **kwargs)
        if not isinstance(model, cls):
            raise TypeError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _head(self, embedding: nnx.Embed, rngs: nnx.Rngs) -> TiedHead | nnx.Linear:
        if self.config.tie_word_embeddings:
            return TiedHead(embedding.embedding, self.precision)
        vocabulary, width = embedding.num_embeddings, embedding.features
        return linear(width, vocabulary, bias=False, param_dtype=self.param_dtype, precision=self.precision, rngs=rngs)

    def _logits(self, hidden: Float[Array, "*L H"]) -> Float[Array, "*L V"]:
        weight = self.lm_head.weight if isinstance(self.lm_head, TiedHead) else self.lm_head.kernel
        return widen(self.lm_head(hidden.astype(self.dtype or weight[...].dtype)))

    def _tokens(self, input_ids: Any) -> Int[Array, "B L"]:
        return as_tokens(self._name, input_ids)

    def _valid(self, ids: Int[Array, "B L"], lengths: Any) -> tuple[Int[Array, "B L"], Int[Array, " B"] | None]:
        return valid_tokens(self._name, ids, lengths, self.config.padded_vocab_size)


def as_tokens(name: str, input_ids: Any) -> Int[Array, "B L"]:
    """Token ids as an array of int32 or wider; raise unless they are integers (B, L)."""
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(f"{name} expects token ids (B, L), got shape {ids.shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} expects integer token ids (B, L), got {ids.dtype}")
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


def valid_tokens(
    name: str, ids: Int[Array, "B L"], lengths: Any, vocabulary: int
) -> tuple[Int[Array, "B L"], Int[Array, " B"] | None]:
    """The ids, 0 past the lengths, and the lengths, all checked as far as their values are known."""
    B, L = ids.shape
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        check_lengths(lengths, (L, B))
        ids = jnp.where(jnp.arange(L) < lengths[:, None], ids, 0)
    if ids.size and not isinstance(low := ids.min(), Tracer):
        high = ids.max()
        if low < 0 or high >= vocabulary:
            found = low if low < 0 else high
            raise ValueError(f"{name}: token ids must be from 0 to {vocabulary - 1}, got {found}")
    return ids, lengths


def check_layers(name: str, cache: Any, depth: int) -> None:
    """Raise ValueError unless `cache` has one entry, which is not None, for each of the `depth` layers."""
    complete = isinstance(cache, dict) and cache.keys() == set(range(depth))
    if not complete or any(entry is None for entry in cache.values()):
        raise ValueError(
            f"{name}: the cache must have one entry for each of the {depth} layers; make one with "
            "allocate_inference_cache(batch_size, max_seqlen)"
        )


def check_one_token(name: str, ids: Int[Array, "B L"]) -> None:
    """Raise ValueError unless `ids` are one token a row."""
    if ids.shape[1] != 1:
        raise ValueError(f"{name}: step takes one token a row, (B, 1), got {ids.shape}; prefill takes more")


def compact(
    input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]
) -> tuple[Int[Array, "B L"], Int[Array, " B"], Int[Array, "B L"]]:
    """Move the tokens whose mask is not 0 to the left of their row, in order: `(ids, lengths, order)`.

    Args:
        input_ids: integer, shape (B, L).
        attention_mask: integer or bool, the same shape.

    Returns:
        ids (B, L) with the masked tokens after the others; lengths int32 (B,); order (B, L): the token at place t was
        at place order[:, t].

    Raises:
        ValueError: shapes differ. TypeError: a mask that is neither integer nor bool.
    """
    ids, mask = jnp.asarray(input_ids), jnp.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {ids.shape}, got {mask.shape}")
    if not (jnp.issubdtype(mask.dtype, jnp.integer) or mask.dtype == jnp.bool_):
        raise TypeError(f"attention_mask must be integer or bool, got {mask.dtype}")
    order = jnp.argsort(mask == 0, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, 1), jnp.sum(mask != 0, 1, dtype=jnp.int32), order


def _place(x: Float[Array, "B L H"], lengths, order) -> Float[Array, "B L H"]:
    """0 past the lengths, then every step back to where `compact` found it."""
    if lengths is None:
        return x
    x = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0)
    return x if order is None else jnp.take_along_axis(x, jnp.argsort(order, 1)[..., None], 1)


def _last(x: Float[Array, "B L H"], lengths: Int[Array, " B"]) -> Float[Array, "B 1 H"]:
    return jnp.take_along_axis(x, (jnp.clip(lengths, 1, x.shape[1]) - 1)[:, None, None], 1)
