"""Time-varying layers whose step is their scan over one step."""

from __future__ import annotations

from jaxtyping import Array, Float

from .base import LTV_LRNN, Cache


class ScannedLTV(LTV_LRNN):
    """A layer that supplies `_scan` and `_zero_state` alone; `_event_mode` says whether its time steps can vary."""

    _event_mode: bool = False

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        y, after = self._scan(x[None], None if timesteps is None else timesteps[None], None, state)
        return y[0], {name: leaf.astype(state[name].dtype) for name, leaf in after.items()}

    def _timesteps(self, timesteps, shape: tuple[int, ...], layout: str) -> Array | None:
        if timesteps is not None and not self._event_mode:
            raise ValueError(
                f"{self._name} has no step size that integration_timesteps could scale; pass None, or use S5 or Mamba "
                "of compat_torch.models.ltv"
            )
        return super()._timesteps(timesteps, shape, layout)
