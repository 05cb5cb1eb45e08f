"""RecurrentGemma: Griffin's recurrent blocks and local attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..core.layers import look_up
from ..random import default_rngs
from ._recurrent_gemma_blocks import ACTIVATIONS, MLP, Cache, LocalAttention, Norm, RecurrentBlock
from .causal_lm import Caches, CausalLM, CausalLMConfig
from .config import choice, flag, integer, number, setting, token

_BLOCKS = {"recurrent": RecurrentBlock, "attention": LocalAttention}


def _are_blocks(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= 1024 and all(v in _BLOCKS for v in value)


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(CausalLMConfig):
    """The configuration of RecurrentGemma, under Hugging Face's names and with its defaults.

    Args:
        intermediate_size: twice the width inside the MLP.
        num_attention_heads: heads of the queries, and blocks of the gates of the recurrence.
        num_key_value_heads: a divisor of `num_attention_heads`; None is as many.
        lru_width: width D of the recurrence; None is `hidden_size`.
        attention_window_size: steps that attention sees.
        conv1d_width: taps of the convolution.
        logits_soft_cap: c in c tanh(logits / c).
        rms_norm_eps: of the norms.
        hidden_activation: "gelu_pytorch_tanh" or "gelu" (exact).
        block_types: repeated over the layers, each "recurrent" or "attention".
        attention_bias: biases of queries, keys and values.
        attention_dropout: 0.
        rope_theta: base of the rotation's frequencies.
        partial_rotary_factor: part of each head that is rotated.
        w_init_variance_scale: of the initial values.

    A config.json has the two of rope in `rope_parameters`, or, older ones, at its top; `to_dict` writes the former.
    `head_dim` is hidden_size / num_attention_heads.
    """

    model_type: ClassVar[str] = "recurrent_gemma"

    vocab_size: int = integer(256000, 1, 2**24)
    hidden_size: int = integer(2560, 1, 2**20)
    num_hidden_layers: int = integer(26, 1, 2**10)
    intermediate_size: int = integer(7680, 2, 2**22)
    num_attention_heads: int = integer(10, 1, 2**12)
    num_key_value_heads: int | None = integer(None, 1, 2**12, optional=True)
    lru_width: int | None = integer(None, 1, 2**20, optional=True)
    attention_window_size: int = integer(2048, 1, 2**24)
    conv1d_width: int = integer(4, 1, 2**10)
    logits_soft_cap: float = number(30.0, 1e-6, 1e6)
    rms_norm_eps: float = number(1e-6, 0, 1)
    hidden_activation: str = choice("gelu_pytorch_tanh", *ACTIVATIONS)
    block_types: tuple[str, ...] = setting(
        ("recurrent", "recurrent", "attention"), _are_blocks, f"a list of {tuple(_BLOCKS)}"
    )
    attention_bias: bool = flag(False)
    attention_dropout: float = number(0.0, 0, 0)
    rope_theta: float = number(10000.0, 1e-6, 1e12)
    partial_rotary_factor: float = number(0.5, 0, 1)
    w_init_variance_scale: float = number(0.01, 0, 1e3)
    bos_token_id: int | tuple[int, ...] | None = token(2)
    eos_token_id: int | tuple[int, ...] | None = token(1)
    pad_token_id: int | None = integer(0, -1, 2**24, optional=True)

    def __post_init__(self):
        super().__post_init__()
        heads, wrong = self.num_attention_heads, []
        for name, width in (("hidden_size", self.hidden_size), ("lru_width", self.recurrent_width)):
            if width % heads:
                wrong.append(f"{name} must be a multiple of num_attention_heads, got {width} and {heads}")
        if heads % self.kv_heads:
            wrong.append(f"num_key_value_heads must divide num_attention_heads, got {self.kv_heads} and {heads}")
        rotated = int(self.head_width * self.partial_rotary_factor)
        if rotated % 2:
            wrong.append(
                f"partial_rotary_factor must rotate an even part of a head, got {rotated} of {self.head_width}"
            )
        self._raise(wrong)

    @property
    def recurrent_width(self) -> int:
        """Width D of the recurrence."""
        return self.lru_width or self.hidden_size

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width E of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def out_variance(self) -> float:
        """Variance, times its inputs, of what a block starts to write into the stream."""
        return 2 / self.num_hidden_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The configuration of a config.json; see `CausalLMConfig.from_dict`.

        Raises:
            ValueError: as there; a rope_type other than "default", a head_dim or lru_width that is not supported.
        """
        if not isinstance(config, Mapping):
            return super().from_dict(config)
        given = dict(config)
        rope = given.pop("rope_parameters", None) or {}
        if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
            raise ValueError(f"{cls.__name__}: rope_parameters must have rope_type 'default', got {str(rope)[:60]}")
        given |= {name: value for name, value in rope.items() if name != "rope_type"}
        made = super().from_dict(given)
        if made.extra.get("head_dim", made.head_width) != made.head_width:
            found = str(made.extra["head_dim"])[:60]
            raise ValueError(f"{cls.__name__}: head_dim must be {made.head_width}, got {found}")
        return made

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json."""
        values = super().to_dict()
        rope = {name: values.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
        return {**values, "rope_parameters": {"rope_type": "default", **rope}}


class Layer(nnx.Module):
    """Two residual branches: norm and temporal block, norm and MLP."""

    def __init__(self, config: RecurrentGemmaConfig, kind: str, **common: Any):
        H, eps, dtype = config.hidden_size, config.rms_norm_eps, common["param_dtype"]
        self.temporal_pre_norm = Norm(H, eps, dtype)
        self.temporal_block = _BLOCKS[kind](config, **common)
        self.channel_pre_norm = Norm(H, eps, dtype)
        self.mlp_block = MLP(config, **common)

    def __call__(
        self, x: Float[Array, "B L H"], lengths: Int[Array, " B"] | None, cache: Cache | None
    ) -> tuple[Float[Array, "B L H"], Cache]:
        """`(x, cache)`."""
        mixed, after = self.temporal_block(self.temporal_pre_norm(x), lengths, cache)
        x = x + mixed
        return x + self.mlp_block(self.channel_pre_norm(x)), after


class Backbone(nnx.Module):
    """What carries the prefix `model.`: embedding, layers, final norm."""

    def __init__(self, config: RecurrentGemmaConfig, **common: Any):
        std = math.sqrt(config.w_init_variance_scale / config.conv1d_width)
        self.embed_tokens = nnx.Embed(
            config.padded_vocab_size, config.hidden_size, embedding_init=nnx.initializers.normal(std),
            param_dtype=common["param_dtype"], rngs=common["rngs"],
        )  # fmt: skip
        kinds = [config.block_types[i % len(config.block_types)] for i in range(config.num_hidden_layers)]
        self.layers = nnx.List(Layer(config, kind, **common) for kind in kinds)
        self.final_norm = Norm(config.hidden_size, config.rms_norm_eps, common["param_dtype"])


class RecurrentGemma(CausalLM):
    """RecurrentGemma: token ids (B, L) -> logits (B, L, padded vocabulary).

    Embeddings times sqrt(hidden_size), which is rounded to bfloat16; layers of RG-LRU or local attention, each with a
    gated MLP; logits within +-logits_soft_cap. As in transformers, the embedding of `pad_token_id` has no gradient
    where it is looked up.

    Args:
        config: a `RecurrentGemmaConfig`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the activations; None is that of the parameters.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by transformers' names: model.embed_tokens.weight, model.layers.i.{temporal_pre_norm, channel_pre_norm,
    mlp_block}.*, of a recurrent layer temporal_block.{linear_x, linear_y, linear_out, conv_1d, rg_lru}.*, of an
    attention layer temporal_block.{q_proj, k_proj, v_proj, o_proj}.*, model.final_norm.weight, lm_head.weight (also
    where it is tied).

    Cache, of each layer: conv_state (B, D, K), lrnn_state (B, D) and seqlen_offset (B,), or k and v (B, W, G, E) and
    seqlen_offset. With max_seqlen below the window, logits past it are NaN.

    Where transformers 5.23 is wrong and this class is not: it keeps the recurrent states on the module, so that a
    second prompt with a cache of its own starts from the first one's; padding on the left shifts position 0 and
    reaches the recurrence; a prompt in pieces forgets the convolution's inputs.

    Source: RecurrentGemma (arXiv:2404.07839), Griffin (arXiv:2402.19427); names and rounding of transformers 5.23
    `RecurrentGemmaForCausalLM`.
    """

    config_class = RecurrentGemmaConfig
    config: RecurrentGemmaConfig

    def __init__(
        self,
        config: RecurrentGemmaConfig,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(config, precision=precision, dtype=dtype, param_dtype=param_dtype)
        rngs = default_rngs(rngs)
        self.model = Backbone(config, param_dtype=self.param_dtype, precision=precision, rngs=rngs)
        self.lm_head = self._head(self.model.embed_tokens, rngs)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Caches:
        """{layer index: cache} at the start of sequences of at most `max_seqlen` tokens.

        Args:
            batch_size: rows B.
            max_seqlen: bounds the attention layers, which keep no more than their window.
            dtype: of inputs, keys and values; None is that of the parameters. The recurrent state is float32, or
                float64 for float64.

        Raises:
            ValueError: sizes that are not positive integers.
        """
        for name, value in (("batch_size", batch_size), ("max_seqlen", max_seqlen)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self._name}: {name} must be a positive integer, got {value!r}")
        dtype = dtype or self.dtype or self.param_dtype
        blocks = (layer.temporal_block for layer in self.model.layers)
        return {i: block.allocate(batch_size, max_seqlen, dtype) for i, block in enumerate(blocks)}

    def _run(self, ids, lengths, cache, keep_all):
        if cache is not None:
            self._check_cache(cache, ids.shape[0])
        embedding = self.model.embed_tokens.embedding[...]
        x = look_up(embedding, ids).astype(self.dtype or embedding.dtype)
        if self.config.pad_token_id is not None:
            x = jnp.where((ids == self.config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = x * jnp.asarray(math.sqrt(self.config.hidden_size), jnp.bfloat16).astype(x.dtype)
        states, after = [x], {}
        for i, layer in enumerate(self.model.layers):
            x, after[i] = layer(x, lengths, None if cache is None else cache[i])
            states.append(x)
        states[-1] = self.model.final_norm(x)
        return tuple(states if keep_all else states[-1:]), after

    def _step(self, ids, cache):
        states, after = self._run(ids[:, None], None, cache, False)
        return states[-1][:, 0], after

    def _logits(self, hidden):
        cap = self.config.logits_soft_cap
        return cap * jnp.tanh(super()._logits(hidden) / cap)

    def _check_cache(self, cache: Caches, batch: int) -> None:
        wanted = jax.eval_shape(lambda: self.allocate_inference_cache(batch, 1))
        fits = isinstance(cache, dict) and cache.keys() == wanted.keys()
        if not fits or any(cache[i].keys() != leaf.keys() for i, leaf in wanted.items()):
            raise ValueError(
                f"{self._name}: the cache must come from allocate_inference_cache(batch_size, max_seqlen) of this model"
            )
        rows = {leaf.shape[0] for leaf in jax.tree.leaves(cache)}
        if rows != {batch}:
            raise ValueError(f"{self._name}: the cache must have {batch} rows as the ids, got {sorted(rows)}")
