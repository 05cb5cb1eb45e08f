"""What the neurons share: shapes, dtypes, state, decay constants, the spike function, recurrent weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from ..axn import Activation, superspike

Shape = int | Sequence[int]
Precision = jax.lax.PrecisionLike
Threshold = float | Array | nnx.Param

_superspike = superspike()
_decay_init = nnx.initializers.truncated_normal(stddev=0.25)
_recurrent_init = nnx.initializers.truncated_normal()


def as_shape(name: str, shape: Shape) -> tuple[int, ...]:
    """`shape` as a tuple of positive integers; an integer is a single axis."""
    try:
        axes = tuple(operator.index(n) for n in (shape if isinstance(shape, Sequence) else (shape,)))
    except TypeError:
        axes = ()
    if not axes or min(axes) < 1:
        raise ValueError(f"{name} must be a positive integer or a non-empty tuple of them, got {shape!r}")
    return axes


def layout(leading: str, shape: tuple[int, ...]) -> str:
    """Axes as written in a message: "[B, 3]"."""
    return f"[{leading}, {', '.join(map(str, shape))}]"


class Neuron(nnx.Module):
    """`(x_t, state) -> (out, state)`, elementwise but for recurrent weights, with `_advance` from a subclass.

    The state is one array: `_parts` arrays of the neuron's shape side by side along its last axis.
    """

    _parts = 1

    def __init__(self, hidden_shape: Shape, param_dtype: DTypeLike, *, name: str = "hidden_shape"):
        self.hidden_shape = as_shape(f"{type(self).__name__}: {name}", hidden_shape)
        self.param_dtype = param_dtype

    def _advance(self, x: Array, state: list[Array]) -> tuple[Array, ...]:
        """(out, *state) of one step from the input and the `_parts` of the state, all of one shape and dtype."""
        raise NotImplementedError

    def _constant(self, name: str, value: ArrayLike) -> Array:
        value = jnp.asarray(value)
        aligned = zip(value.shape[::-1], self.hidden_shape[::-1], strict=False)
        if value.ndim > len(self.hidden_shape) or any(n not in (1, size) for n, size in aligned):
            raise ValueError(
                f"{type(self).__name__}: {name} must be a number or broadcast against the neuron's shape "
                f"{self.hidden_shape}, got shape {value.shape}"
            )
        return value

    def _decay(self, name: str, value: ArrayLike | None, rngs: nnx.Rngs) -> nnx.Param:
        """A trained decay: `value`, or 0.5 + a truncated normal of deviation 0.25 for each unit."""
        if value is None:
            drawn = _decay_init(rngs.params(), self.hidden_shape, jnp.result_type(jnp.float32, self.param_dtype)) + 0.5
        else:
            drawn = self._constant(name, value)
        return nnx.Param(drawn.astype(self.param_dtype))

    def initial_state(self, batch_size: int) -> Float[Array, "B *hidden"]:
        """Zero state for `batch_size` rows, float32 or wider."""
        *leading, last = self.hidden_shape
        shape = (batch_size, *leading, self._parts * last)
        return jnp.zeros(shape, jnp.result_type(jnp.float32, self.param_dtype))

    def _input(self, x: Num[Array, "..."]) -> tuple[Array, DTypeLike]:
        """`x` in float32 or wider, and the dtype of the output: that of `x` if it is floating point."""
        x, name, axes = jnp.asarray(x), type(self).__name__, len(self.hidden_shape)
        if jnp.iscomplexobj(x):
            raise TypeError(f"{name} expects real input; got {x.dtype}.")
        if x.ndim < axes or x.shape[x.ndim - axes :] != self.hidden_shape:
            raise ValueError(f"{name} expects input {layout('B', self.hidden_shape)}; got shape {x.shape}.")
        wide = x.astype(jnp.result_type(jnp.float32, x))
        return wide, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else wide.dtype

    def _state(self, state: Float[Array, "..."] | None, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """`state`, checked against the `shape` of one step's input."""
        name, expected = type(self).__name__, (*shape[:-1], self._parts * shape[-1])
        if state is None:
            raise ValueError(f"{name} expects a state; make one with initial_state(batch_size).")
        state = jnp.asarray(state)
        if state.shape != expected:
            raise ValueError(f"{name} expects a state of shape {expected} for input {shape}; got {state.shape}.")
        return state

    def __call__(
        self, x: Num[Array, "B *hidden"], state: Float[Array, "B *hidden"]
    ) -> tuple[Float[Array, "B *hidden"], Float[Array, "B *hidden"]]:
        """One step.

        Args:
            x: real, shape (B, *hidden_shape); any leading axes will do. bool and integers too.
            state: of `initial_state`, or of the step before.

        Returns:
            `(out, state)`: out in the shape of `x`, in its dtype if that is floating point; the state keeps its dtype.

        Raises:
            ValueError: shapes do not fit. TypeError: complex input.
        """
        x, dtype = self._input(x)
        state = self._state(state, x.shape)
        wide = jnp.result_type(x, state)
        out, *new = self._advance(x.astype(wide), jnp.split(state.astype(wide), self._parts, axis=-1))
        return out.astype(dtype), jnp.concatenate(new, axis=-1).astype(state.dtype)


class Spiking(Neuron):
    """A neuron that emits spikes: threshold and spike function, and recurrent weights if it has them."""

    recurrent_w: nnx.Param | None = None

    def __init__(
        self, hidden_shape: Shape, threshold: Threshold, activation: Activation | None, param_dtype: DTypeLike
    ):
        super().__init__(hidden_shape, param_dtype)
        if activation is not None and not callable(activation):
            raise TypeError(f"{type(self).__name__}: activation must be a function of spyx.axn, got {activation!r}")
        if isinstance(threshold, nnx.Variable):
            self._constant("threshold", threshold[...])
        elif not isinstance(threshold, (int, float)):
            threshold = self._constant("threshold", threshold)
        self.threshold = threshold
        self.spike = _superspike if activation is None else activation

    def _init_recurrent(self, precision: Precision, rngs: nnx.Rngs) -> None:
        drawn = _recurrent_init(rngs.params(), self.hidden_shape * 2, jnp.result_type(jnp.float32, self.param_dtype))
        self.recurrent_w = nnx.Param(drawn.astype(self.param_dtype))
        self.precision = precision

    def _theta(self) -> float | Array:
        return self.threshold[...] if isinstance(self.threshold, nnx.Variable) else self.threshold

    def _fire(self, excess: Array) -> Array:
        """Spikes of the membrane potential minus the threshold."""
        spikes = self.spike(excess)
        if not isinstance(spikes, jax.Array):
            raise TypeError(
                f"{type(self).__name__}: activation must map an array to an array, got {type(spikes).__name__}; "
                "the factories of spyx.axn are to be called: activation=axn.superspike()"
            )
        return spikes

    def _receive(self, total: Array, spikes: Array) -> Array:
        """`total` plus the spikes sent back through the recurrent weights."""
        if self.recurrent_w is None:
            return total
        w = self.recurrent_w[...].astype(spikes.dtype)
        return total + jnp.tensordot(spikes, w, axes=len(self.hidden_shape), precision=self.precision)


def clipped(decay: nnx.Param) -> Array:
    """A decay within [0, 1], float32 or wider."""
    value = decay[...]
    return jnp.clip(value.astype(jnp.result_type(jnp.float32, value)), 0, 1)
