"""Spike functions: a step forward, a surrogate gradient backward.

Every factory returns a compiled function `Array -> Array`, elementwise, for the `activation=` of a neuron of `spyx.nn`.
Its argument is the membrane potential minus the threshold. Slopes and widths are numbers, not traced values. Functions
made of the same parts are equal, and can be copied and pickled if their parts can. Which surrogate to take:
arXiv:1901.09948.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
"""A spike function: elementwise, shape and dtype kept."""


def heaviside(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where x > 0, else 0 (at 0 and NaN too), in the dtype of `x`. Its gradient is zero."""
    return (x > 0).astype(x.dtype)


def _identity(x: Array) -> Array:
    return x


def custom(bwd: Activation = _identity, fwd: Activation = heaviside) -> Activation:
    """A spike function from its value and its surrogate derivative.

    Args:
        bwd: surrogate derivative at x: the incoming gradient is multiplied with `bwd(x)`. The default multiplies with x
            itself, as spyx 1.0.0 does; the straight-through estimator (arXiv:1308.3432) is `bwd=jnp.ones_like`.
        fwd: the value at x.

    Returns:
        The compiled function; reverse-mode differentiation only, to any order that `bwd` has.

    Raises:
        TypeError: `bwd` or `fwd` is not callable.
    """
    for name, function in (("bwd", bwd), ("fwd", fwd)):
        if not callable(function):
            raise TypeError(f"custom: {name} must be a function Array -> Array, got {function!r}")
    return _Spike(bwd, fwd)


@dataclass(frozen=True)
class _Spike:
    """`fwd(x)`, differentiated by `bwd(x, *numbers)`."""

    bwd: Callable[..., Array]
    fwd: Activation = heaviside
    numbers: tuple[float, ...] = ()

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _compiled(self, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spike(parts: _Spike, x: Array) -> Array:
    return parts.fwd(x)


def _spike_fwd(parts: _Spike, x: Array) -> tuple[Array, Array]:
    return parts.fwd(x), x


def _spike_bwd(parts: _Spike, x: Array, g: Array) -> tuple[Array]:
    return ((g * parts.bwd(x, *parts.numbers)).astype(x.dtype),)


_spike.defvjp(_spike_fwd, _spike_bwd)
_compiled = jax.jit(_spike, static_argnums=0)


def tanh(k: float = 1) -> Activation:
    """Derivative sech(k x)^2 = 4 / (exp(k x) + exp(-k x))^2: that of tanh(k x) / k.

    Args:
        k: slope; the larger, the narrower.

    Source: arXiv:1901.09948.
    """
    return _Spike(_tanh, numbers=(k,))


def _tanh(x: Array, k: float) -> Array:
    return 4 * jax.nn.sigmoid(2 * k * x) * jax.nn.sigmoid(-2 * k * x)


def boxcar(width: float = 2, height: float = 0.5) -> Activation:
    """Derivative `height` where |x| < width / 2, else 0.

    Args:
        width: of the whole window around 0.
        height: the derivative inside.

    Source: arXiv:1901.09948.
    """
    return _Spike(_boxcar, numbers=(width, height))


def _boxcar(x: Array, width: float, height: float) -> Array:
    return height * heaviside(width / 2 - jnp.abs(x))


def triangular(k: float = 2) -> Activation:
    """Derivative max(0, 1 - |k x|).

    Args:
        k: inverse half width.

    Source: Esser et al. 2016 (arXiv:1603.08270).
    """
    return _Spike(_triangular, numbers=(k,))


def _triangular(x: Array, k: float) -> Array:
    return jnp.maximum(0, 1 - jnp.abs(k * x))


def arctan(k: float = 2) -> Activation:
    """Derivative 1 / (pi (1 + (pi k x)^2)): that of arctan(pi k x) / (pi^2 k).

    Args:
        k: slope; the larger, the narrower.

    Source: Fang et al. 2021 (arXiv:2007.05785), scaled by 1 / pi as in spyx 1.0.0.
    """
    return _Spike(_arctan, numbers=(k,))


def _arctan(x: Array, k: float) -> Array:
    return 1 / (jnp.pi * (1 + (jnp.pi * k * x) ** 2))


def superspike(k: float = 25) -> Activation:
    """Derivative 1 / (1 + k |x|)^2: that of the fast sigmoid x / (1 + k |x|). The neurons' default.

    Args:
        k: slope; the larger, the narrower.

    Source: SuperSpike, Zenke and Ganguli 2018 (arXiv:1705.11146).
    """
    return _Spike(_superspike, numbers=(k,))


def _superspike(x: Array, k: float) -> Array:
    return 1 / (1 + k * jnp.abs(x)) ** 2
