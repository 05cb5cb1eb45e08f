"""Layers without a membrane: pooling, flattening, reading out and counting spikes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from ._neuron import Shape, as_shape, layout

Padding = Literal["SAME", "VALID"]


class ActivityRegularization(nnx.Module):
    """Passes spikes on and counts them: the state is the number of spikes of each unit so far.

    After `spyx.nn.run` the counts are this layer's entry of the final state, for a penalty on silent or busy units.

    Args:
        hidden_shape: shape of the layer without the batch axis.
        batch_size: without effect; `initial_state` is told the batch size.
        dtype: of the counts.

    State: counts, shape (B, *hidden_shape).

    Raises:
        ValueError: bad `hidden_shape`.
    """

    def __init__(self, hidden_shape: Shape, batch_size: int = 1, dtype: DTypeLike = jnp.float32):
        del batch_size
        self.hidden_shape = as_shape("ActivityRegularization: hidden_shape", hidden_shape)
        self.dtype = dtype

    def initial_state(self, batch_size: int) -> Num[Array, "B *hidden"]:
        """Zero counts for `batch_size` rows."""
        return jnp.zeros((batch_size, *self.hidden_shape), self.dtype)

    def __call__(
        self, spikes: Num[Array, "B *hidden"], spike_count: Num[Array, "B *hidden"]
    ) -> tuple[Num[Array, "B *hidden"], Num[Array, "B *hidden"]]:
        """`(spikes, spike_count + spikes)`, the counts in their own dtype.

        Raises:
            ValueError: `spikes` and `spike_count` differ in shape.
        """
        shape, axes = spikes.shape, len(self.hidden_shape)
        if shape != spike_count.shape or shape[len(shape) - axes :] != self.hidden_shape:
            raise ValueError(
                f"ActivityRegularization expects spikes and counts {layout('B', self.hidden_shape)}; "
                f"got spikes {spikes.shape} and counts {spike_count.shape}."
            )
        return spikes, spike_count + spikes.astype(spike_count.dtype)


def PopulationCode(num_classes: int) -> Callable[[Num[Array, "..."]], Num[Array, " groups"]]:  # noqa: N802
    """A function that cuts its input, batch axis included, into runs of `num_classes` entries and sums each.

    To sum the n / num_classes units of each class in every row of a batch (B, n) instead:
    `x.reshape(B, num_classes, -1).sum(-1)`.

    Args:
        num_classes: entries to sum.

    Returns:
        The compiled function: x of any shape -> (x.size / num_classes,).

    Raises:
        ValueError: `num_classes` is not a positive integer; from the function: it does not divide `x.size`.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"PopulationCode: num_classes must be a positive integer, got {num_classes!r}")

    @jax.jit
    def population_code(x: Num[Array, "..."]) -> Num[Array, " groups"]:
        if x.size % num_classes:
            raise ValueError(f"PopulationCode: {num_classes} does not divide the {x.size} entries of shape {x.shape}.")
        return x.reshape(x.size // num_classes, num_classes).sum(axis=-1)

    return population_code


def sum_pool(
    value: Num[Array, "B *spatial"],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    channel_axis: int | None = -1,
) -> Num[Array, "B *pooled"]:
    """Sum over a window sliding along the spatial axes: all but the first (batch) and `channel_axis`.

    Args:
        value: shape (B, ...).
        window_shape, strides: an integer for every spatial axis; or one integer for each of them; or one for each axis
            of `value`; or, if of no such length, for the last axes.
        padding: "SAME" or "VALID", zeros.
        channel_axis: axis that is not pooled, unless the sizes are one for each axis; None if there is no such axis.

    Returns:
        The sums, in the dtype of `value`.

    Raises:
        ValueError: unknown padding, a channel axis outside `value`, sizes that are not positive or too many.
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"sum_pool: padding must be 'SAME' or 'VALID', got {padding!r}")
    value = jnp.asarray(value)
    window, steps = (
        _each_axis(name, size, value.shape, channel_axis)
        for name, size in (("window_shape", window_shape), ("strides", strides))
    )
    return jax.lax.reduce_window(value, np.zeros((), value.dtype), jax.lax.add, window, steps, padding)


def _each_axis(
    name: str, size: int | Sequence[int], shape: tuple[int, ...], channel_axis: int | None
) -> tuple[int, ...]:
    """`size` as one integer for each axis of `shape`."""
    ndim = len(shape)
    if channel_axis is not None and not -ndim <= channel_axis < ndim:
        raise ValueError(f"sum_pool: channel_axis {channel_axis} is not an axis of shape {shape}")
    channel = None if channel_axis is None else channel_axis % ndim
    spatial = [axis for axis in range(1, ndim) if axis != channel]
    sizes = (size,) * len(spatial) if isinstance(size, int) else tuple(size)
    if len(sizes) > ndim or min(sizes, default=1) < 1:
        raise ValueError(f"sum_pool: {name} must be positive, at most {ndim} for shape {shape}, got {size!r}")
    if len(sizes) == ndim:
        return sizes
    axes = spatial if len(sizes) == len(spatial) else range(ndim - len(sizes), ndim)
    placed = dict(zip(axes, sizes, strict=True))
    return tuple(placed.get(axis, 1) for axis in range(ndim))


class SumPool(nnx.Module):
    """`sum_pool` as a layer without state; arguments and errors are its."""

    def __init__(
        self,
        window_shape: int | Sequence[int],
        strides: int | Sequence[int],
        padding: Padding,
        channel_axis: int | None = -1,
    ):
        self.window_shape = window_shape if isinstance(window_shape, int) else tuple(window_shape)
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding: Padding = padding
        self.channel_axis = channel_axis

    def __call__(self, value: Num[Array, "B *spatial"]) -> Num[Array, "B *pooled"]:
        """The sums over the windows of one step, shape (B, ...)."""
        return sum_pool(value, self.window_shape, self.strides, self.padding, self.channel_axis)


class Flatten(nnx.Module):
    """(B, ...) -> (B, n): every axis but the first in one. No state."""

    def __call__(self, x: Float[Array, "B *features"]) -> Float[Array, "B n"]:
        """`x` with n = the product of its axes after the first.

        Raises:
            ValueError: `x` has no batch axis.
        """
        if x.ndim == 0:
            raise ValueError("Flatten expects [B, ...]; got a scalar.")
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))
