"""Projections of the blocks that are one compiled kernel each: which of them a kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Affine = tuple[Float[Array, "in out"], Float[Array, " out"] | None]
_MOST_WEIGHTS, _WEIGHTS_PER_ROW = 1 << 20, 1 << 12
"""More do not stay next to a core, or take longer to pack than the products of few rows."""


def fits(x: Float[Array, "T B H"], projections: Sequence[Affine], *others: Any) -> bool:
    """Whether a kernel takes a block of these values, and gains by it."""
    few = sum(matrix.size for matrix, _ in projections) <= min(
        _MOST_WEIGHTS, _WEIGHTS_PER_ROW * x.shape[0] * x.shape[1]
    )
    return few and x.size > 0 and all(v.dtype == jnp.float32 for v in jax.tree.leaves((x, projections, others)))


def biases_of(projections: Sequence[Affine]) -> list[Float[Array, " out"]]:
    """The biases, 0 where there is none."""
    return [jnp.zeros(matrix.shape[1:], jnp.float32) if bias is None else bias for matrix, bias in projections]
