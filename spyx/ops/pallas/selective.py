"""What the selective_scan kernels have in common: discretizations, arguments and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Discretization = Literal["mamba", "zoh", "bilinear", "dirac"]
Pull = Callable[[Array, Array], tuple[Array, Array]]
Discretizer = Callable[[Array, Array], tuple[Array, Array, Pull]]

_SERIES_RADIUS = 0.5
_SERIES_TERMS = 10


class Gradients(NamedTuple):
    """Cotangents of u, dt (T,B,D), A (D,N), B, C (T,B,N) and h0 (B,D,N), all float32 but du and ddt."""

    u: Float[Array, "T B D"]
    dt: Float[Array, "T B D"]
    A: Float[Array, "D N"]
    B: Float[Array, "T B N"]
    C: Float[Array, "T B N"]
    h0: Float[Array, "B D N"]


def discretizer(name: Discretization) -> Discretizer:
    """(dt, A) -> (decay, weight, pull) of h_t = decay h_{t-1} + weight B_t u_t, elementwise.

    `pull` takes the cotangents of decay and weight to those of dt and A. It is `spyx.ops.discretize`
    written with the few operations that both kernel languages have.
    """
    return _DISCRETIZERS[name]


def _mamba(dt, A):
    decay = jnp.exp(dt * A)

    def pull(d_decay, d_weight):
        scaled = d_decay * decay
        return scaled * A + d_weight, scaled * dt

    return decay, dt, pull


def _dirac(dt, A):
    decay = jnp.exp(dt * A)

    def pull(d_decay, d_weight):
        scaled = d_decay * decay
        return scaled * A, scaled * dt

    return decay, jnp.ones_like(dt), pull


def _bilinear(dt, A):
    half = 0.5 * dt * A
    scale = 1.0 / (1.0 - half)

    def pull(d_decay, d_weight):
        square = scale * scale
        return square * (d_decay * A + d_weight), square * dt * (d_decay + 0.5 * dt * d_weight)

    return scale * (1.0 + half), scale * dt, pull


def _zoh(dt, A):
    z = dt * A
    near = jnp.abs(z) < _SERIES_RADIUS
    small, large = jnp.where(near, z, 0.0), jnp.where(near, 1.0, z)
    decay = jnp.exp(z)
    phi = jnp.where(near, _series(small, derivative=False), (jnp.where(near, 1.0, decay) - 1.0) / large)

    def pull(d_decay, d_weight):
        slope = jnp.where(near, _series(small, derivative=True), (jnp.where(near, phi, decay) - phi) / large)
        scaled = d_decay * decay
        return scaled * A + d_weight * decay, dt * (scaled + d_weight * dt * slope)

    return decay, dt * phi, pull


def _series(z: Array, *, derivative: bool) -> Array:
    """sum_k z^k / (k + 1)! = (exp(z) - 1) / z, or its derivative, to float32 accuracy for |z| < 0.5."""
    terms = range(derivative, _SERIES_TERMS)
    coefficients = [(k if derivative else 1) / math.factorial(k + 1) for k in terms]
    total = jnp.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * z + coefficient
    return total


_DISCRETIZERS: dict[str, Discretizer] = {
    "mamba": _mamba, "zoh": _zoh, "bilinear": _bilinear, "dirac": _dirac,
}  # fmt: skip


def fits_arguments(u, dt, A, B, C, h0, *, max_state: int) -> bool:
    """Whether a kernel takes these arguments: float32 or bfloat16, real, not empty, N <= max_state."""
    dtypes = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    values = (u, dt, A, B, C, h0)
    return all(v.dtype in dtypes for v in values) and all(v.size for v in values) and A.shape[1] <= max_state


def check(u, dt, A, B, C, h0, reset, discretization: str, *, max_state: int) -> None:
    """Raise ValueError on shapes that do not agree, TypeError on a dtype no kernel takes."""
    if discretization not in get_args(Discretization):
        raise ValueError(f"discretization must be one of {get_args(Discretization)}, got {discretization!r}")
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must have shape (T, B, D) and A (D, N), got {u.shape} and {A.shape}")
    T, batch, D = u.shape
    N = A.shape[1]
    expected = {
        "dt": (dt, (T, batch, D)), "A": (A, (D, N)), "B": (B, (T, batch, N)),
        "C": (C, (T, batch, N)), "h0": (h0, (batch, D, N)),
    }  # fmt: skip
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    if reset is not None and (reset.shape != (T, batch) or reset.dtype != jnp.bool_):
        raise ValueError(f"reset must be bool of shape {(T, batch)}, got {reset.dtype} {reset.shape}")
    if 0 in (T, batch, D, N) or max_state < N:
        raise ValueError(f"the kernel needs T, B, D, N >= 1 and N <= {max_state}, got {(T, batch, D, N)}")
    if not fits_arguments(u, dt, A, B, C, h0, max_state=max_state):
        raise TypeError("u, dt, A, B, C, h0 must be float32 or bfloat16")


def select(condition: Array, value: Array) -> Array:
    """`value` where the condition does not hold, else 0; the condition may be a scalar."""
    return jax.lax.select(jnp.broadcast_to(condition, value.shape), jnp.zeros_like(value), value)
