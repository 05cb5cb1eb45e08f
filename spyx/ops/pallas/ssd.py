"""What the state-space dual kernels have in common: decays between the steps of a chunk, arguments, checks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MANTISSA_BITS = 23
_SMALLEST_EXPONENT = -100


class Gradients(NamedTuple):
    """Cotangents of x (T,B,H,P), dt (T,B,H), A (H,), B, C (T,B,G,N) and h0 (B,H,P,N), all float32 but dx."""

    x: Float[Array, "T B H P"]
    dt: Float[Array, "T B H"]
    A: Float[Array, " H"]
    B: Float[Array, "T B G N"]
    C: Float[Array, "T B G N"]
    h0: Float[Array, "B H P N"]


class Place(NamedTuple):
    """Where steps are in their chunk: log decay since its start, in two parts, and the number of resets since."""

    high: Array
    low: Array
    segment: Array


START = Place(0.0, 0.0, 0.0)  # type: ignore[arg-type]
"""Before the first step of a chunk."""


def decay(later: Place, earlier: Place, mask: Array | None = None) -> Array:
    """What is left at one step of a state at another: 0 across a reset and where `mask` does not hold."""
    alive = later.segment == earlier.segment
    alive = alive if mask is None else alive & mask
    exponent = (later.high - earlier.high) + (later.low - earlier.low)
    return jnp.where(alive, jnp.exp(exponent), 0.0)


class Steps(NamedTuple):
    """Places (chunks * L, B, H) and dt of the same shape, all float32, padded to whole chunks."""

    place: Place
    dt: Array


def cumulated(dt: Array, A: Array, reset: Array | None, *, chunk: int, reverse: bool) -> Steps:
    """The steps' places in chunks of `chunk`, in scan direction.

    The high part of the cumulative sum of dt A is a multiple of a power of two that makes it exact, so that
    the decay between neighbours is as accurate at the end of a chunk as at its start.
    """
    T, batch, heads = dt.shape
    padding = [(0, -T % chunk), (0, 0), (0, 0)]
    dt = jnp.pad(dt.astype(jnp.float32), padding)
    rate = (dt * A.astype(jnp.float32)).reshape(-1, chunk, batch, heads)
    _, exponent = jnp.frexp(jnp.abs(rate).sum(1, keepdims=True))
    exponent = jnp.maximum(exponent, _SMALLEST_EXPONENT) - _MANTISSA_BITS
    high = jnp.ldexp(jnp.round(jnp.ldexp(rate, -exponent)), exponent)
    sums = jax.lax.cumsum(jnp.stack([high, rate - high]), axis=2, reverse=reverse).reshape(2, *dt.shape)
    if reset is None:
        segment = jnp.zeros_like(dt)
    else:
        counted = jnp.pad(reset.astype(jnp.float32), padding[:2]).reshape(-1, chunk, batch)
        segment = jax.lax.cumsum(counted, axis=1, reverse=reverse).reshape(-1, batch, 1)
        segment = jnp.broadcast_to(segment, dt.shape)
    return Steps(Place(sums[0], sums[1], segment), dt)


class StepSums(NamedTuple):
    """What the cotangents of dt and A consist of, each (chunks * L, B, H), float32.

    `between`, of step t: what all pairs of a step i, not before t, and a step j, before t, contribute.
    `read`, of step i: the contribution of the state at the start of the chunk to y_i (and, at the last step, to
    the state at the end). `kept`, of step j: that of x_j to the state at the end. `dt`: through dt_j x_j alone.
    """

    between: Array
    read: Array
    kept: Array
    dt: Array


def decay_cotangents(sums: StepSums, dt: Array, A: Array, *, chunk: int, reverse: bool) -> tuple[Array, Array]:
    """Cotangents of dt (T, B, H) and A (H,).

    The cotangent of dt_t A is the sum over all that reaches across step t. It is not computed as a difference of
    sums over all that ends after t and all that starts after t, in which most of the digits of A's would be lost.
    """
    T = dt.shape[0]

    def cumulated(v: Array, reverse: bool) -> Array:
        return jax.lax.cumsum(v.reshape(-1, chunk, *v.shape[1:]), axis=1, reverse=reverse)

    kept = cumulated(sums.kept, reverse)
    none = jnp.zeros_like(kept[:, :1])
    kept = jnp.concatenate([kept[:, 1:], none] if reverse else [none, kept[:, :-1]], axis=1)
    drate = sums.between + (cumulated(sums.read, not reverse) + kept).reshape(sums.between.shape)
    drate = drate[:T]
    return sums.dt[:T] + drate * A.astype(jnp.float32), (drate * dt.astype(jnp.float32)).sum((0, 1))


def fits_arguments(x, dt, A, B, C, h0, *, max_width: int, max_state: int) -> bool:
    """Whether a kernel takes these arguments: float32 or bfloat16, not empty, P <= max_width, N <= max_state."""
    dtypes = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    values = (x, dt, A, B, C, h0)
    small = x.shape[-1] <= max_width and B.shape[-1] <= max_state
    return small and all(v.dtype in dtypes for v in values) and all(v.size for v in values)


def check(x, dt, A, B, C, h0, reset, *, max_width: int, max_state: int) -> None:
    """Raise ValueError on shapes that do not agree or are too large, TypeError on a dtype no kernel takes."""
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"x must have shape (T, B, H, P) and B (T, B, G, N), got {x.shape} and {B.shape}")
    T, batch, heads, width = x.shape
    groups, N = B.shape[2:]
    if not groups or heads % groups:
        raise ValueError(f"the groups of B must divide {heads} heads, got {groups}")
    expected = {
        "dt": (dt, (T, batch, heads)), "A": (A, (heads,)), "B": (B, (T, batch, groups, N)),
        "C": (C, (T, batch, groups, N)), "h0": (h0, (batch, heads, width, N)),
    }  # fmt: skip
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    if reset is not None and (reset.shape != (T, batch) or reset.dtype != jnp.bool_):
        raise ValueError(f"reset must be bool of shape {(T, batch)}, got {reset.dtype} {reset.shape}")
    if 0 in (T, batch, heads, width, N) or width > max_width or max_state < N:
        raise ValueError(
            f"the kernel needs nothing empty, P <= {max_width} and N <= {max_state}, got x {x.shape} and B {B.shape}"
        )
    if not fits_arguments(x, dt, A, B, C, h0, max_width=max_width, max_state=max_state):
        raise TypeError("x, dt, A, B, C, h0 must be float32 or bfloat16")
