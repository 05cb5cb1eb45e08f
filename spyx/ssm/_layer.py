"""What every layer shares: checks of sizes, inputs and masks, and the order of steps under `reverse`."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..ops.scan import check_lengths, check_reset, valid_steps

Lengths = Int[Array, " B"] | None
Reset = Bool[Array, "T *B"] | None


class SequenceLayer(nnx.Module):
    """A time-major layer (T, B, width) -> (T, B, width) with a state, `step` and `reverse`."""

    _width = "d_model"

    def __init__(self, *, reverse: bool, dtype: DTypeLike | None):
        self.reverse = bool(reverse)
        self.dtype = dtype

    def _check_sizes(self, **sizes: object) -> None:
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be a positive integer, got {value!r}")

    def _check_steps(self, dt_min: float, dt_max: float) -> None:
        if not 0.0 < dt_min <= dt_max:
            raise ValueError(f"{type(self).__name__} needs 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")

    def _input(self, u: ArrayLike, *, step: bool = False) -> Float[Array, "*T B H"]:
        u = jnp.asarray(u)
        name, width = type(self).__name__, getattr(self, self._width, None)
        layout = f"[{'' if step else 'T, '}B, {self._width}]"
        if u.ndim != (2 if step else 3) or width not in (None, u.shape[-1]):
            known = "" if width is None else f" with {self._width}={width}"
            raise ValueError(f"{name} expects {layout}{known}; got shape {u.shape}.")
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise TypeError(f"{name} expects real floating point input {layout}; got {u.dtype}.")
        return u if self.dtype is None else u.astype(self.dtype)

    def _refuse_reversed_step(self) -> None:
        if self.reverse:
            raise ValueError(f"{type(self).__name__} with reverse=True needs the whole sequence: it has no step.")


def check_masks(u: Float[Array, "T B H"], lengths: ArrayLike | None, reset: ArrayLike | None) -> tuple[Lengths, Reset]:
    """`lengths`, at most T, and `reset` as arrays; raise unless they fit `u`."""
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        check_lengths(lengths, u.shape)
        lengths = jnp.clip(lengths, 0, u.shape[0])
    if reset is not None:
        reset = jnp.asarray(reset)
        check_reset(reset, u.shape[:2])
    return lengths, reset


def clear_padding(v: Array, lengths: Lengths) -> Array:
    """`v` (T, B, ...) with zeros past the lengths."""
    return v if lengths is None else jnp.where(valid_steps(lengths, v.shape[0], v.ndim), v, 0)


def flip(v: Array, lengths: Lengths) -> Array:
    """`v` (T, B, ...) with the valid steps of each row in reverse order; the rest stays where it is."""
    if lengths is None:
        return jnp.flip(v, 0)
    steps = jnp.arange(v.shape[0])[:, None]
    order = jnp.where(steps < lengths, lengths - 1 - steps, steps)
    return jnp.take_along_axis(v, order.reshape(order.shape + (1,) * (v.ndim - 2)), axis=0)


def flip_reset(reset: Reset, lengths: Lengths) -> Reset:
    """`reset` in the order of flipped steps, (T, B) with `lengths`."""
    if reset is None or lengths is None or reset.ndim == 2:
        return None if reset is None else flip(reset, lengths)
    return flip(jnp.broadcast_to(reset[:, None], (reset.shape[0], lengths.shape[0])), lengths)
