"""The language model of Mamba-2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..models.ltv.mamba2 import Mamba2
from .config import CausalLMConfig, flag, integer, is_number, setting, token
from .mamba_lm import RecurrentConfig, RecurrentLM


def _is_range(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    low, high = value
    return is_number(low) and (is_number(high) or high == math.inf) and 0 <= low <= high


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(RecurrentConfig):
    """The configuration of `Mamba2LMHeadModel`, with transformers' names and defaults.

    Args:
        num_heads, head_dim: heads and their channels; together the channels of the recurrence.
        n_groups: groups of heads that share B, C and the mean square of the norm.
        time_step_limit: lower and upper bound of the step size, in calls, prefill and steps alike.
        chunk_size: steps per block of matrix products: speed and memory, not the result.
        d_ssm: channels of the recurrence, with the others a gated MLP beside it, as in state-spaces/mamba; None is all,
            int(expand * hidden_size).
        D_has_hdim: the feedthrough is one number a channel, instead of one a head, as in state-spaces/mamba.
        (others): see `RecurrentConfig` and `CausalLMConfig`.

    Raises:
        ValueError: values that are not supported, or heads that do not make the channels; it names all of them.
    """

    model_type: ClassVar[str] = "mamba2"

    vocab_size: int = integer(32768, 1, 2**24)
    hidden_size: int = integer(4096, 1, 2**20)
    num_hidden_layers: int = integer(64, 1, 2**10)
    tie_word_embeddings: bool = flag(False)
    eos_token_id: int | tuple[int, ...] | None = token(2)
    pad_token_id: int | tuple[int, ...] | None = token(1)
    state_size: int = integer(128, 1, 2**16)
    num_heads: int = integer(128, 1, 2**20)
    head_dim: int = integer(64, 1, 2**20)
    n_groups: int = integer(8, 1, 2**20)
    time_step_limit: tuple[float, float] = setting(
        (0.0, math.inf), _is_range, "two ascending numbers, at least 0 (the second may be infinite)"
    )
    chunk_size: int = integer(256, 1, 2**20)
    d_ssm: int | None = integer(None, 1, 2**24, optional=True)
    D_has_hdim: bool = flag(False)

    def __post_init__(self):
        super().__post_init__()
        wrong = []
        d_inner = int(self.expand * self.hidden_size)
        name = "expand * hidden_size" if self.d_ssm is None else "d_ssm"
        channels = d_inner if self.d_ssm is None else self.d_ssm
        if channels > d_inner:
            wrong.append(f"d_ssm must be at most expand * hidden_size = {d_inner}, got {channels}")
        if self.num_heads * self.head_dim != channels:
            wrong.append(f"num_heads * head_dim must be {name} = {channels}, got {self.num_heads} * {self.head_dim}")
        if self.num_heads % self.n_groups:
            wrong.append(f"n_groups must divide num_heads = {self.num_heads}, got {self.n_groups}")
        self._raise(wrong)


class Mamba2LMHeadModel(RecurrentLM):
    """Mamba-2's language model: token ids (B, L) -> logits (B, L, padded vocabulary).

    Args:
        config: sizes, see `Mamba2Config`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the activations between the layers; None is that of the parameters.
        param_dtype: of the parameters; None is `dtype`, or float32. A_log, D and dt_bias start in float32 or wider.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by the names of state-spaces/mamba: backbone.embedding.weight (V, d), backbone.layers.i.norm.weight,
    backbone.layers.i.mixer.* (see `Mamba2`), backbone.norm_f.weight, lm_head.weight (V, d), which is the embedding's
    where these are tied.

    transformers 5.23 forgets `time_step_limit` in its steps with a cache; this class does not.

    Source: Mamba-2 (arXiv:2405.21060); state-spaces/mamba `MambaLMHeadModel`; transformers `Mamba2ForCausalLM`.
    """

    config_class: ClassVar[type[CausalLMConfig]] = Mamba2Config

    def _mixer(self, d_model: int, **common: Any) -> Mamba2:
        c = self.config
        return Mamba2(
            d_model, c.state_size, c.conv_kernel, c.expand, c.head_dim, c.d_ssm, c.n_groups,
            D_has_hdim=c.D_has_hdim, dt_min=c.time_step_min, dt_max=c.time_step_max, dt_init_floor=c.time_step_floor,
            dt_limit=c.time_step_limit, bias=c.use_bias, conv_bias=c.use_conv_bias, chunk_size=c.chunk_size,
            norm_eps=c.layer_norm_epsilon, **common,
        )  # fmt: skip
