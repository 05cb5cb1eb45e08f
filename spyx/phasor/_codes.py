"""Real values, phasors, phases and spike times, one from the other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float

from ..ops.dtypes import to_complex, widen


def real_to_phasor(x: ArrayLike, scale: float = math.pi) -> Complex[Array, "..."]:
    """exp(i scale x): real values of any shape as phasors of the same shape.

    Args:
        x: real; [0, 1] fills the upper half circle at the default scale, so that no two values share a phase.
        scale: radians per unit of `x`.

    Returns:
        complex64, or complex128 for float64 input.

    Raises:
        TypeError: complex input.
    """
    return unit(scale * as_real("real_to_phasor", x))


def phasor_to_real(z: Complex[Array, "..."]) -> Float[Array, "..."]:
    """Real part: the cosine of the phase of a unit phasor."""
    return jnp.real(z)


def phase_of(z: Complex[Array, "..."]) -> Float[Array, "..."]:
    """Phase in (-pi, pi], in radians; 0 with gradient 0 where z is 0."""
    z = jnp.where(jnp.abs(z) < 1e-15, z * 2.0**60, z)  # atan2 squares in its gradient, which must not underflow
    return jnp.angle(jnp.where(z == 0, 1, z))


def as_real(name: str, x: ArrayLike) -> Float[Array, "..."]:
    """`x` in float32 or wider; raise if it is complex."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{name} expects real input, got {x.dtype}")
    return widen(x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32))


def unit(theta: Float[Array, "..."]) -> Complex[Array, "..."]:
    return to_complex(jnp.cos(theta), jnp.sin(theta))


def phase_to_spikes(theta: ArrayLike, T: int) -> Float[Array, "T ..."]:
    """One spike for each phase, at tick floor(T (theta + pi) / 2 pi) of a cycle.

    Args:
        theta: phases of any shape in radians, [-pi, pi]; others are taken modulo 2 pi.
        T: ticks of a cycle.

    Returns:
        float32, shape (T, ...): 1 at the tick of the spike, else 0.

    Raises:
        ValueError: T is not a positive integer. TypeError: complex input (`phase_of` gives phases).
    """
    check_sizes("phase_to_spikes", T=T)
    theta = as_real("phase_to_spikes", theta)
    tick = jnp.floor((theta + jnp.pi) / (2 * jnp.pi) * T).astype(jnp.int32)
    tick = jnp.where(jnp.abs(theta) <= jnp.pi, jnp.minimum(tick, T - 1), tick % T)
    return jax.nn.one_hot(tick, T, axis=0, dtype=jnp.float32)


def spikes_to_phase(spikes: ArrayLike, T: int | None = None) -> Float[Array, "..."]:
    """The phase of each unit of a cycle of spikes: the inverse of `phase_to_spikes`.

    A spike stands for the middle of its tick, so the round trip is off by pi / T at most and by 0 on average. (spyx
    1.0.0 takes its beginning, which is off by -pi / T on average, and gives -pi for a unit that never fires.)

    Args:
        spikes: one cycle, shape (T, ...); several spikes of a unit, or graded ones, are averaged.
        T: ticks of the cycle; None is the length of `spikes`.

    Returns:
        Phases (...) in (-pi, pi), radians; 0 where a unit never fires.

    Raises:
        ValueError: `spikes` is not one cycle of T ticks. TypeError: complex input.
    """
    spikes = as_real("spikes_to_phase", spikes)
    if spikes.ndim == 0 or spikes.shape[0] == 0 or T not in (None, spikes.shape[0]):
        raise ValueError(
            f"spikes_to_phase expects one cycle (T, ...) with T={'at least 1' if T is None else T} ticks, "
            f"got shape {spikes.shape}"
        )
    T = spikes.shape[0]
    middle = ((jnp.arange(T) + 0.5) / T * 2 * jnp.pi - jnp.pi).astype(spikes.dtype)
    total = jnp.sum(spikes, axis=0)
    fires = total > 0
    return jnp.where(fires, jnp.tensordot(middle, spikes, 1, precision="highest") / jnp.where(fires, total, 1), 0)


def check_sizes(name: str, **sizes: object) -> None:
    for size, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {size} must be a positive integer, got {value!r}")
