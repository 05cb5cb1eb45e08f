"""Parameters of S4 and S4D: how positive numbers are stored, and their first values; activations by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Complex, Float

from spyx.ops import hippo

Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]

_FLOOR = 1e-4  # no positive number is stored smaller; "relu" adds it back


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x, not its approximation by tanh."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "id": lambda x: x,
    "identity": lambda x: x,
    "linear": lambda x: x,
    "glu": lambda x: jax.nn.glu(x),
    "gelu": gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}


def activation(name: str | None, x: Float[Array, "*B H"]) -> Float[Array, "*B W"]:
    """The activation of that name; None is the identity."""
    return x if name is None else ACTIVATIONS[name](x)


class Names(nnx.Module):
    """A place for variables and modules under further names."""

    def __init__(self, **members: Any):
        for name, member in members.items():
            setattr(self, name, member)


def positive(stored: Float[Array, "..."], transform: Transform) -> Float[Array, "..."]:
    """The number that a parameter stands for."""
    if transform == "none":
        return stored
    if transform == "relu":
        return jax.nn.relu(stored) + _FLOOR
    return {"exp": jnp.exp, "sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}[transform](stored)


def stored(value: Float[Array, "..."], transform: Transform) -> Float[Array, "..."]:
    """The parameter that stands for a positive number, which is raised to 1e-4 if it is smaller."""
    value = jnp.maximum(jnp.asarray(value), _FLOOR)
    if transform == "exp":
        return jnp.log(value)
    if transform == "sigmoid":
        return jnp.log(value) - jnp.log1p(-value)
    if transform == "softplus":
        return value + jnp.log(-jnp.expm1(-value))
    return value


def check_transform(name: str, transform: str, value: Any) -> None:
    """Raise unless `transform` exists and can store the initial `value` (not looked at while tracing).

    Raises:
        ValueError: it does not, or "sigmoid" for values of 1 and more.
    """
    if transform not in get_args(Transform):
        raise ValueError(f"{name} must be one of {get_args(Transform)}, got {transform!r}")
    if transform == "sigmoid" and not isinstance(value, Tracer) and np.max(value, initial=0.0) >= 1:
        raise ValueError(f'{name}="sigmoid" stores numbers below 1, but the initial values go up to {np.max(value)}')


def initial_dt(
    H: int,
    n: int,
    *,
    dt_min: float,
    dt_max: float,
    dt_tie: bool,
    dt_transform: Transform,
    dt_fast: bool,
    deterministic: bool,
    as_its_own_logarithm: bool,
    key: Array,
) -> Float[Array, "H 1"] | Float[Array, "H n"]:
    """inv_dt as it is stored: steps log-uniform in [dt_min, dt_max], or evenly spaced in the logarithm.

    With `deterministic`, `as_its_own_logarithm` stores the step where its logarithm is meant: steps in
    [exp(dt_min), exp(dt_max)], as the original S4 and lrnnx have it.

    Raises:
        ValueError: not 0 < dt_min <= dt_max, unknown transform, or `deterministic` with another transform than
            "exp" or an untied dt.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")
    check_transform("dt_transform", dt_transform, np.array(dt_max))
    low, high = math.log(dt_min), math.log(dt_max)
    if deterministic:
        if not dt_tie or dt_transform != "exp":
            raise ValueError(
                'deterministic=True needs dt_tie=True and dt_transform="exp", '
                f"got dt_tie={dt_tie}, dt_transform={dt_transform!r}"
            )
        inv_dt = jnp.linspace(low, high, H)[:, None]
        if as_its_own_logarithm:
            inv_dt = jnp.exp(inv_dt)
    else:
        log_dt = jax.random.uniform(key, (H, 1 if dt_tie else n), minval=low, maxval=high)
        inv_dt = log_dt if dt_transform == "exp" else stored(jnp.exp(log_dt), dt_transform)
    return jnp.arcsinh(inv_dt) if dt_fast else inv_dt


def initial_system(
    init: str | Sequence[str],
    N: int,
    rank: int,
    n_ssm: int,
    H: int,
    channels: int,
    *,
    deterministic: bool,
    key: Array,
    **arguments: Any,
) -> tuple[Complex[Array, "S n"], Complex[Array, "r S n"], Complex[Array, "S n"], Complex[Array, "c H n"]]:
    """(A, P, B, C) of the layer, complex.

    Raises:
        ValueError: as `spyx.ops.hippo.combination`, or eigenvalues that are not in the lower left quadrant.
    """
    keys = jax.random.split(key, 2)
    A, P, B, V = hippo.combination(init, N, rank, n_ssm, key=keys[0], **arguments)
    if not isinstance(A, Tracer) and not (np.all(A.real < _FLOOR) and np.all(A.imag <= 0)):
        raise ValueError(f"init={init!r} with {arguments} gives eigenvalues with Re > 0 or Im > 0")
    if deterministic:
        C = jnp.broadcast_to(jnp.tile(V[:, 0], (H // n_ssm, 1)), (channels, H, N // 2))
    else:
        C = jax.random.normal(keys[1], (channels, H, N // 2), complex)
    return A, P, B, C
