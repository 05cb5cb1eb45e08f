"""Flax's dense layers with torch's initial values; rows of an embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def symmetric_uniform(bound: float) -> jax.nn.initializers.Initializer:
    """Uniform in [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    param_dtype: DTypeLike,
    precision: Any,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """`torch.nn.Linear(in_features, out_features, bias)`: weight and bias uniform within 1 / sqrt(in_features)."""
    init = symmetric_uniform(in_features**-0.5)
    return nnx.Linear(
        in_features, out_features, use_bias=bias, kernel_init=init, bias_init=init,
        param_dtype=param_dtype, precision=precision, rngs=rngs,
    )  # fmt: skip


def depthwise_conv(
    channels: int,
    width: int,
    *,
    bias: bool = True,
    param_dtype: DTypeLike,
    precision: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """The parameters of `torch.nn.Conv1d(channels, channels, width, groups=channels)`; see `taps`."""
    init = symmetric_uniform(width**-0.5)
    return nnx.Conv(
        channels, channels, (width,), feature_group_count=channels, padding="CAUSAL", use_bias=bias,
        kernel_init=init, bias_init=init, param_dtype=param_dtype, precision=precision, rngs=rngs,
    )  # fmt: skip


def taps(conv: nnx.Conv) -> tuple[jax.Array, jax.Array | None]:
    """(weight (D, K), bias (D,) or None) of a depthwise convolution, as `spyx.ops.causal_conv1d` takes them."""
    return conv.kernel[:, 0].T, None if conv.bias is None else conv.bias[...]


def bias_of(layer: nnx.Linear | nnx.Conv) -> nnx.Param:
    """The bias of a layer that has one.

    Raises:
        ValueError: it has none.
    """
    if layer.bias is None:
        raise ValueError(f"{type(layer).__name__} has no bias")
    return layer.bias


def look_up(table: Float[Array, "V E"], ids: Int[Array, "*L"]) -> Float[Array, "*L E"]:
    """The rows of an embedding, NaN for an id outside of it."""
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))  # one byte may not hold V
    return jnp.take(table, jnp.where(ids < 0, table.shape[0], ids), axis=0, mode="fill", fill_value=jnp.nan)
