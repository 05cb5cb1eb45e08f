"""Discretizations under lrnnx's names; the mathematics is in `spyx.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from spyx.ops import async_, dirac, no_discretization, zoh
from spyx.ops import bilinear as tustin

Discretization = Literal["zoh", "bilinear", "dirac", "no_discretization"]
Reference = Literal["lrnnx", "paper"]

__all__ = ["DISCRETIZE_FNS", "Discretization", "Reference", "async_", "bilinear", "dirac", "no_discretization", "zoh"]


def bilinear(A, delta, integration_timesteps=None, *, reference: Reference = "lrnnx"):
    """Bilinear method with lrnnx's signs, or as published.

    Args:
        A: diagonal of the continuous state matrix, complex or real, shape (N,).
        delta: step sizes, real, shape (N,).
        integration_timesteps: must be None.
        reference: "lrnnx": A_bar = (1 - delta A / 2) / (1 + delta A / 2), gamma_bar = delta / (1 + delta A / 2),
            which is Tustin's method for -A, so that a stable A gives |A_bar| > 1. "paper": `spyx.ops.bilinear`.

    Returns:
        `(A_bar, gamma_bar)`, each of shape (N,).
    """
    return tustin(-A if reference == "lrnnx" else A, delta, integration_timesteps)


DISCRETIZE_FNS: dict[str, Callable[..., Any]] = {
    "zoh": zoh,
    "bilinear": bilinear,
    "dirac": dirac,
    "async": async_,
    "no_discretization": no_discretization,
}
