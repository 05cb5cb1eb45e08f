"""The selective scan over all steps: forward and backward, in each method, as pure functions.

Symbols and layouts are those of `_selective_step`; T need not be a multiple of any size.
To put a kernel behind them, match `forward_blocked` and `backward_blocked`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ._selective_step import (
    Masks,
    Options,
    Steps,
    Weights,
    adjoint_step,
    advance,
    as_like,
    cleared,
    drive,
    finish,
    flat,
    like,
    one_step,
    over_channels,
    padding,
    prepare,
    read_out,
    transition,
)


def sequential(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """`(y, last state)`, step by step; y in the shape of u."""
    h, y = lax.scan(partial(one_step, o, weights), h0, (flat(steps), masks), reverse=o.reverse)
    return y.reshape(steps.u.shape), h


def split_time(tree, size: int):
    return jax.tree.map(lambda v: v.reshape(v.shape[0] // size, size, *v.shape[1:]), tree)


def merge_time(tree):
    return jax.tree.map(lambda v: v.reshape(v.shape[0] * v.shape[1], *v.shape[2:]), tree)


def in_blocks(o: Options, steps: Steps, masks: Masks, *others):
    """Flat arguments, with steps that do nothing at the end for whole blocks and segments."""
    T = steps.u.shape[0]
    steps, others, missing = flat(steps), [v.reshape(T, -1) for v in others], padding(o, T)
    if not missing:
        return steps, masks, *others

    def pad(v):
        return jnp.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1))

    valid = jnp.ones((T, 1), bool) if masks.valid is None else masks.valid
    return jax.tree.map(pad, (steps, masks._replace(valid=valid), *others))


def forward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """`(y, last state, starts)`: starts (segments, E, N, P) are the states before each, in scan direction."""

    def chunk(h, x):
        return lax.scan(partial(one_step, o, weights), h, x, reverse=o.reverse)

    T, *shape = steps.u.shape
    y, h, starts = _over_segments(o, chunk, o.chunk, h0, in_blocks(o, steps, masks))
    return y[:T].reshape(T, *shape), h, starts


def _over_segments(o: Options, run, size: int, h0, xs):
    """`(y, last state, state before each segment)` of run(h, xs) -> (last, y), in pieces of `size` steps."""

    @jax.checkpoint
    def segment(h, xs):
        last, y = _in_pieces(o, run, size, h, xs)
        return last, (y, h)

    h, (y, starts) = lax.scan(segment, h0, split_time(xs, o.segment), reverse=o.reverse)
    return merge_time(y), h, starts


def _in_pieces(o: Options, run, size: int, h, xs):
    """run(h, xs) of a segment; derivatives hold what it computes for one piece at a time."""
    if size >= o.segment:
        return run(h, xs)
    h, y = lax.scan(jax.checkpoint(run), h, split_time(xs, size), reverse=o.reverse)
    return h, merge_time(y)


def backward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """Cotangents of (steps, weights, h0) from those of y and of the last state.

    Chunk by chunk, against the direction of the scan: states of the chunk from the one before it, then the adjoint
    recurrence dh_{t-1} = A_bar_t (dh_t + c_t dy_t). A segment of many chunks is run through for their first states.
    """
    A, K, given = weights.A, o.chunk, steps
    steps, masks, dy = in_blocks(o, steps, masks, dy)
    index = jnp.arange(K)
    after, before = (0, 1) if o.reverse else (1, 0)

    def chunk(carry, x):
        dh, dweights, buffer = carry
        (steps, mask), start, dy = x
        p, pull_prepare = jax.vjp(lambda s, w: prepare(o, s, w, mask.valid), steps, weights)
        buffer = buffer.at[K if o.reverse else 0].set(start)

        def finished(y, u, z, D):
            return finish(y, u, z, D, mask.valid, steps.u.dtype)

        dout = dy
        dy, du_through, _, dD = jax.vjp(finished, jnp.zeros_like(p.u), p.u, steps.z, weights.D)[1](dout)

        def recompute(carry, x):
            h, buffer = carry
            i, p, dy, reset = x
            h = advance(o, A, h, p, reset)
            y = None if steps.z is None else read_out(h, p.c)
            dc = as_like(over_channels(h, dy), p.c)
            return (h, lax.dynamic_update_index_in_dim(buffer, h, i + after, 0)), (y, dc)

        xs = (index, p, dy, mask.reset)
        (_, buffer), (y, dc) = lax.scan(recompute, (start, buffer), xs, reverse=o.reverse)
        dz = None
        if steps.z is not None:
            dz = jax.vjp(lambda z: finished(y, p.u, z, weights.D), steps.z)[1](dout)[0]

        def adjoint(carry, x):
            i, p, dy, reset = x
            a = transition(o, p, A)
            h = cleared(lax.dynamic_index_in_dim(buffer, i + before, 0, keepdims=False), reset)
            dh, dA = carry
            dh, dA, dp = adjoint_step(o, A, p, a, h, dh, dA, dy)
            return (cleared(dh, reset), dA), dp

        (dh, dA), dp = lax.scan(adjoint, (dh, dweights[0]), xs, reverse=not o.reverse)
        dp = dp._replace(u=dp.u + du_through, c=dc)
        dsteps, dw = pull_prepare(dp)
        dsteps = dsteps._replace(z=dz)
        add = partial(jax.tree.map, jnp.add)
        return (dh, (dA, add(dweights[1], dD), add(dweights[2], dw.dt_bias)), buffer), dsteps

    def skim(h, xs):
        return lax.scan(lambda h, x: (one_step(o, weights, h, x)[0], None), h, xs, reverse=o.reverse)[0], h

    def segment(carry, x):
        xs, start, dy = x
        xs = split_time(xs, K)
        starts = start[None] if o.segment == K else lax.scan(skim, start, xs, reverse=o.reverse)[1]
        carry, dsteps = lax.scan(chunk, carry, (xs, starts, split_time(dy, K)), reverse=not o.reverse)
        return carry, merge_time(dsteps)

    zeros = partial(jax.tree.map, jnp.zeros_like)
    buffer = jnp.zeros((K + 1, *dh.shape), dh.dtype)
    carry = (dh, (zeros(dh), zeros(weights.D), zeros(weights.dt_bias)), buffer)
    xs = (split_time((steps, masks), o.segment), starts, split_time(dy, o.segment))
    (dh, (dA, dD, dbias), _), dsteps = lax.scan(segment, carry, xs, reverse=not o.reverse)
    return like(merge_time(dsteps), given), Weights(dA if A.ndim == 3 else dA.sum(0), dD, dbias), dh


def parallel_block(o: Options, weights: Weights, h, x):
    """`(last state, (y, states before each chunk))` of one block, its states by parallel prefix."""
    steps, mask = x
    p = prepare(o, steps, weights, mask.valid)
    a = transition(o, p, weights.A)
    x = drive(o, p, weights.A, a)
    first, last = (-1, 0) if o.reverse else (0, -1)
    reset = jnp.zeros((x.shape[0], 1), bool) if mask.reset is None else mask.reset
    x = x.at[first].add(a[first] * cleared(h, reset[first]))

    def combine(left, right):
        keep = jnp.where(right[2], 0, left[1])
        return left[0] * right[0], right[0] * keep + right[1], left[2] | right[2]

    flags = jnp.broadcast_to(reset[..., None, None], (*x.shape[:2], 1, 1))
    _, states, _ = lax.associative_scan(combine, (a, x, flags), reverse=o.reverse)
    y = jnp.einsum("kenp,ken->kep", states, p.c, precision=lax.Precision.HIGHEST).real
    y = finish(y, p.u, steps.z, weights.D, mask.valid, steps.u.dtype)
    K = o.chunk
    kept = (states[K::K], h[None]) if o.reverse else (h[None], states[K - 1 : -1 : K])
    return states[last], (y, jnp.concatenate(kept))


def _parallel(o: Options, weights: Weights, h, x):
    h, (y, _) = parallel_block(o, weights, h, x)
    return h, y


def forward_associative(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """As `forward_blocked`, in parallel inside blocks of `o.block` steps: (block, E, N, P) at a time."""
    T, *shape = steps.u.shape
    xs = in_blocks(o, steps, masks)
    if o.segment < o.block:
        block = jax.checkpoint(partial(parallel_block, o, weights))
        h, (y, starts) = lax.scan(block, h0, split_time(xs, o.block), reverse=o.reverse)
        y, starts = merge_time((y, starts))
    else:
        y, h, starts = _over_segments(o, partial(_parallel, o, weights), o.block, h0, xs)
    return y[:T].reshape(T, *shape), h, starts


def backward_associative(o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """As `backward_blocked`, in parallel inside blocks."""
    given, size = steps, max(o.block, o.segment)
    steps, masks, dy = in_blocks(o, steps, masks, dy)

    def segment(carry, x):
        dh, dweights = carry
        (steps, mask), start, dy = x

        def run(steps, weights, h):
            h, y = _in_pieces(o, partial(_parallel, o, weights), o.block, h, (steps, mask))
            return y, h

        dsteps, dw, dh = jax.vjp(run, steps, weights, start)[1]((dy, dh))
        return (dh, jax.tree.map(jnp.add, dweights, dw)), dsteps

    count = size // o.segment
    xs = (split_time((steps, masks), size), starts[count - 1 if o.reverse else 0 :: count])
    zeros = jax.tree.map(jnp.zeros_like, weights)
    (dh, dweights), dsteps = lax.scan(segment, (dh, zeros), (*xs, split_time(dy, size)), reverse=not o.reverse)
    return like(merge_time(dsteps), given), dweights, dh
