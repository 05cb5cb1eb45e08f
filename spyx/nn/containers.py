"""Layers in sequence, and the scan of a model over time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Num


@runtime_checkable
class StatefulLayer(Protocol):
    """What `Sequential` and `run` ask of a layer with state; `isinstance` looks for the two methods, no base class.

    A layer that is called with whole sequences (those of `spyx.ssm`) has `step(x_t, state) -> (out, state)` besides,
    which is then what they call.
    """

    def initial_state(self, batch_size: int) -> Any:
        """A zero state for `batch_size` rows: a pytree of arrays with the batch axis first."""
        ...

    def __call__(self, x: Any, state: Any) -> tuple[Any, Any]:
        """One step: `(out, new_state)`, the new state with the structure, shapes and dtypes of `state`."""
        ...


class Sequential(nnx.Sequential):
    """Layers one after the other, one step at a time: `(x_t, state) -> (out, state)`.

    A layer with `initial_state` is stepped: by its `step` if it has one, else by a call with `(x_t, state)`. Any other
    layer or function is called with `x_t`. The state is a list with one entry for each layer, None where it has none.

    Args:
        *layers: modules and functions.
    """

    def initial_state(self, batch_size: int) -> list[Any]:
        """The zero state of every layer for `batch_size` rows, None for a layer without."""
        makers = [getattr(layer, "initial_state", None) for layer in self.layers]
        return [None if maker is None else maker(batch_size) for maker in makers]

    def __call__(self, x: Num[Array, "B ..."], state: Sequence[Any]) -> tuple[Any, list[Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Args:
            x: input of the first layer at this step, batch axis first.
            state: of `initial_state`, or of the step before.

        Returns:
            `(out, state)` of the last layer and of all.

        Raises:
            ValueError: not one state for each layer, or None for a layer that needs one.
        """
        if not isinstance(state, Sequence) or len(state) != len(self.layers):
            got = f"{len(state)} entries" if isinstance(state, Sequence) else type(state).__name__
            raise ValueError(
                f"Sequential expects a list of {len(self.layers)} states, one for each layer, "
                f"as initial_state(batch_size) makes it; got {got}."
            )
        new_state = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, layer_state = _step(layer, x, layer_state)
            new_state.append(layer_state)
        return x, new_state


def _step(layer: Any, x: Any, state: Any) -> tuple[Any, Any]:
    """One step of a layer with or without state."""
    if state is not None:
        return layer.step(x, state) if hasattr(layer, "step") else layer(x, state)
    if hasattr(layer, "initial_state"):
        raise ValueError(f"{type(layer).__name__} expects a state, got None; make one with initial_state(batch_size).")
    return layer(x), None


def run(
    model: Any, x: Num[Array, "T B ..."], state: Any = None, *, batch_major: bool = False
) -> tuple[Num[Array, "T B ..."], Any]:
    """Scan a model over a sequence, one step after the other.

    What a layer keeps beside its parameters (random streams of dropout, running statistics) goes from step to step and
    back into `model`. A layer without reset (`LI`, `PSU_LIF`) alone is quicker by its `parallel`, a layer of `spyx.ssm`
    by a call.

    Args:
        model: `Sequential`, a layer with state, or a module or function `x_t -> out` without state.
        x: inputs, shape (T, B, ...).
        state: before the first step; None is `model.initial_state(B)`, in a dtype that holds `x`.
        batch_major: `x` and the outputs are (B, T, ...) instead.

    Returns:
        `(outputs, state)`: outputs (T, B, ...), and the state after the last step, None for a model without.

    Raises:
        ValueError: `x` has no time and batch axes. TypeError: a step changes the structure, shapes or dtypes of the
            state, or the variables that the model has.
    """
    x, stateful = jnp.asarray(x), hasattr(model, "initial_state")
    if x.ndim < (2 if batch_major or (stateful and state is None) else 1):
        layout = "[B, T, ...]" if batch_major else "[T, B, ...]"
        raise ValueError(f"run expects x {layout}; got shape {x.shape}.")
    if batch_major:
        x = jnp.swapaxes(x, 0, 1)
    if state is None and stateful:
        state = jax.tree.map(lambda leaf: _holding(leaf, x), model.initial_state(x.shape[1]))
    outputs, state = _scan_module(model, x, state) if isinstance(model, nnx.Module) else _scan(model, x, state)
    if batch_major:
        outputs = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), outputs)
    return outputs, state


def _holding(leaf: Array, x: Array) -> Array:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return leaf.astype(jnp.result_type(leaf, x)) if inexact else leaf


def _scan(model: Any, x: Array, state: Any) -> tuple[Any, Any]:
    def body(state, x_t):
        out, state = _step(model, x_t, state)
        return state, out

    state, outputs = jax.lax.scan(body, state, x)
    return outputs, state


def _scan_module(model: nnx.Module, x: Array, state: Any) -> tuple[Any, Any]:
    """`_scan` with the variables that are not parameters in the carry, written back if a step sets any of them."""
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    outputs, state, changed = _scan_split(graphdef, params, others, state, x)
    if changed is not None:
        nnx.update(model, changed)
    return outputs, state


@partial(jax.jit, static_argnums=0)
def _scan_split(graphdef, params, others, state, x):
    """Outputs, state, and `others` after the last step, None if no step sets any; compiled for eager calls."""
    changed = False

    def body(carry, x_t):
        nonlocal changed
        others, state = carry
        before = jax.tree.leaves(others)
        layer = nnx.merge(graphdef, params, others)
        out, state = _step(layer, x_t, state)
        others = nnx.state(layer, nnx.Not(nnx.Param))
        changed = changed or any(old is not new for old, new in zip(before, jax.tree.leaves(others), strict=False))
        return (others, state), out

    (others, state), outputs = jax.lax.scan(body, (others, state), x)
    return outputs, state, others if changed else None
