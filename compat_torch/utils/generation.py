"""A layer that continues a sequence of its own outputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..core.base import LRNN
from ..interop import torch_in_torch_out


@torch_in_torch_out
def generate(
    model: LRNN,
    x: Float[Array, "B H"],
    num_steps: int,
    graph_cache: None = None,
    integration_timesteps: Float[Array, "B 1"] | Float[Array, " B"] | None = None,
) -> Float[Array, "B num_steps H"]:
    """Feed every output back as the next input, from a zero state, in one compiled loop.

    For tokens see `compat_torch.generate`, for a given sequence `compat_torch.decode`.

    Args:
        model: a layer of compat_torch that has a step and keeps its width. In training mode with dropout it raises.
        x: the first input, shape (B, H).
        num_steps: how many outputs.
        graph_cache: must be None: the loop is compiled by `jax.jit`, which replaces CUDA graphs (lrnnx's
            `capture_graph`), once per model class, configuration and shape.
        integration_timesteps: time between the steps, the same for all of them, shape (B, 1) or (B,), for a
            time-varying layer.

    Returns:
        The outputs, shape (B, num_steps, H), in the dtype of a step's output.

    Raises:
        TypeError: `model` is not a layer of compat_torch that has a step.
        ValueError: graph_cache given, wrong rank, num_steps negative, a layer that does not keep the width, and what
            its `step` raises.

    Source: lrnnx 1.0.0 `lrnnx.utils.generation`.
    """
    allocate = getattr(model, "allocate_inference_cache", None)
    if allocate is None or not isinstance(model, LRNN):
        raise TypeError(f"generate expects a layer of compat_torch that has a step, got {type(model).__name__}")
    if graph_cache is not None:
        raise ValueError(
            f"generate: graph_cache must be None, got {type(graph_cache).__name__}: the loop is compiled by jax.jit, "
            "which replaces CUDA graphs"
        )
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"generate: num_steps must be an integer, at least 0, got {num_steps!r}")
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"generate expects a first input (B, H), got shape {x.shape}")
    timesteps = None if integration_timesteps is None else jnp.asarray(integration_timesteps)
    cache = allocate(x.shape[0], max(num_steps, 1))
    y, _ = jax.eval_shape(lambda: model._advance(x, cache, timesteps))
    if y.shape != x.shape:
        raise ValueError(
            f"generate needs a layer that keeps the width: {type(model).__name__} gives {y.shape} for {x.shape}"
        )
    graphdef, variables = nnx.split(model)
    return jnp.swapaxes(_loop(graphdef, variables, x.astype(y.dtype), cache, timesteps, num_steps), 0, 1)


@partial(jax.jit, static_argnums=(0, 5))
def _loop(graphdef: Any, variables: Any, x: Array, cache: Any, timesteps: Array | None, num_steps: int) -> Array:
    def body(carry, _):
        x, cache = carry
        y, after = nnx.merge(graphdef, variables)._advance(x, cache, timesteps)
        y = y.astype(x.dtype)
        return (y, jax.tree.map(lambda new, old: new.astype(old.dtype), after, cache)), y

    return jax.lax.scan(body, (x, jax.tree.map(jnp.asarray, cache)), length=num_steps)[1]
