"""Running a layer step by step, as one compiled loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .core.base import LRNN
from .interop import torch_in_torch_out


@torch_in_torch_out
def decode(
    model: LRNN,
    x: Float[Array, "B L H"],
    inference_cache: Any,
    integration_timesteps: Float[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L H"], Any]:
    """`model.step` over a sequence, compiled once per model class, configuration and shape.

    Args:
        model: any layer of compat_torch that has a step.
        x: inputs in the layout of the layer's forward: (B, L, H), or (B, H, L) for a transposed S4 or S4D.
        inference_cache: from `allocate_inference_cache`, or from a call on a prompt. Not changed.
        integration_timesteps: shape (B, L) or (B, L, 1), of time-varying layers in event mode.

    Returns:
        `(y, cache)`: outputs in the layout of `x`, and the cache after the last step.

    Raises:
        TypeError: `model` is not a layer of compat_torch. ValueError: as its `step` does.
    """
    if not isinstance(model, LRNN):
        raise TypeError(f"decode expects a layer of compat_torch, got {type(model).__name__}")
    axis = model._time_axis
    x = jnp.asarray(x)
    if x.ndim != 3:
        layout = "(B, L, H)" if axis == 1 else "(B, H, L)"
        raise ValueError(f"decode expects inputs {layout} for {type(model).__name__}, got shape {x.shape}")
    timesteps = None
    if integration_timesteps is not None:
        timesteps, shape = jnp.asarray(integration_timesteps), (x.shape[0], x.shape[axis])
        if timesteps.shape not in (shape, (*shape, 1)):
            raise ValueError(
                f"decode: integration_timesteps must have shape (B, L) = {shape} (or a last axis of 1 more), "
                f"got {timesteps.shape}"
            )
        timesteps = timesteps.reshape(shape).T
    graphdef, variables = nnx.split(model)
    y, cache = _decode(graphdef, variables, jnp.moveaxis(x, axis, 0), inference_cache, timesteps)
    return jnp.moveaxis(y, 0, axis), cache


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, variables, x, cache, timesteps):
    def body(cache, inputs):
        y, after = nnx.merge(graphdef, variables)._advance(inputs[0], cache, inputs[1])
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, cache), y

    model = nnx.merge(graphdef, variables)
    cache, y = jax.lax.scan(body, model._compact(jax.tree.map(jnp.asarray, cache)), (x, timesteps))
    return y, model._restored(cache)
