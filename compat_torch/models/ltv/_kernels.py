"""When a time-varying layer goes through a compiled kernel of its own."""

from __future__ import annotations

from flax import nnx

from spyx.ops._blocked import MIN_STEPS


def may_fuse(steps: int, *projections: nnx.Linear) -> bool:
    """Whether a kernel may stand for a layer with these projections: they are Flax's own, not quantised ones.

    So few steps that forward-mode differentiation still works (see `spyx.ops.linear_scan`) stay in JAX.
    """
    return steps > MIN_STEPS and all(type(projection) is nnx.Linear for projection in projections)
