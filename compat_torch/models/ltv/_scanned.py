"""Time-varying layers whose step is their scan over one step."""

from __future__ import annotations

from jaxtyping import Array, Float

from .base import LTV_LRNN, Cache


class ScannedLTV(LTV_LRNN):
    """A layer that supplies `_scan` and `_zero_state` alone."""

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        y, after = self._scan(x[None], None if timesteps is None else timesteps[None], None, state)
        return y[0], {name: leaf.astype(state[name].dtype) for name, leaf in after.items()}
