"""What the linear_scan kernels have in common: arguments, checks and one step of the recurrence."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Parts = tuple[Float[Array, "..."], ...]
"""(value,) of a real array or (re, im) of a complex one."""


class Flags(NamedTuple):
    """Which recurrence is run; hashable, so it can be a static argument.

    `reverse`: from the last step to the first. `lagged`: the decay multiplies the state after the step,
    h_t = a_{t-1} h_{t-1} + x_t with a_{t-1} of the step before in scan direction and 1 for the first.
    `conj`: the conjugate of a is used. `clears`: where a is exactly 0 the state is dropped rather than
    multiplied, so that a reset lets no NaN through.

    The adjoint of a scan is the scan with `reverse`, `lagged` and `conj` all negated and equal `clears`.
    """

    reverse: bool = False
    lagged: bool = False
    conj: bool = False
    clears: bool = False

    def adjoint(self) -> Flags:
        return Flags(not self.reverse, not self.lagged, not self.conj, self.clears)


FORWARD = Flags()


def fits(a: Parts, x: Parts, h0: Parts) -> bool:
    """Whether the kernels take these arguments: float32 or bfloat16, and nothing empty."""
    dtypes = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    return all(v.dtype in dtypes for v in (*a, *x, *h0)) and math.prod(x[0].shape) > 0


def check(a: Parts, x: Parts, h0: Parts) -> None:
    """Raise ValueError unless shapes and number of parts agree, TypeError on a dtype no kernel takes."""
    if not len(a) == len(x) == len(h0) or len(x) not in (1, 2):
        raise ValueError(f"a, x, h0 must all have 1 or 2 parts, got {len(a)}, {len(x)}, {len(h0)}")
    shape = x[0].shape
    for name, parts, allowed in (
        ("a", a, (shape, shape[1:])), ("x", x, (shape,)), ("h0", h0, (shape[1:],))
    ):  # fmt: skip
        for part in parts:
            if part.shape not in allowed or part.shape != parts[0].shape:
                raise ValueError(f"each part of {name} must have shape {allowed}, got {part.shape}")
    if math.prod(shape) == 0:
        raise ValueError(f"x must not be empty, got shape {shape}")
    if not fits(a, x, h0):
        raise TypeError(f"a, x, h0 must be float32 or bfloat16, got {a[0].dtype}, {x[0].dtype}, {h0[0].dtype}")


def advance(a: Parts, x: Parts, carry: Parts, flags: Flags) -> tuple[Parts, Parts]:
    """One step in float32: (h_t, what is carried to the next step)."""
    a, x = (tuple(part.astype(jnp.float32) for part in parts) for parts in (a, x))
    if flags.lagged:
        h = _add(carry, x)
        return h, _decay(a, h, flags)
    h = _add(_decay(a, carry, flags), x)
    return h, h


def _add(left: Parts, right: Parts) -> Parts:
    return tuple(p + q for p, q in zip(left, right, strict=True))


def _decay(a: Parts, h: Parts, flags: Flags) -> Parts:
    if len(a) == 1:
        out: Parts = (a[0] * h[0],)
    else:
        im = -a[1] if flags.conj else a[1]
        out = (a[0] * h[0] - im * h[1], a[0] * h[1] + im * h[0])
    if flags.clears:
        zero = a[0] == 0 if len(a) == 1 else (a[0] == 0) & (a[1] == 0)
        out = tuple(jax.lax.select(zero, jnp.zeros_like(part), part) for part in out)
    return out
