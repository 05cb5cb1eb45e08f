"""The hand kernels of `spyx.ops.pallas` behind the interface of `_selective_runs`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ._selective_runs import in_blocks
from ._selective_step import Masks, Options, Prepared, Steps, Weights, finish, flat, like, prepare

_CHUNK_STATES = 1024
"""Steps of a kernel's chunk times N, at most: what fits beside the rest in a core's own memory."""


def fits(kernels: ModuleType, o: Options, steps: Steps, weights: Weights, h0) -> bool:
    """Whether `kernels` (`spyx.ops.pallas.tpu` or `.gpu`) take these values, as `forward` would pass them on."""
    A, N = weights.A, weights.A.shape[-2]
    real = not any(jnp.iscomplexobj(v) for v in (A, steps.B, steps.C, h0))
    if A.ndim != 2 or not real or steps.dt_a is not None or o.chunk % 8 or 8 * N > _CHUNK_STATES:
        return False

    def arguments(steps, weights, h0):
        return (*_arguments(prepare(o, steps, weights, None), steps, weights), h0.mT)

    return kernels.selective_scan_fits(*jax.eval_shape(arguments, jax.eval_shape(flat, steps), weights, h0))


def forward(kernels: Any, o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """As `_selective_runs.forward_blocked`."""
    T, *shape = steps.u.shape
    steps, masks = in_blocks(o, steps, masks)
    p = prepare(o, steps, weights, masks.valid)
    y, h, starts = _run(kernels, o, p, steps, weights, masks, h0)
    apart = o.segment // _chunk(o, weights)
    y = finish(y, p.u, steps.z, weights.D, masks.valid, steps.u.dtype)
    return y[:T].reshape(T, *shape), h.mT, starts[apart - 1 if o.reverse else 0 :: apart]


def backward(kernels: Any, o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """As `_selective_runs.backward_blocked`; with a gate z the readout is computed again, and states further apart
    than a kernel's chunk."""
    given = steps
    steps, masks, dy = in_blocks(o, steps, masks, dy)
    p, pull_prepare = jax.vjp(lambda s, w: prepare(o, s, w, masks.valid), steps, weights)
    y = jnp.zeros_like(p.u)
    if steps.z is not None or _chunk(o, weights) < o.segment:
        y, _, starts = _run(kernels, o, p, steps, weights, masks, starts[-1 if o.reverse else 0])
        y = y.astype(p.u.dtype)

    def finished(y, u, z, D):
        return finish(y, u, z, D, masks.valid, steps.u.dtype)

    dy, du_through, dz, dD = jax.vjp(finished, y, p.u, steps.z, weights.D)[1](dy)
    g = kernels.selective_scan_backward(
        *_arguments(p, steps, weights), starts, dy, dh.mT, _reset(masks, p), **_static(o, weights)
    )  # fmt: skip
    du, ddt, db, dc = (d.astype(v.dtype) for d, v in ((g.u, p.u), (g.dt, p.dt), (g.B, p.b), (g.C, p.c)))
    dp = Prepared(du + du_through, ddt, None, db, dc)
    dsteps, dw = pull_prepare(dp)
    dweights = Weights(g.A.T.astype(weights.A.dtype), dD, dw.dt_bias)
    return like(dsteps._replace(z=dz), given), dweights, g.h0.mT


def _run(kernels: Any, o: Options, p: Prepared, steps: Steps, weights: Weights, masks: Masks, h0):
    arguments = _arguments(p, steps, weights)
    return kernels.selective_scan_forward(*arguments, h0.mT, _reset(masks, p), **_static(o, weights))


def _chunk(o: Options, weights: Weights) -> int:
    """Steps between the states that a kernel saves and begins from."""
    most = _CHUNK_STATES // weights.A.shape[-2]
    return o.chunk if o.chunk <= most else 1 << most.bit_length() - 1


def _arguments(p: Prepared, steps: Steps, weights: Weights) -> tuple[Any, ...]:
    """(u, dt, A, B, C) of the kernels: u and dt, B and C in the caller's dtypes where those hold them exactly."""
    b, c = (v.astype(s.dtype) for v, s in ((p.b, steps.B), (p.c, steps.C)))
    return p.u.astype(steps.u.dtype), p.dt, weights.A.T, b, c


def _static(o: Options, weights: Weights) -> dict[str, Any]:
    return {"discretization": o.discretization, "reverse": o.reverse, "chunk": _chunk(o, weights)}


def _reset(masks: Masks, p: Prepared):
    return None if masks.reset is None else jnp.broadcast_to(masks.reset, p.u.shape[:2])
