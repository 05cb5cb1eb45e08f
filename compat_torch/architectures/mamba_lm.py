"""The language models of Mamba-1: state-spaces/mamba's, and Falcon Mamba."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops.dtypes import widen

from ..core.layers import look_up
from ..layers.block import rms_norm
from ..models.ltv.base import LTV_LRNN
from ..models.ltv.mamba import MambaMixer
from ..random import alike, default_rngs
from .backbone import init_weights
from .causal_lm import Caches, CausalLM, check_layers
from .config import CausalLMConfig, choice, flag, integer, is_integer, number, setting

_ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(CausalLMConfig):
    """What the configurations of Mamba, Falcon Mamba and Mamba-2 have in common, with transformers' defaults.

    Args:
        state_size: states N of each channel or head.
        expand: channels are int(expand * hidden_size).
        conv_kernel: taps of the convolution.
        use_bias: bias of in_proj and out_proj.
        use_conv_bias: bias of the convolution.
        hidden_act: of the convolution: "silu" (or "swish", its other name).
        layer_norm_epsilon: of the norms.
        initializer_range: standard deviation of a new embedding.
        residual_in_fp32: keep the residual stream in float32 or wider.
        rescale_prenorm_residual: scale a new out_proj by depth.
        time_step_min, time_step_max, time_step_floor: of new step sizes, see `Mamba`.
    """

    state_size: int = integer(16, 1, 2**16)
    expand: float = number(2, 2**-10, 2**10)
    conv_kernel: int = integer(4, 1, 2**10)
    use_bias: bool = flag(False)
    use_conv_bias: bool = flag(True)
    hidden_act: str = choice("silu", *_ACTIVATIONS)
    layer_norm_epsilon: float = number(1e-5, 0, 1)
    initializer_range: float = number(0.1, 0, 1e3)
    residual_in_fp32: bool = flag(True)
    rescale_prenorm_residual: bool = flag(False)
    time_step_min: float = number(0.001, 1e-30, 1e30)
    time_step_max: float = number(0.1, 1e-30, 1e30)
    time_step_floor: float = number(1e-4, 0, 1e30)

    def __post_init__(self):
        super().__post_init__()
        wrong = []
        if int(self.expand * self.hidden_size) < 1:
            wrong.append(f"expand * hidden_size must be at least 1, got {self.expand} * {self.hidden_size}")
        low, high = self.time_step_min, self.time_step_max
        if high < low:
            wrong.append(f"time_step_max must be at least time_step_min = {low}, got {high}")
        self._raise(wrong)


@dataclass(frozen=True, kw_only=True)
class MambaConfig(RecurrentConfig):
    """The configuration of `MambaLMHeadModel`, with transformers' names and defaults.

    Args:
        intermediate_size: channels; None is int(expand * hidden_size).
        time_step_rank: width R of the input of dt_proj; "auto" is ceil(hidden_size / 16).
        time_step_scale, time_step_init_scheme: `dt_scale` and `dt_init` of `Mamba`.
        (others): see `RecurrentConfig` and `CausalLMConfig`.

    Raises:
        ValueError: values that are not supported; it names all of them.
    """

    model_type: ClassVar[str] = "mamba"

    intermediate_size: int | None = integer(None, 1, 2**24, optional=True)
    time_step_rank: int | str = setting(
        "auto", lambda value: value == "auto" or is_integer(value, 1, 2**20), f"'auto' or an integer from 1 to {2**20}"
    )
    time_step_scale: float = number(1.0, 0, 1e30)
    time_step_init_scheme: str = choice("random", "random", "constant")

    def __post_init__(self):
        super().__post_init__()
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", int(self.expand * self.hidden_size))
        if self.time_step_rank == "auto":
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    """The configuration of `FalconMamba`.

    Args:
        mixer_rms_eps: under the root of the norms of dt, B and C.
        (others): see `MambaConfig`.
    """

    model_type: ClassVar[str] = "falcon_mamba"

    mixer_rms_eps: float = number(1e-6, 0, 1)


class RecurrentBlock(nnx.Module):
    """x + mixer(norm(x)), where x is kept in float32 or wider if `residual_in_fp32`."""

    def __init__(self, norm: nnx.RMSNorm, mixer: LTV_LRNN, residual_in_fp32: bool):
        self.norm, self.mixer, self.residual_in_fp32 = norm, mixer, residual_in_fp32

    def normed(self, x: Float[Array, "B *L H"]) -> Float[Array, "B *L H"]:
        """The input of the mixer, in its dtype, or else that of the norm's weight; computed in float32 or wider."""
        scale: Any = self.norm.scale
        return self.norm(x).astype(self.mixer.dtype or scale[...].dtype)

    def added(self, x: Float[Array, "B *L H"], y: Float[Array, "B *L H"]) -> Float[Array, "B *L H"]:
        """The output of the block from its input and the output of the mixer."""
        return (widen(x) if self.residual_in_fp32 else x) + y


class RecurrentBackbone(nnx.Module):
    """Embedding, residual blocks and final norm.

    Args:
        config: sizes.
        mixer: called with the width: the mixer of one block.
        embedding_name: of the embedding among the parameters.
        param_dtype: of the parameters.
        rngs: random streams.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        mixer: Callable[[int], LTV_LRNN],
        embedding_name: str,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width, depth = config.hidden_size, config.num_hidden_layers
        norm = partial(rms_norm, eps=config.layer_norm_epsilon, param_dtype=param_dtype)
        self._embedding_name = embedding_name
        setattr(self, embedding_name, nnx.Embed(config.padded_vocab_size, width, param_dtype=param_dtype, rngs=rngs))
        self.layers = nnx.List(
            alike(depth, lambda: RecurrentBlock(norm(width), mixer(width), config.residual_in_fp32), rngs)
        )
        self.norm_f = norm(width)
        init_weights(self, depth, config.initializer_range, config.rescale_prenorm_residual, rngs=rngs)

    @property
    def embed(self) -> nnx.Embed:
        """The embedding."""
        return getattr(self, self._embedding_name)


class RecurrentLM(CausalLM):
    """A language model of residual blocks with one kind of mixer. A subclass supplies `_mixer`."""

    _embedding_name: ClassVar[str] = "embedding"

    def __init__(
        self,
        config: Any,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(config, precision=precision, dtype=dtype, param_dtype=param_dtype)
        rngs = default_rngs(rngs)
        mixer = partial(self._mixer, dtype=dtype, param_dtype=self.param_dtype, precision=precision, rngs=rngs)
        self.backbone = RecurrentBackbone(config, mixer, self._embedding_name, param_dtype=self.param_dtype, rngs=rngs)
        self.lm_head = self._head(self.backbone.embed, rngs)

    def _mixer(self, d_model: int, **common: Any) -> LTV_LRNN:
        raise NotImplementedError

    def _run(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"] | None, cache: Caches | None, keep_all: bool
    ) -> tuple[tuple[Float[Array, "B L H"], ...], Caches]:
        if cache is not None:
            check_layers(self._name, cache, len(self.backbone.layers))
        x, states = self._embed(ids), []
        after: Caches = {}
        for i, layer in enumerate(self.backbone.layers):
            given = None if cache is None else cache[i]
            y = layer.mixer(layer.normed(x), lengths=lengths, inference_cache=given)
            if given is not None:
                y, after[i] = y
            x = layer.added(x, y)
            if keep_all:
                states.append(x)
        return (*states, self.backbone.norm_f(x)), after

    def _step(self, ids: Int[Array, " B"], cache: Caches) -> tuple[Float[Array, "B H"], Caches]:
        check_layers(self._name, cache, len(self.backbone.layers))
        x = self._embed(ids)
        after: Caches = {}
        for i, layer in enumerate(self.backbone.layers):
            y, after[i] = layer.mixer._advance(layer.normed(x), cache[i])
            x = layer.added(x, y)
        return self.backbone.norm_f(x), after

    def _embed(self, ids: Int[Array, "B *L"]) -> Float[Array, "B *L H"]:
        hidden = look_up(self.backbone.embed.embedding[...], ids)
        return hidden if self.dtype is None else hidden.astype(self.dtype)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Caches:
        """{layer index: cache of its mixer} at the start of a sequence.

        Args:
            batch_size: rows B.
            max_seqlen: no effect: the state of a recurrence does not grow.
            dtype: of what the cache stores of the inputs; None is `dtype` of the model, or that of the parameters.
                The recurrent state is float32, or float64 for float64.
        """
        dtype = dtype or self.dtype or self.backbone.embed.embedding[...].dtype
        layers = enumerate(self.backbone.layers)
        return {i: layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype) for i, layer in layers}


class MambaLMHeadModel(RecurrentLM):
    """Mamba's language model: token ids (B, L) -> logits (B, L, padded vocabulary).

    Args:
        config: sizes, see `MambaConfig`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the activations between the layers; None is that of the parameters.
        param_dtype: of the parameters; None is `dtype`, or float32. A_log and D start in float32 or wider.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by the names of state-spaces/mamba: backbone.embedding.weight (V, d), backbone.layers.i.norm.weight,
    backbone.layers.i.mixer.* (see `Mamba`, without dtA_proj), backbone.norm_f.weight, lm_head.weight (V, d), which is
    the embedding's where these are tied.

    Source: Mamba (arXiv:2312.00752); state-spaces/mamba `MambaLMHeadModel`; transformers `MambaForCausalLM`.
    """

    config_class: ClassVar[type[CausalLMConfig]] = MambaConfig

    def _mixer(self, d_model: int, **common: Any) -> MambaMixer:
        c = self.config
        return MambaMixer(
            d_model, c.intermediate_size, c.state_size, c.conv_kernel, c.time_step_rank,
            dt_min=c.time_step_min, dt_max=c.time_step_max, dt_init=c.time_step_init_scheme,
            dt_scale=c.time_step_scale, dt_init_floor=c.time_step_floor, conv_bias=c.use_conv_bias, bias=c.use_bias,
            norm_eps=getattr(c, "mixer_rms_eps", None), **common,
        )  # fmt: skip


class FalconMamba(MambaLMHeadModel):
    """Falcon Mamba: Mamba with norms on dt, B and C, token ids (B, L) -> logits (B, L, padded vocabulary).

    Args: see `MambaLMHeadModel`; `config` is a `FalconMambaConfig`.

    Parameters: as `MambaLMHeadModel`, but backbone.embeddings.weight, as transformers has it. The norms have none.

    Source: Falcon Mamba (arXiv:2410.05355); transformers `FalconMambaForCausalLM`.
    """

    config_class: ClassVar[type[CausalLMConfig]] = FalconMambaConfig
    _embedding_name: ClassVar[str] = "embeddings"
