"""Diagonal single-input systems, one per channel: kernel, state, step.

h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) for u (B, H), h (B, H, n), y (B, c, H); A_bar, B_bar are (H, n),
C is (c, H, n).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import bilinear, vandermonde_conv, vandermonde_kernel, zoh
from spyx.ops.dtypes import to_complex

Disc = Literal["zoh", "bilinear", "dss"]
Number = Float[Array, "..."] | Complex[Array, "..."]


class Continuous(NamedTuple):
    """x' = A x + B u, y = 2 Re(C x), sampled every dt; shapes (H, 1) or (H, n), (H, n), (H, n), (c, H, n)."""

    dt: Float[Array, "H *n"]
    A: Number
    B: Number
    C: Number


class Discrete(NamedTuple):
    """The discrete system; exp(log) is A_bar."""

    log: Number
    A: Number
    B: Number
    C: Number


def discretize(system: Continuous, disc: Literal["zoh", "bilinear"]) -> Discrete:
    """The discrete system; its logarithm keeps full relative accuracy for small steps."""
    dt, A, B, C = system
    if disc == "zoh":
        A_bar, gamma = zoh(A, dt)
        return Discrete(dt * A, A_bar, gamma * B, C)
    A_bar, gamma = bilinear(A, dt)
    half = 0.5 * dt * A
    re, im = half.real, half.imag
    size = 0.5 * jnp.log1p(4 * re / ((1 - re) ** 2 + im**2))
    return Discrete(to_complex(size, jnp.arctan2(im, 1 + re) + jnp.arctan2(im, 1 - re)), A_bar, gamma * B, C)


def kernel(system: Continuous, disc: Disc, L: int, precision: jax.lax.PrecisionLike) -> Float[Array, "c H L"]:
    """The convolution kernel of the first L steps."""
    if disc == "dss":
        return _dss_kernel(system, L, precision)
    log_A, _, B, C = discretize(system, disc)
    return vandermonde_kernel(C * B, log_A, L, conj_sym=True, precision=precision)


def outputs(system: Discrete, u: Float[Array, "L B H"], precision: jax.lax.PrecisionLike) -> Float[Array, "L B c H"]:
    """What inputs make of a zero state."""
    return vandermonde_conv(u, system.C * system.B, system.log, conj_sym=True, precision=precision)


def _dss_kernel(system: Continuous, L: int, precision: jax.lax.PrecisionLike) -> Float[Array, "c H L"]:
    """Each mode is normalised to sum 1 over the L steps (DSS, arXiv:2203.14343); growing ones run backwards."""
    dt, A, B, C = system
    z = dt * A
    grows = A.real > 0
    falling = jnp.where(grows, -z, z)
    total = jnp.expm1(L * falling) * A
    share = jnp.expm1(falling) * jnp.conj(total) / (total * jnp.conj(total) + 1e-7)
    weight = C * B * share
    forward = vandermonde_kernel(jnp.where(grows, 0, weight), falling, L, precision=precision)
    backward = vandermonde_kernel(jnp.where(grows, weight, 0), falling, L, precision=precision)
    return forward + backward[..., ::-1]


def free_response(system: Discrete, h: Number, L: int, precision: jax.lax.PrecisionLike) -> Float[Array, "B c H L"]:
    """What the state h (B, H, n) adds to the next L outputs."""
    v = system.C * (system.A * h)[:, None]
    return vandermonde_kernel(v, system.log, L, conj_sym=True, precision=precision)


def final_state(
    system: Discrete,
    u: Float[Array, "B H L"],
    h: Number,
    lengths: Int[Array, " B"] | None,
    precision: jax.lax.PrecisionLike,
) -> Number:
    """The state after `lengths` steps of each row (None: all), from the state h (B, H, n)."""
    L = u.shape[-1]
    steps = jnp.full(u.shape[:1], L) if lengths is None else jnp.clip(lengths, 0, L)
    if L == 0:
        return h
    back = steps[:, None] - 1 - jnp.arange(L)
    latest_first = jnp.take_along_axis(u, jnp.maximum(back, 0)[:, None], axis=-1)
    latest_first = jnp.where((back >= 0)[:, None], latest_first, 0)

    def response(weights):
        return vandermonde_kernel(weights, system.log, L, precision=precision)

    like = jnp.zeros(h.shape, jnp.result_type(h, system.log))
    (forced,) = jax.vjp(response, like)[1](latest_first.astype(like.real.dtype))
    last = _power(system.log, steps[:, None, None]) * h + system.B * forced
    return last if jnp.iscomplexobj(h) else last.real


def _power(log_A: Number, steps: Int[Array, "..."]) -> Number:
    """exp(steps log_A), the phase reduced before it is multiplied."""
    if not jnp.iscomplexobj(log_A):
        return jnp.exp(steps * log_A)
    turns = jnp.round(log_A.imag / (2 * np.pi))
    high, low = _two_pi(log_A.imag.dtype)
    phase = (log_A.imag - turns * high) - turns * low
    size = jnp.exp(steps * log_A.real)
    return to_complex(size * jnp.cos(steps * phase), size * jnp.sin(steps * phase))


def _two_pi(dtype) -> tuple[np.ndarray, np.ndarray]:
    """2 pi as a short number and the rest, so that a few turns of the first are exact."""
    high = np.asarray(6.28125, dtype)
    return high, np.asarray(2 * np.pi - 6.28125, dtype)


def step(system: Discrete, u: Float[Array, "B H"], h: Number) -> tuple[Float[Array, "B c H"], Number]:
    """One step: (y, h)."""
    h = system.A * h + system.B * u[..., None]
    return 2 * read_out(system.C, h), h


def read_out(rows: Number, h: Number, precision: jax.lax.PrecisionLike = "highest") -> Float[Array, "*B c H"]:
    """Re(rows h) for rows (c, H, n) and states (*B, H, n). The sum is a product with ones, faster in XLA on CPU."""
    h = h[..., None, :, :]
    terms = rows.real * h.real - rows.imag * h.imag
    return jnp.dot(terms, jnp.ones(terms.shape[-1], terms.dtype), precision=precision)
