"""lrnnx's language model: embedding, residual blocks of any mixers, head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..core.base import LRNN
from ..core.discretization import Reference
from ..core.layers import linear
from ..interop import torch_in_torch_out
from ..random import default_rngs
from .backbone import Caches, LRNNModel, create_block
from .causal_lm import CausalLMOutput, TiedHead, check_layers

__all__ = ["CausalLMOutput", "LRNNLMHeadModel", "LRNNModel", "TiedHead", "create_block"]


class LRNNLMHeadModel(LRNN):
    """A language model of residual blocks: token ids (B, L) -> logits (B, L, padded vocabulary).

    Args:
        d_model: width of the residual stream.
        d_state: states of the mixers that have them.
        n_layer: number of blocks.
        vocab_size: rounded up to a multiple of `pad_vocab_size_multiple` in embedding and head.
        mixer_types: for each block, "attn" or one of LRU, S4, S4D, S5, Centaurus, Mamba, RGLRU, S7.
        d_intermediate: hidden width of a gated MLP after each mixer; 0 is none.
        mixer_kwargs: {mixer type: its further constructor arguments}; "attn" needs num_heads.
        mlp_cls: in place of `GatedMLP` (the reference ignores it).
        norm_epsilon: of the norms.
        rms_norm: RMSNorm instead of LayerNorm.
        fused_add_norm: no effect: the reference's CUDA kernel computes the same.
        residual_in_fp32: keep the residual in float32 or wider.
        tie_embeddings: the head shares the embedding's weight.
        pad_vocab_size_multiple: see `vocab_size`.
        initializer_cfg: initializer_range (0.02), rescale_prenorm_residual (True), n_residuals_per_layer.
        device: None or "cpu", no effect.
        dtype: of the parameters and activations; None is float32.
        reference: of the mixers, see their tables. "attn" is causal by default under "paper", and not under "lrnnx": a
            model with attention that is not causal has no step.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: backbone.embedding.weight, backbone.layers.i.{norm, mixer, norm2, mlp}.*, backbone.norm_f.*,
    lm_head.weight (also where it is tied).

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: its step skips attention layers; its
    save_pretrained loses the arguments of the mixers; `lengths` reaches only some mixers.

    Raises:
        ValueError: sizes, unknown mixers, arguments for mixers that are not there.

    Source: Mamba (arXiv:2312.00752); lrnnx 1.0.0 `lrnnx.architectures.language_model`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        n_layer: int,
        vocab_size: int,
        mixer_types: Sequence[str],
        d_intermediate: int = 0,
        mixer_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        mlp_cls: Callable[..., Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = False,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: DTypeLike | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(vocab_size=vocab_size, pad_vocab_size_multiple=pad_vocab_size_multiple)
        if isinstance(mlp_cls, str):
            raise TypeError(
                f"{self._name}: mlp_cls must be a class or a function, got {mlp_cls!r}; config.json has its name "
                "only: pass mlp_cls to from_pretrained as well"
            )
        others = {
            "mlp_cls": getattr(mlp_cls, "__name__", type(mlp_cls).__name__),
            "dtype": dtype,
            "precision": precision,
        }
        defaults = {"mlp_cls": "NoneType", "dtype": None, "precision": "highest"}
        self._config = _encode(
            d_model=d_model, d_state=d_state, n_layer=n_layer, vocab_size=vocab_size, mixer_types=list(mixer_types),
            d_intermediate=d_intermediate, mixer_kwargs=mixer_kwargs or {}, norm_epsilon=norm_epsilon,
            rms_norm=rms_norm, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32,
            tie_embeddings=tie_embeddings, pad_vocab_size_multiple=pad_vocab_size_multiple,
            initializer_cfg=initializer_cfg or {}, reference=reference,
            **{name: value for name, value in others.items() if value != defaults[name]},
        )  # fmt: skip
        self.d_model, self.vocab_size = d_model, vocab_size
        padded = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        rngs = default_rngs(rngs)
        self.backbone = LRNNModel(
            d_model, d_state, n_layer, padded, mixer_types, d_intermediate, mixer_kwargs, mlp_cls, norm_epsilon,
            rms_norm, initializer_cfg, fused_add_norm, residual_in_fp32, device, dtype, reference=reference,
            precision=precision, param_dtype=self.param_dtype, rngs=rngs,
        )  # fmt: skip
        if tie_embeddings:
            self.lm_head = TiedHead(self.backbone.embedding.embedding, precision)
        else:
            self.lm_head = linear(
                d_model, padded, bias=False, param_dtype=self.param_dtype, precision=precision, rngs=rngs
            )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as config.json has them.

        `mlp_cls` by name, `dtype` and `precision` where they are not the defaults; param_dtype is that of the weights.
        """
        return json.loads(self._config)

    @torch_in_torch_out
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        position_ids: None = None,
        inference_params: None = None,
        num_last_tokens: int = 0,
        integration_timesteps: Float[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> CausalLMOutput:
        """Logits of whole sequences.

        Args:
            input_ids: integer, shape (B, L).
            position_ids: must be None: recurrences know the position, attention layers count from 0.
            inference_params: must be None: `prefill` fills a cache.
            num_last_tokens: if positive, only the logits of that many last steps.
            integration_timesteps: time since the event before, shape (B, L), for the mixers with an event mode
                (Mamba); the others do without.
            lengths: int, shape (B,): valid tokens of each row; logits past them are 0, the padding reaches nothing.

        Returns:
            `CausalLMOutput(logits)`, logits (B, L or num_last_tokens, padded vocabulary).

        Raises:
            ValueError: wrong rank, ids outside of the vocabulary, where their values are known (not under jit), or
                an argument that must be None. TypeError: ids that are not integers.
        """
        if position_ids is not None:
            raise ValueError(f"{self._name}: position_ids is not supported; pass None")
        if inference_params is not None:
            raise ValueError(f"{self._name}: inference_params is not supported; use prefill(input_ids, cache)")
        hidden = self.backbone(input_ids, integration_timesteps, lengths)
        return CausalLMOutput(self._logits(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    @torch_in_torch_out
    def prefill(
        self,
        input_ids: Int[Array, "B L"],
        cache: Caches,
        integration_timesteps: Float[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[CausalLMOutput, Caches]:
        """`(output, cache)`: the prompt, or a piece of it, by the parallel form.

        Args:
            input_ids: integer, shape (B, L).
            cache: of `allocate_inference_cache`, or of the piece before.
            integration_timesteps, lengths: as in a call.

        Raises:
            ValueError, TypeError: as a call; a cache that does not fit.
        """
        check_layers(self._name, cache, len(self.backbone.layers))
        hidden, cache = self.backbone(input_ids, integration_timesteps, lengths, cache)
        return CausalLMOutput(self._logits(hidden)), cache

    @torch_in_torch_out
    def step(
        self,
        input_ids: Int[Array, "B 1"],
        caches: Caches,
        integration_timesteps: Float[Array, "B 1"] | Float[Array, " B"] | None = None,
    ) -> tuple[CausalLMOutput, Caches]:
        """One token: `(output, caches)` from ids (B, 1) and the caches before it, which are left as they are.

        Raises:
            ValueError: more than one token, caches that do not fit, an attention layer that is not causal.
        """
        hidden, caches = self.backbone.step(input_ids, caches, integration_timesteps)
        return CausalLMOutput(self._logits(hidden)), caches

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Caches:
        """{layer index: cache of its mixer}, for sequences of at most `max_seqlen` steps (attention; others are free).

        Raises:
            ValueError: an attention layer that is not causal.
        """
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight."""
        self.lm_head = TiedHead(self.backbone.embedding.embedding, self.precision)
        self._config = _encode(**{**self.config, "tie_embeddings": True})

    def save_pretrained(self, save_directory: str | Path, *, format: str | None = None) -> None:
        """Write config.json, which has every constructor argument, and model.safetensors (tied weights once).

        Args:
            save_directory: see `compat_torch.checkpoint.save_pretrained`, which this is.
            format: "lrnnx.lm" writes pytorch_model.bin, which lrnnx itself reads.
        """
        from ..checkpoint import save_pretrained

        save_pretrained(self, save_directory, format=format)

    @classmethod
    def from_pretrained(cls, pretrained_model_path: str | Path, **kwargs: Any) -> LRNNLMHeadModel:
        """A model from a folder that this class or lrnnx wrote, in eval mode.

        Args:
            pretrained_model_path: holds config.json and weights; see `compat_torch.checkpoint.from_pretrained`.
            **kwargs: constructor arguments that replace those of config.json. lrnnx does not write `mixer_kwargs`:
                pass what its mixers were made with, as far as shapes do not say it. A model with a `mlp_cls` needs it.

        Raises:
            FileNotFoundError: there is no such folder. TypeError, ValueError: the arguments do not make a model.
            CheckpointError: the weights do not fit it, or an argument is missing that only the caller knows.
        """
        from ..checkpoint import from_pretrained

        model: Any = from_pretrained(pretrained_model_path, format="lrnnx.lm", **kwargs)
        return model

    def _logits(self, hidden: Float[Array, "B L H"]) -> Float[Array, "B L V"]:
        logits = self.lm_head(hidden)
        return logits if self.dtype is None else logits.astype(self.dtype)


def _encode(**config: Any) -> str:
    """A hashable form of the configuration; dtypes and precisions by name."""

    def by_name(value: Any) -> str:
        return value.name.lower() if isinstance(value, jax.lax.Precision) else np.dtype(value).name

    return json.dumps(config, default=by_name)
