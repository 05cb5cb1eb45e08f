"""The backbone of lrnnx's language model: embedding and residual blocks of any mixers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..core.base import LRNN, parameter_dtype
from ..core.discretization import Reference
from ..core.layers import look_up, symmetric_uniform
from ..interop import torch_in_torch_out
from ..layers import MHA, Block, GatedMLP
from ..layers.block import has_event_mode, layer_norm, normalise, rms_norm
from ..random import OneKey, default_rngs
from .causal_lm import as_tokens, check_layers, check_one_token, valid_tokens

Caches = dict[int, Any]

MIXERS = {
    "LRU": "lti", "S4": "lti", "S4D": "lti", "S5": "lti", "Centaurus": "lti",
    "Mamba": "ltv", "RGLRU": "ltv", "S7": "ltv",
}  # fmt: skip
_WITHOUT_D_STATE = ("RGLRU",)


def create_block(
    d_model: int,
    d_state: int,
    d_intermediate: int,
    mixer_type: str,
    mixer_kwargs: Mapping[str, Any] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = True,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: DTypeLike | None = None,
    *,
    mlp_cls: Callable[..., Any] | None = None,
    reference: Reference = "lrnnx",
    precision: jax.lax.PrecisionLike = "highest",
    param_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs | None = None,
) -> Block:
    """A residual block with the mixer of that name.

    Args:
        d_model: width.
        d_state: for the mixers that have it.
        d_intermediate: hidden width of the gated MLP; 0 is none.
        mixer_type: "attn" or one of LRU, S4, S4D, S5, Centaurus, Mamba, RGLRU, S7.
        mixer_kwargs: further arguments of the mixer.
        attn_cfg: arguments of `MHA`, for "attn".
        norm_epsilon: of the norms.
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: keep the residual in float32 or wider.
        fused_add_norm, layer_idx, device: no effect (device: None or "cpu").
        dtype, param_dtype, precision, reference, rngs: of every part.
        mlp_cls: in place of `GatedMLP`.

    Raises:
        ValueError: unknown `mixer_type`. TypeError: arguments that the mixer lacks or does not know, or that are
            arguments here (d_state; for "attn" layer_idx and device).
    """
    rngs = default_rngs(rngs)
    param_dtype = parameter_dtype("create_block", dtype, param_dtype)
    dense = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
    if mixer_type == "attn":
        fixed = {"layer_idx": layer_idx, "device": device}
        options = {"causal": reference == "paper", **_without(fixed, mixer_type, attn_cfg), **fixed}
        mixer_cls: Any = MHA
    elif mixer_type in MIXERS:
        mixer_cls = getattr(importlib.import_module(f"compat_torch.models.{MIXERS[mixer_type]}"), mixer_type)
        fixed = {} if mixer_type in _WITHOUT_D_STATE else {"d_state": d_state}
        layout = {"transposed": False} if mixer_type in ("S4", "S4D") else {}
        options = {**layout, **_without(fixed, mixer_type, mixer_kwargs), **fixed}
        if options.get("transposed"):
            raise ValueError(f"{mixer_type} in a language model works on (B, L, H): transposed=True is not supported")
    else:
        raise ValueError(f"mixer_type must be 'attn' or one of {tuple(MIXERS)}, got {mixer_type!r}")
    mlp = None
    if d_intermediate:
        mlp = partial(mlp_cls or GatedMLP, hidden_features=d_intermediate, out_features=d_model, device=device, **dense)
    return Block(
        d_model,
        partial(mixer_cls, **{**dense, "reference": reference, **options}),
        mlp,
        norm_cls=partial(_norm(rms_norm), eps=norm_epsilon, param_dtype=param_dtype),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )


class LRNNModel(LRNN):
    """The backbone: token ids (B, L) -> hidden states (B, L, d_model).

    Arguments: see `LRNNLMHeadModel`; `vocab_size` is taken as it is.
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
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: DTypeLike | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_device(device)
        self._check_sizes(d_model=d_model, d_state=d_state, n_layer=n_layer, vocab_size=vocab_size)
        self._check_sizes(0, d_intermediate=d_intermediate)
        if len(mixer_types) != n_layer:
            raise ValueError(f"mixer_types must have n_layer = {n_layer} entries, got {len(mixer_types)}")
        kwargs = dict(mixer_kwargs or {})
        if unknown := kwargs.keys() - set(mixer_types):
            raise ValueError(f"mixer_kwargs has {sorted(unknown)}, but the mixers are {sorted(set(mixer_types))}")
        self.d_model, self.vocab_size, self.mixer_types = d_model, vocab_size, tuple(mixer_types)
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        rngs = default_rngs(rngs)
        self.embedding = nnx.Embed(vocab_size, d_model, param_dtype=self.param_dtype, rngs=rngs)
        self.layers = nnx.List(
            create_block(
                d_model, d_state, d_intermediate, mixer, kwargs.get(mixer), kwargs.get("attn"), norm_epsilon, rms_norm,
                residual_in_fp32, fused_add_norm, i, device, dtype, mlp_cls=mlp_cls, reference=reference,
                precision=precision, param_dtype=self.param_dtype, rngs=rngs,
            )
            for i, mixer in enumerate(mixer_types)
        )  # fmt: skip
        self.norm_f = _norm(rms_norm)(d_model, eps=norm_epsilon, param_dtype=self.param_dtype)
        settings = {"n_residuals_per_layer": 2 if d_intermediate else 1, **(initializer_cfg or {})}
        init_weights(self, n_layer, rngs=rngs, **settings)

    @property
    def _has_event_mode(self) -> bool:
        return any(has_event_mode(layer.mixer) for layer in self.layers)

    @torch_in_torch_out
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        integration_timesteps: Float[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Caches | None = None,
    ) -> Any:
        """Hidden states after the final norm, (B, L, d_model), 0 past `lengths`; with a cache, `(hidden, cache)`.

        Raises:
            ValueError: wrong rank; ids outside of the vocabulary, where their values are known (not under jit);
                `integration_timesteps` in a model without a mixer that has an event mode.
            TypeError: ids that are not integers.
        """
        ids, lengths = self._valid(input_ids, integration_timesteps, lengths)
        if inference_cache is not None:
            check_layers(self._name, inference_cache, len(self.layers))
        hidden, residual = self._embed(ids), None
        cache: Caches = {}
        for i, layer in enumerate(self.layers):
            given = None if inference_cache is None else inference_cache[i]
            out = layer(
                hidden, residual, integration_timesteps=integration_timesteps, lengths=lengths, inference_cache=given
            )
            hidden, residual = out[:2]
            if given is not None:
                cache[i] = out[2]
        hidden = self._leave(hidden, residual)
        if lengths is not None:
            hidden = jnp.where((jnp.arange(ids.shape[1]) < lengths[:, None])[..., None], hidden, 0)
        return hidden if inference_cache is None else (hidden, cache)

    @torch_in_torch_out
    def step(
        self,
        input_ids: Int[Array, "B 1"],
        caches: Caches,
        integration_timesteps: Float[Array, "B 1"] | Float[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B 1 H"], Caches]:
        """One token: `(hidden, caches)` from ids (B, 1) and the caches before it, which are left as they are.

        Raises:
            ValueError, TypeError: as a call; more than one token; caches that do not fit.
        """
        ids = self._valid(input_ids, integration_timesteps)[0]
        check_one_token(self._name, ids)
        check_layers(self._name, caches, len(self.layers))
        hidden, residual = self._embed(ids), None
        after: Caches = {}
        for i, layer in enumerate(self.layers):
            hidden, residual, after[i] = layer.step(hidden, residual, caches[i], integration_timesteps)
        return self._leave(hidden, residual), after

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Caches:
        """{layer index: cache of its mixer}; `max_seqlen` bounds attention layers only."""
        return {
            i: layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
            for i, layer in enumerate(self.layers)
        }

    def _valid(self, input_ids, integration_timesteps, lengths=None):
        """The ids and the lengths, checked."""
        ids = as_tokens(self._name, input_ids)
        if integration_timesteps is not None and not self._has_event_mode:
            raise ValueError(
                f"{self._name}: integration_timesteps needs a mixer with an event mode (Mamba), the mixers are "
                f"{self.mixer_types}"
            )
        return valid_tokens(self._name, ids, lengths, self.vocab_size)

    def _embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L H"]:
        hidden = look_up(self.embedding.embedding[...], ids)
        return hidden if self.dtype is None else hidden.astype(self.dtype)

    def _leave(self, hidden, residual):
        return normalise(self.norm_f, hidden if residual is None else hidden + residual)


def _without(fixed: Mapping[str, Any], mixer: str, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The options of the mixer; raise if they have what is fixed by an argument beside them."""
    options = options or {}
    if twice := sorted(fixed.keys() & options.keys()):
        raise TypeError(f"the arguments of {mixer} must not have {twice}: the block, or the model, has them as its own")
    return options


def _norm(rms: bool) -> Callable[..., nnx.LayerNorm | nnx.RMSNorm]:
    return rms_norm if rms else layer_norm


def init_weights(
    model: nnx.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
    *,
    rngs: nnx.Rngs,
) -> None:
    """GPT-2's initialisation: small embeddings, no biases, projections into the residual scaled by depth.

    Nothing is drawn from `OneKey`.
    """
    if isinstance(rngs, OneKey):
        return
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed):
            embedding = module.embedding
            drawn = initializer_range * jax.random.normal(rngs.params(), embedding.shape)
            embedding.set_value(drawn.astype(embedding.dtype))
        elif isinstance(module, nnx.Linear):
            bias, kernel = module.bias, module.kernel
            if bias is not None and not bias.get_metadata().get("no_reinit"):
                bias.set_value(jnp.zeros_like(bias[...]))
            if rescale_prenorm_residual and path and path[-1] in ("out_proj", "fc2"):
                bound = (kernel.shape[0] * n_residuals_per_layer * n_layer) ** -0.5
                kernel.set_value(symmetric_uniform(bound)(rngs.params(), kernel.shape, kernel.dtype))
