"""What all time-varying layers share: checks, layout, lengths, cache, step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops.dtypes import state_dtype
from spyx.ops.scan import check_lengths, valid_steps

from ...core.base import LRNN
from ...interop import torch_in_torch_out

Cache = dict[str, Array]


class LTV_LRNN(LRNN):
    """A layer whose recurrence depends on its input: (B, L, H) -> (B, L, H).

    A subclass supplies `_scan` and `_update`, time-major, and `_zero_state`. The cache is a dict of arrays:
    what `_zero_state` names, and `seqlen_offset` int32 (B,), the number of valid steps seen so far. `_event_mode` says
    whether its time steps can vary.
    """

    _event_mode: bool = False

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        """Outputs (anything past `lengths`, where `x` is 0), and the state after the last valid step."""
        raise NotImplementedError

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        """One step."""
        raise NotImplementedError

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        """The state before the first step."""
        raise NotImplementedError

    @torch_in_torch_out
    def __call__(
        self,
        hidden_states: Float[Array, "B L H"],
        integration_timesteps: Float[Array, "B L"] | Float[Array, "B L 1"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """Run the layer over whole sequences.

        Args:
            hidden_states: real floating point, shape (B, L, H).
            integration_timesteps: time since the event before, shape (B, L) or (B, L, 1): event mode.
            lengths: int, shape (B,): valid steps of each row; outputs past them are 0, and the padding, even NaN,
                reaches nothing.
            inference_cache: continue from it. A prompt may come in pieces of any length.

        Returns:
            y of shape (B, L, H) in `dtype`, or else the dtype of the input; with a cache, `(y, cache)`, the new
            cache being that after the last valid step of each row.

        Raises:
            ValueError: wrong rank or width, or a cache that does not fit. TypeError: wrong dtype.
        """
        x = jnp.swapaxes(self._input(hidden_states, "(B, L, H)"), 0, 1)
        L, B = x.shape[:2]
        timesteps = self._timesteps(integration_timesteps, (B, L), "(B, L)")
        offset = None
        if inference_cache is not None:
            offset = self._checked(inference_cache, B)["seqlen_offset"]
        valid = None
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            check_lengths(lengths, x.shape)
            valid = valid_steps(lengths, L, x.ndim)
            x = jnp.where(valid, x, 0)
            if timesteps is not None:
                timesteps = jnp.where(valid[..., 0], timesteps.T, 0).T
        y, state = self._scan(x, None if timesteps is None else timesteps.T, lengths, inference_cache)
        y = jnp.swapaxes(y if valid is None else jnp.where(valid, y, 0), 0, 1).astype(x.dtype)
        if offset is None:
            return y
        seen = L if lengths is None else jnp.clip(lengths, 0, L)
        return y, {**state, "seqlen_offset": (offset + seen).astype(jnp.int32)}

    @torch_in_torch_out
    def step(
        self,
        x: Float[Array, "B 1 H"],
        inference_cache: Cache,
        integration_timesteps: Float[Array, "B 1"] | Float[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B 1 H"], Cache]:
        """One step: `(y, cache)` from x (B, 1, H) and the cache before it, which is left as it is.

        Args:
            x: real floating point, shape (B, 1, H).
            inference_cache: from `allocate_inference_cache`, a call, or a step before.
            integration_timesteps: time since the event before, shape (B, 1) or (B,): event mode.

        Raises:
            ValueError: wrong rank or width, or a cache that does not fit. TypeError: wrong dtype.
        """
        x = self._input(x, "(B, 1, H)")
        if x.shape[1] != 1:
            raise ValueError(
                f"{self._name}: step takes one step, (B, 1, H), got shape {x.shape}; call the layer for more"
            )
        y, cache = self._advance(x[:, 0], inference_cache, integration_timesteps)
        return y[:, None], cache

    def _advance(
        self, x: Float[Array, "B H"], cache: Cache, timesteps: Array | None = None
    ) -> tuple[Float[Array, "B H"], Cache]:
        x = self._input(x, "(B, H)")
        self._checked(cache, x.shape[0])
        timesteps = self._timesteps(timesteps, (x.shape[0],), "(B,)")
        y, state = self._update(x, timesteps, cache)
        return y.astype(x.dtype), {**state, "seqlen_offset": cache["seqlen_offset"] + 1}

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: DTypeLike | None = None) -> Cache:
        """A cache at the start of a sequence.

        Args:
            batch_size: rows B.
            max_seqlen: no effect: the state of a recurrence does not grow.
            dtype: of what the cache stores of the inputs; None is that of the parameters. The recurrent state
                is float32, or float64 for float64.

        Returns:
            The reference's keys and shapes; `seqlen_offset` is int32 (B,).
        """
        self._check_sizes(batch_size=batch_size)
        offset = jnp.zeros((batch_size,), jnp.int32)
        return {**self._zero_state(batch_size, dtype or self.param_dtype), "seqlen_offset": offset}

    def _timesteps(self, timesteps, shape: tuple[int, ...], layout: str) -> Array | None:
        if timesteps is None:
            return None
        if not self._event_mode:
            raise ValueError(
                f"{self._name} has no step size that integration_timesteps could scale; pass None, or use S5 or Mamba "
                "of compat_torch.models.ltv"
            )
        timesteps = jnp.asarray(timesteps)
        if timesteps.shape not in (shape, (*shape, 1)):
            raise ValueError(
                f"{self._name}: integration_timesteps must have shape {layout} = {shape} (or a last axis of 1 more), "
                f"got {timesteps.shape}"
            )
        if not jnp.issubdtype(timesteps.dtype, jnp.floating):
            raise TypeError(f"{self._name}: integration_timesteps must be floating point, got {timesteps.dtype}")
        return timesteps.reshape(shape).astype(state_dtype(timesteps))

    def _checked(self, cache: Cache, batch: int) -> Cache:
        wanted = jax.eval_shape(lambda: self.allocate_inference_cache(batch))
        self._check_entries(cache, {name: [leaf.shape] for name, leaf in wanted.items()}, exactly=True)
        return cache
