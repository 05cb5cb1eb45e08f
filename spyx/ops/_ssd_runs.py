"""The state-space dual scan in plain JAX: step by step, and by matrix products inside chunks.

Values are `(x, dt, A, B, C, h0)` in the layouts of `spyx.ops.ssd`: dt is final (bias, softplus, bounds), A and h0 are
in the dtype of the state, and a step past the end of its row is zero in all of x, dt, B and C. `reset` is bool (T, B)
or None. To put a kernel behind them, match `chunked`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Options(NamedTuple):
    """What is fixed when a scan is traced; `dtype` is that of y."""

    chunk: int
    reverse: bool
    precision: Any
    dtype: Any
    method: str


class Values(NamedTuple):
    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    h0: Array


def sequential(o: Options, values: Values, reset: Array | None) -> tuple[Array, Array]:
    """`(y, last state)`, step by step."""
    x, dt, A, B, C, h = _grouped(values)
    h, y = lax.scan(partial(_step, o, A), h, (x, dt, B, C, reset), reverse=o.reverse)
    return y.reshape(values.x.shape), h.reshape(values.h0.shape)


def chunked(o: Options, values: Values, reset: Array | None) -> tuple[Array, Array]:
    """`(y, last state)`; differentiated, it keeps one state per chunk and computes the rest anew."""
    x, dt, A, B, C, h = _grouped(values)
    T = x.shape[0]
    chunk = min(o.chunk, T)

    def split(v):
        padded = jnp.pad(v, [(0, -T % chunk)] + [(0, 0)] * (v.ndim - 1)) if T % chunk else v
        return padded.reshape(len(padded) // chunk, chunk, *v.shape[1:])

    @jax.checkpoint
    def body(h, inputs):
        h, y = _chunk(o, A, h, _flipped(inputs, o.reverse))
        return h, _flipped(y, o.reverse)

    h, y = lax.scan(body, h, jax.tree.map(split, (x, dt, B, C, reset)), reverse=o.reverse)
    return y.reshape(y.shape[0] * chunk, *values.x.shape[1:])[:T], h.reshape(values.h0.shape)


def one_step(o: Options, values: Values) -> tuple[Array, Array]:
    """`(y, state)` after one step; the values have no time axis."""
    x, dt, A, B, C, h = _grouped(values)
    h, y = _step(o, A, h, (x, dt, B, C, None))
    return y.reshape(values.x.shape), h.reshape(values.h0.shape)


def _grouped(values: Values) -> Values:
    """x (..., B, G, R, P), dt (..., B, G, R), A (G, R), h0 (B, G, R, P, N); R heads per group."""
    groups = values.B.shape[-2]

    def split(v, axis):
        return v.reshape(*v.shape[:axis], groups, v.shape[axis] // groups, *v.shape[v.ndim + axis + 1 :])

    x, dt, A, B, C, h = values
    return Values(split(x, -2), split(dt, -1), split(A, -1), B, C, split(h, -3))


def _flipped(tree, reverse: bool):
    return jax.tree.map(lambda v: v[::-1], tree) if reverse else tree


def _step(o: Options, A: Array, h: Array, inputs):
    x, dt, B, C, reset = inputs
    x, B, C = (v.astype(A.dtype) for v in (x, B, C))
    if reset is not None:
        h = jnp.where(reset[:, None, None, None, None], 0, h)
    h = jnp.exp(dt * A)[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None, None]
    y = jnp.einsum("bgrpn,bgn->bgrp", h, C, precision=o.precision)
    return h, y.astype(o.dtype)


def _chunk(o: Options, A: Array, h: Array, inputs):
    """`_step` for L steps at once: pairs of steps by an (L, L) matrix per head, the state before by its decay."""
    x, dt, B, C, reset = inputs
    x, B, C = (v.astype(A.dtype) for v in (x, B, C))
    dot = partial(jnp.einsum, precision=o.precision)
    rate = dt * A
    step = jnp.arange(rate.shape[0])
    later = (step[:, None] > step)[..., None, None, None]
    between = jnp.cumsum(jnp.where(later, rate[:, None], 0), axis=0)
    reaches = (step[:, None] >= step)[..., None, None, None]
    fresh = None
    if reset is not None:
        count = jnp.cumsum(reset, axis=0)
        reaches = reaches & (count[:, None] == count)[..., None, None]
        fresh = (count == 0)[..., None, None, None]
    decay = jnp.exp(jnp.where(reaches, between, -jnp.inf))
    driven = dt[..., None] * x
    pairs = dot("ibgn,jbgn->ijbg", C, B)[..., None] * decay
    y = dot("ijbgr,jbgrp->ibgrp", pairs, driven)
    since = jnp.exp(jnp.cumsum(rate, axis=0))
    before = since[..., None] * dot("ibgn,bgrpn->ibgrp", C, h)
    kept = since[-1][..., None, None] * h
    if fresh is not None:
        before = jnp.where(fresh, before, 0)
        kept = jnp.where(fresh[-1][..., None], kept, 0)
    h = kept + dot("jbgrp,jbgn->bgrpn", decay[-1][..., None] * driven, B)
    return h, (y + before).astype(o.dtype)
