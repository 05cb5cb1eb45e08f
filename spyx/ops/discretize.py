"""From a continuous diagonal system x' = A x + B u to a discrete one, h_t = A_bar h_{t-1} + gamma_bar B u_t.

Every function takes `(A, delta, integration_timesteps=None)` and returns `(A_bar, gamma_bar)`:

- `A`: diagonal of the state matrix, real or complex, shape (N,) or anything broadcastable.
- `delta`: step size in the time unit of `A`, real, broadcastable against `A`.
- `integration_timesteps`: real, broadcastable against `A`; only `async_` uses it, the others refuse it.

`gamma_bar` is the factor of the input; where it is 1 whatever the system, the float 1.0 is returned.
Value and gradient are finite for A -> 0 and delta -> 0.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

Number = Float[Array, "..."] | Complex[Array, "..."]

_SERIES_RADIUS = 0.5
_SERIES_TERMS = 15


def phi1(z: Number) -> Number:
    """(exp(z) - 1) / z, with its limit 1 at z = 0, accurate in value and gradient for every z.

    Args:
        z: real or complex, any shape.

    Returns:
        Array of the shape and dtype of `z`. Near zero it is the Taylor series sum z^k / (k + 1)!.
    """
    z = jnp.asarray(z)
    near = jnp.abs(jax.lax.stop_gradient(z)) < _SERIES_RADIUS
    small = jnp.where(near, z, 0)
    large = jnp.where(near, 1, z)
    series = jnp.full_like(small, 1 / math.factorial(_SERIES_TERMS))
    for k in range(_SERIES_TERMS - 1, 0, -1):
        series = series * small + 1 / math.factorial(k)
    return jnp.where(near, series, jnp.expm1(large) / large)


def _refuse_timesteps(name: str, integration_timesteps) -> None:
    if integration_timesteps is not None:
        raise ValueError(
            f"{name} has one step size for all steps and cannot use integration_timesteps; "
            "use async_, or a time-varying layer"
        )


def zoh(A: Number, delta: Float[Array, "..."], integration_timesteps=None) -> tuple[Number, Number]:
    """Zero-order hold: A_bar = exp(delta A), gamma_bar = (exp(delta A) - 1) / A.

    Source: S4 (arXiv:2111.00396), S5 (arXiv:2208.04933).

    Raises:
        ValueError: `integration_timesteps` given.
    """
    _refuse_timesteps("zoh", integration_timesteps)
    z = delta * A
    return jnp.exp(z), delta * phi1(z)


def bilinear(A: Number, delta: Float[Array, "..."], integration_timesteps=None) -> tuple[Number, Number]:
    """Tustin's method: A_bar = (1 + delta A / 2) / (1 - delta A / 2), gamma_bar = delta / (1 - delta A / 2).

    Source: S4 (arXiv:2111.00396). |A_bar| <= 1 whenever Re A <= 0.

    Raises:
        ValueError: `integration_timesteps` given.
    """
    _refuse_timesteps("bilinear", integration_timesteps)
    half = 0.5 * delta * A
    scale = 1 / (1 - half)
    return scale * (1 + half), scale * delta


def dirac(A: Number, delta: Float[Array, "..."], integration_timesteps=None) -> tuple[Number, float]:
    """Inputs are impulses: A_bar = exp(delta A), gamma_bar = 1.

    Source: Event-SSM (arXiv:2404.18508).

    Raises:
        ValueError: `integration_timesteps` given.
    """
    _refuse_timesteps("dirac", integration_timesteps)
    return jnp.exp(delta * A), 1.0


def async_(A: Number, delta: Float[Array, "..."], integration_timesteps=None) -> tuple[Number, Number]:
    """Events at uneven times: A_bar = exp(delta integration_timesteps A), gamma_bar = (exp(delta A) - 1) / A.

    `integration_timesteps` is the time since the event before, in units of `delta`; it broadcasts
    against `A`, so that shape (T, B, 1) gives A_bar of shape (T, B, N).

    Source: Event-SSM (arXiv:2404.18508).

    Raises:
        ValueError: `integration_timesteps` missing.
    """
    if integration_timesteps is None:
        raise ValueError("async_ needs integration_timesteps: the time since the event before, got None")
    return jnp.exp(delta * integration_timesteps * A), delta * phi1(delta * A)


def no_discretization(A: Number, delta=None, integration_timesteps=None) -> tuple[Number, float]:
    """The system is discrete already: A_bar = A, gamma_bar = 1; `delta` has no effect.

    Raises:
        ValueError: `integration_timesteps` given.
    """
    _refuse_timesteps("no_discretization", integration_timesteps)
    return A, 1.0
