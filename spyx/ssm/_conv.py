"""The causal depthwise convolution of a Mamba block, on the parameters of an `nnx.Conv`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..ops import causal_conv1d, causal_conv1d_update
from ._layer import Lengths, Reset

Inputs = Float[Array, "B D K"]


def depthwise_conv(
    conv: nnx.Conv, x: Float[Array, "T B D"], conv_state: Inputs | None, lengths: Lengths, reset: Reset
) -> tuple[Float[Array, "T B D"], Inputs]:
    """silu(conv(x)) over a whole sequence, and the last K inputs; arguments as in `causal_conv1d`.

    XLA's depthwise convolution takes 7 to 17 times as long on a CPU, so `conv` is only called, on the window of
    each step, where that call is what quantises it.
    """
    if not _intercepted(conv):
        return causal_conv1d(
            x, *_weights(conv), conv_state, activation="silu", lengths=lengths, reset=reset, return_state=True
        )
    (T, B, D), K = x.shape, conv.kernel_shape[0]
    if conv_state is None:
        conv_state = jnp.zeros((B, D, K), x.dtype)
    if T == 0:
        return x, conv_state
    windows = _windows(x, conv_state, reset)
    y = jax.nn.silu(conv(windows.mT.reshape(T * B, K, D))).reshape(x.shape).astype(x.dtype)
    if lengths is None:
        return y, windows[-1]
    last = jnp.concatenate([conv_state[None].astype(windows.dtype), windows])[lengths, jnp.arange(B)]
    return y, last


def depthwise_conv_step(
    conv: nnx.Conv, x: Float[Array, "B D"], conv_state: Inputs
) -> tuple[Float[Array, "B D"], Inputs]:
    """One step of `depthwise_conv`: `(y, conv_state)`; the state keeps its dtype."""
    if not _intercepted(conv):
        y, state = causal_conv1d_update(x, conv_state, *_weights(conv), activation="silu")
        return y, state.astype(conv_state.dtype)
    y, state = depthwise_conv(conv, x[None], conv_state, None, None)
    return y[0], state.astype(conv_state.dtype)


def _intercepted(conv: nnx.Conv) -> bool:
    """Whether the module belongs to a model quantised by qwix, which gives each of its modules this attribute."""
    return hasattr(conv, "qwix_path")


def _weights(conv: nnx.Conv) -> tuple[Float[Array, "D K"], Float[Array, " D"] | None]:
    return conv.kernel[...][:, 0].T, None if conv.bias is None else conv.bias[...]


def _windows(x: Float[Array, "T B D"], conv_state: Inputs, reset: Reset) -> Float[Array, "T B D K"]:
    """The last K inputs after every step."""

    def step(inputs, xs):
        x_t, reset_t = xs
        if reset_t is not None:
            inputs = jnp.where(reset_t.reshape(-1, 1, 1), 0, inputs)
        inputs = jnp.concatenate([inputs[..., 1:], x_t[..., None]], axis=-1)
        return inputs, inputs

    common = jnp.result_type(x, conv_state)
    return jax.lax.scan(step, conv_state.astype(common), (x.astype(common), reset))[1]
