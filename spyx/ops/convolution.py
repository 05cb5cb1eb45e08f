"""Causal convolutions along time: short depthwise ones with a state, and long ones by FFT."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .dtypes import state_dtype
from .scan import check_lengths, check_reset, valid_steps

Activation = Literal["silu"]


def causal_conv1d(
    x: Float[Array, "T B D"],
    weight: Float[Array, "D K"],
    bias: Float[Array, " D"] | None = None,
    conv_state: Float[Array, "B D K"] | None = None,
    *,
    activation: Activation | None = None,
    lengths: Int[Array, " B"] | None = None,
    reset: Bool[Array, "T *B"] | None = None,
    return_state: bool = False,
):
    """y_t = activation(bias + sum_k weight[:, k] x_{t - K + 1 + k}), each channel on its own.

    Args:
        x: input, shape (T, B, D), any T, also T < K.
        weight: taps, shape (D, K); the last one multiplies the newest input.
        bias: shape (D,); None is 0.
        conv_state: the last K inputs, oldest first, shape (B, D, K); None is 0. (The oldest column is not
            read: it has left the window by the first step.)
        activation: "silu" or None.
        lengths: int, shape (B,): number of valid steps of each row. y is 0 past them, the padding (even NaN)
            reaches neither values nor gradients, and the state is that of the last valid step.
        reset: bool, shape (T,) or (T, B): where true, inputs before that step count as 0 from there on.
        return_state: also return the new `conv_state`.

    Returns:
        y of shape (T, B, D) in the dtype of `x`, computed in float32 or wider; with `return_state`,
        `(y, conv_state)`, the state in the common dtype of `x` and the `conv_state` given. Reverse-mode
        differentiable to any order; the backward pass keeps the arguments only.

    Raises:
        ValueError: shapes do not fit, or unknown `activation`.
        TypeError: values are not real floating point, `reset` is not bool, `lengths` not integer.

    Source: Mamba (arXiv:2312.00752).
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    bias = None if bias is None else jnp.asarray(bias)
    conv_state = None if conv_state is None else jnp.asarray(conv_state)
    reset = None if reset is None else jnp.asarray(reset)
    lengths = None if lengths is None else jnp.asarray(lengths)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (T, B, D), got {x.shape}")
    _check_conv1d(x, weight, bias, conv_state, activation)
    if reset is not None:
        check_reset(reset, x.shape[:2])
    if lengths is not None:
        check_lengths(lengths, x.shape)
    y, state = _causal_conv1d(x, weight, bias, conv_state, lengths, reset, activation=activation)
    return (y, state) if return_state else y


def causal_conv1d_update(
    x: Float[Array, "B D"],
    conv_state: Float[Array, "B D K"],
    weight: Float[Array, "D K"],
    bias: Float[Array, " D"] | None = None,
    *,
    activation: Activation | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D K"]]:
    """One step of `causal_conv1d`: `(y, conv_state)` from one input (B, D) and the last K inputs (B, D, K).

    Arguments, dtypes and errors are those of `causal_conv1d`, without the time axis.
    """
    x, conv_state, weight = jnp.asarray(x), jnp.asarray(conv_state), jnp.asarray(weight)
    bias = None if bias is None else jnp.asarray(bias)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, D), got {x.shape}")
    _check_conv1d(x, weight, bias, conv_state, activation)
    return _update(x, conv_state, weight, bias, activation=activation)


def _check_conv1d(x, weight, bias, conv_state, activation) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be None or one of {get_args(Activation)}, got {activation!r}")
    B, D = x.shape[-2:]
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape ({D}, K), K >= 1, for x of shape {x.shape}, got {weight.shape}")
    wanted = (("bias", bias, (D,)), ("conv_state", conv_state, (B, D, weight.shape[1])))
    for name, value, shape in wanted:
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for x of shape {x.shape}, got {value.shape}")
    _check_real(("x", x), ("weight", weight), ("bias", bias), ("conv_state", conv_state))


def _check_real(*named) -> None:
    for name, value in named:
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be real floating point, got {value.dtype}")


@partial(jax.jit, static_argnames=("activation",))
def _causal_conv1d(x, weight, bias, conv_state, lengths, reset, *, activation):
    (T, B, D), K = x.shape, weight.shape[1]
    if conv_state is None:
        conv_state = jnp.zeros((B, D, K), x.dtype)
    common = jnp.result_type(x, conv_state)
    history = jnp.moveaxis(conv_state, -1, 0)
    if T == 0 or B == 0:
        return x, conv_state.astype(common)
    oldest = None if reset is None else _oldest_visible(reset, lengths)
    y = _conv1d(x, history, weight, bias, lengths, oldest, activation)
    inputs = jnp.concatenate([history.astype(common), x.astype(common)])
    if lengths is None:
        state = inputs[T:]
    else:
        rows = jnp.clip(lengths, 0, T) + jnp.arange(K)[:, None]
        state = jnp.take_along_axis(inputs, rows[..., None], axis=0)
    if oldest is not None:
        end = jnp.full((B,), T) if lengths is None else jnp.clip(lengths, 0, T)
        times = end - K + jnp.arange(K)[:, None]
        state = jnp.where((times < oldest[-1])[..., None], 0, state)
    return y, jnp.moveaxis(state, 0, -1)


def _oldest_visible(reset, lengths):
    """Index of the last valid reset up to each step, shape (T, B or 1); far in the past before the first."""
    reset = reset.reshape(reset.shape[0], -1)
    if lengths is not None:
        reset = reset & (jnp.arange(reset.shape[0])[:, None] < lengths)
    steps = jnp.arange(reset.shape[0], dtype=jnp.int32)[:, None]
    return jax.lax.cummax(jnp.where(reset, steps, jnp.iinfo(jnp.int32).min))


def _visible(oldest, lag):
    """Whether step t sees the input of step t - lag, shape (T, B or 1, 1)."""
    steps = jnp.arange(oldest.shape[0], dtype=jnp.int32)[:, None]
    return (steps - lag >= oldest)[..., None]


def _window(x, history, lengths, dtype):
    """The inputs that the taps see, shape (K - 1 + T, B, D)."""
    x = x.astype(dtype)
    if lengths is not None:
        x = jnp.where(valid_steps(lengths, x.shape[0], x.ndim), x, 0)
    return jnp.concatenate([history[1:].astype(dtype), x])


def _tap(window, oldest, k, K, T):
    tap = window[k : k + T]
    return tap if oldest is None else jnp.where(_visible(oldest, K - 1 - k), tap, 0)


def _pre_activation(window, weight, bias, oldest, dtype):
    K = weight.shape[1]
    T = window.shape[0] - K + 1
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for k in range(K):
        y = y + weight[:, k].astype(dtype) * _tap(window, oldest, k, K, T)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _conv1d(x, history, weight, bias, lengths, oldest, activation):
    dtype = state_dtype(x, history, weight, bias)
    y = _pre_activation(_window(x, history, lengths, dtype), weight, bias, oldest, dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    if lengths is not None:
        y = jnp.where(valid_steps(lengths, x.shape[0], x.ndim), y, 0)
    return y.astype(x.dtype)


def _conv1d_forward(x, history, weight, bias, lengths, oldest, activation):
    y = _conv1d(x, history, weight, bias, lengths, oldest, activation)
    return y, (x, history, weight, bias, lengths, oldest)


def _conv1d_backward(activation, arguments, dy):
    x, history, weight, bias, lengths, oldest = arguments
    dtype = state_dtype(x, history, weight, bias)
    T, K = x.shape[0], weight.shape[1]
    window = _window(x, history, lengths, dtype)
    g = dy.astype(dtype)
    if lengths is not None:
        g = jnp.where(valid_steps(lengths, T, x.ndim), g, 0)
    if activation == "silu":
        y = _pre_activation(window, weight, bias, oldest, dtype)
        s = jax.nn.sigmoid(y)
        g = g * (s * (1 + y * (1 - s)))
    d_weight = jnp.stack([jnp.sum(g * _tap(window, oldest, k, K, T), (0, 1)) for k in range(K)], axis=-1)
    d_bias = None if bias is None else jnp.sum(g, (0, 1)).astype(bias.dtype)
    edge = jnp.zeros((K - 1, *g.shape[1:]), dtype)
    padded = jnp.concatenate([edge, g, edge])
    d_window = jnp.zeros((), dtype)
    for k in range(K):
        part = padded[K - 1 - k : T + 2 * (K - 1) - k]
        if oldest is not None:
            seen = jnp.pad(_visible(oldest, K - 1 - k), ((k, K - 1 - k), (0, 0), (0, 0)))
            part = jnp.where(seen, part, 0)
        d_window = d_window + weight[:, k].astype(dtype) * part
    d_x = d_window[K - 1 :]
    if lengths is not None:
        d_x = jnp.where(valid_steps(lengths, T, x.ndim), d_x, 0)
    d_history = jnp.concatenate([jnp.zeros_like(d_window[:1]), d_window[: K - 1]])
    return (
        d_x.astype(x.dtype), d_history.astype(history.dtype), d_weight.astype(weight.dtype), d_bias, None, None
    )  # fmt: skip


_conv1d.defvjp(_conv1d_forward, _conv1d_backward)


@partial(jax.jit, static_argnames=("activation",))
def _update(x, conv_state, weight, bias, *, activation):
    common = jnp.result_type(x, conv_state)
    dtype = state_dtype(x, conv_state, weight, bias)
    state = jnp.concatenate([conv_state[..., 1:].astype(common), x[..., None].astype(common)], axis=-1)
    y = jnp.sum(state.astype(dtype) * weight.astype(dtype), axis=-1)
    if bias is not None:
        y = y + bias.astype(dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), state


def fft_conv(
    x: Float[Array, "T B H"], k: Float[Array, "L H"] | Float[Array, "L C H"]
) -> Float[Array, "T B H"] | Float[Array, "T B C H"]:
    """Causal linear convolution y_t = sum_{s <= t} k_s x_{t - s}, each channel on its own, by FFT.

    Args:
        x: input, shape (T, B, H).
        k: kernel, shape (L, H), or (L, C, H) for C outputs of every channel. L and T are independent:
            terms past the end of the kernel are 0, those past T are not used.

    Returns:
        y of shape (T, B, H) or (T, B, C, H) in the dtype of `x`, computed in float32 or wider. Sequences are
        padded with zeros, so nothing wraps around. The rounding error is that of the FFT: relative to
        the norms of `x` and `k`. Reverse-mode differentiable to any order; the backward pass keeps `x`
        and `k`, no spectra.

    Raises:
        ValueError: shapes do not fit. TypeError: values are not real floating point.

    Source: S4 (arXiv:2111.00396).
    """
    x, k = jnp.asarray(x), jnp.asarray(k)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (T, B, H), got {x.shape}")
    if k.ndim not in (2, 3) or k.shape[-1] != x.shape[-1]:
        H = x.shape[-1]
        raise ValueError(f"k must have shape (L, {H}) or (L, C, {H}) for x of shape {x.shape}, got {k.shape}")
    _check_real(("x", x), ("k", k))
    y = _fft_conv(x, k if k.ndim == 3 else k[:, None])
    return y if k.ndim == 3 else y[:, :, 0]


def _fast_length(n: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least n."""
    best = 2 ** max(1, (n - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            twos = 2 ** max(1, (-(-n // three) - 1).bit_length())
            best = min(best, twos * three)
            three *= 3
        five *= 5
    return best


def _spectrum(values, n, dtype):
    """Values (T, ...) padded to n steps, and their spectrum (..., n // 2 + 1)."""
    return jnp.fft.rfft(jnp.moveaxis(values.astype(dtype), 0, -1), n)


def _series(spectrum, n, steps, dtype):
    """The first `steps` of the n values that have this spectrum, shape (steps, ...)."""
    return jnp.moveaxis(jnp.fft.irfft(spectrum, n)[..., :steps], -1, 0).astype(dtype)


def _sizes(x, k):
    L = min(k.shape[0], x.shape[0])
    return L, _fast_length(x.shape[0] + L - 1), state_dtype(x, k)


@jax.jit
def _fft_conv(x, k):
    if 0 in (*x.shape, *k.shape):
        return jnp.zeros((*x.shape[:2], *k.shape[1:]), x.dtype)
    return _convolve(x, k)


def plain_fft_conv(x, k):
    """`fft_conv` without the hand-written backward pass, differentiable in every mode; k (L, C, H), nothing empty."""
    L, n, dtype = _sizes(x, k)
    product = _spectrum(x, n, dtype)[:, None] * _spectrum(k[:L], n, dtype)
    return _series(product, n, x.shape[0], x.dtype)


@jax.custom_vjp
def _convolve(x, k):
    return plain_fft_conv(x, k)


def _convolve_forward(x, k):
    return _convolve(x, k), (x, k)


def _convolve_backward(arguments, dy):
    x, k = arguments
    L, n, dtype = _sizes(x, k)
    d = _spectrum(dy, n, dtype)
    d_x = jnp.sum(d * _spectrum(k[:L], n, dtype).conj(), axis=1)
    d_k = jnp.sum(d * _spectrum(x, n, dtype).conj()[:, None], axis=0)
    d_k = jnp.pad(_series(d_k, n, L, k.dtype), ((0, k.shape[0] - L), (0, 0), (0, 0)))
    return _series(d_x, n, x.shape[0], x.dtype), d_k


_convolve.defvjp(_convolve_forward, _convolve_backward)
