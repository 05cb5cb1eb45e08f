"""lrnnx's residual block: add, norm, mixer, and optionally add, norm, MLP."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..interop import torch_in_torch_out
from ..models.ltv.base import LTV_LRNN

_NO_KEYS: Any = SimpleNamespace(params=lambda: None)
"""Random streams for the norms, which start at constants: `nnx.Rngs` are slow to make and to draw from."""


class Block(nnx.Module):
    """(hidden_states, residual) -> the same: the residual stream runs beside the blocks.

    residual <- residual + hidden_states; hidden_states <- mixer(norm(residual)); with an MLP the same once more.

    Args:
        dim: width of the stream.
        mixer_cls: called with `dim`: a layer of compat_torch.models, or MHA.
        mlp_cls: called with `dim`; None is no MLP.
        norm_cls: called with `dim`.
        fused_add_norm: no effect.
        residual_in_fp32: keep the residual in float32 or wider.

    Source: Mamba (arXiv:2312.00752); lrnnx 1.0.0 `lrnnx.layers.block`.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], Any],
        mlp_cls: Callable[[int], Any] | None = None,
        norm_cls: Callable[[int], Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = False,
    ):
        norm_cls = norm_cls or layer_norm
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        if mlp_cls is not None:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    @torch_in_torch_out
    def __call__(
        self,
        hidden_states: Float[Array, "B L H"],
        residual: Float[Array, "B L H"] | None = None,
        *,
        integration_timesteps: Float[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Any = None,
    ) -> Any:
        """`(hidden_states, residual)`; with a cache of the mixer, `(hidden_states, residual, cache)`.

        Args:
            hidden_states: output of the block before, (B, L, dim).
            residual: the stream before it is added; None is 0.
            integration_timesteps: for a mixer with an event mode; another does without, as in lrnnx.
            lengths: int (B,): valid steps of each row.
            inference_cache: of the mixer.
        """

        def mix(x):
            extra = {"integration_timesteps": integration_timesteps} if has_event_mode(self.mixer) else {}
            out = self.mixer(x, lengths=lengths, inference_cache=inference_cache, **extra)
            if inference_cache is not None:
                return out
            return (out[0] if isinstance(out, tuple) else out), None

        y, residual, cache = self._apply(mix, hidden_states, residual)
        return (y, residual) if inference_cache is None else (y, residual, cache)

    @torch_in_torch_out
    def step(self, hidden_states: Float[Array, "B 1 H"], residual, cache, integration_timesteps=None):
        """One step: `(hidden_states, residual, cache)`."""

        def mix(x):
            timesteps = integration_timesteps if has_event_mode(self.mixer) else None
            y, after = self.mixer._advance(x[:, 0], cache, timesteps)
            return y[:, None], after

        return self._apply(mix, hidden_states, residual)

    def _apply(self, mix: Callable, hidden_states, residual):
        x, residual = self._normed(self.norm, hidden_states, residual)
        y, cache = mix(x)
        if hasattr(self, "mlp"):
            x, residual = self._normed(self.norm2, y, residual)
            y = self.mlp(x)
        return y, residual, cache

    def _normed(self, norm, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        x = normalise(norm, residual)
        return x, residual.astype(jnp.result_type(residual, jnp.float32)) if self.residual_in_fp32 else residual


def has_event_mode(layer: Any) -> bool:
    """Whether `integration_timesteps` has an effect on the layer."""
    return isinstance(layer, LTV_LRNN) and layer._event_mode


def normalise(norm: nnx.LayerNorm | nnx.RMSNorm, x: Float[Array, "*L H"]) -> Float[Array, "*L H"]:
    """The norm of `x` in the dtype of the norm's weight."""
    scale: Any = norm.scale
    return norm(x.astype(scale[...].dtype))


def layer_norm(dim: int, eps: float = 1e-5, param_dtype: Any = jnp.float32) -> nnx.LayerNorm:
    """`torch.nn.LayerNorm(dim, eps)`."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, param_dtype=param_dtype, rngs=_NO_KEYS)


def rms_norm(dim: int, eps: float = 1e-5, param_dtype: Any = jnp.float32) -> nnx.RMSNorm:
    """`torch.nn.RMSNorm(dim, eps)`."""
    return nnx.RMSNorm(dim, epsilon=eps, use_fast_variance=False, param_dtype=param_dtype, rngs=_NO_KEYS)
