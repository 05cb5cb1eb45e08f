"""The compiled kernels of `spyx.ops.native` behind the interface of `_selective_runs`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._selective_step import Masks, Options, Steps, Weights, saved_states
from .dtypes import float32_of


def fits(o: Options, steps: Steps, weights: Weights, h0) -> bool:
    """Whether the kernels take these values."""
    dtypes = {jnp.result_type(v, jnp.float32) for v in jax.tree.leaves((steps, weights, h0))}
    return not o.conj_sym and dtypes == {jnp.dtype(jnp.float32)}


def forward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """As `_selective_runs.forward_blocked`."""
    from .native import selective
    from .native.custom_call import invoke

    E, _, P = h0.shape
    T = steps.u.shape[0]
    operands, sizes = _operands(o, steps, weights, masks, h0.shape)
    results = [float32_of(steps.u.shape), float32_of(h0.shape), float32_of((saved_states(o, T), *h0.shape))]
    items = E * -(-P // selective.WIDTH)
    y, h, starts = invoke(selective.forward[_which(o, steps)], items, sizes, (*operands, h0), results)
    return y.astype(steps.u.dtype), h, starts


def backward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """As `_selective_runs.backward_blocked`."""
    from .native import selective
    from .native.custom_call import invoke

    E, _, P = dh.shape
    blocks = -(-P // selective.WIDTH)
    operands, sizes = _operands(o, steps, weights, masks, dh.shape)
    wide = [(1,) if v is None else v.shape for v in steps]
    per_row = [dh.shape, (E, P), (E, P), dh.shape]
    operands, results = (*operands, starts, dy.astype(jnp.float32), dh), [*map(float32_of, (*wide, *per_row))]
    *cotangents, dA, dD, dbias, dh0 = invoke(
        selective.backward[_which(o, steps)], E * blocks, sizes, operands, results, counters=E * blocks
    )

    def over_rows(d, like):
        return None if like is None else d.reshape(-1, like.shape[0]).sum(0)

    return (
        Steps(*(None if v is None else d.astype(v.dtype) for d, v in zip(cotangents, steps, strict=True))),
        Weights(dA if weights.A.ndim == 3 else dA.sum(0), over_rows(dD, weights.D), over_rows(dbias, weights.dt_bias)),
        dh0,
    )


def _which(o: Options, steps: Steps) -> tuple[str, bool]:
    return o.discretization, steps.dt_a is not None


def _operands(o: Options, steps: Steps, weights: Weights, masks: Masks, shape):
    """The operands that both kernels share, and the table of sizes."""
    E, N, P = shape
    nothing = jnp.zeros(1, jnp.float32)
    none = jnp.zeros(1, jnp.bool_)

    def wide(v):
        return nothing if v is None else v.astype(jnp.float32)

    given = (steps.u, steps.dt, steps.dt_a, steps.B, steps.C, steps.z, weights.A, weights.D, weights.dt_bias)
    operands = [*map(wide, given), *(none if m is None else m for m in masks)]
    sizes = (
        steps.u.shape[0], E, P, N, o.chunk, o.segment // o.chunk, _groups(E, P, weights, masks),
        weights.A.shape[0] if weights.A.ndim == 3 else 1, o.reverse, o.softplus,
        weights.D is not None, weights.dt_bias is not None, steps.z is not None,
        *(0 if m is None else m.shape[1] for m in masks),
    )  # fmt: skip
    return operands, sizes


def _groups(E: int, P: int, weights: Weights, masks: Masks) -> int:
    """Groups of channels, where a kernel needs to know: with D, dt_bias or valid."""
    if masks.valid is not None:
        return max(1, E // max(1, masks.valid.shape[1]))
    per_channel = [v for v in (weights.D, weights.dt_bias) if v is not None]
    return max(1, per_channel[0].shape[0] // max(1, P)) if per_channel else 1
