"""The selective scan over all steps: forward and backward, in each method, as pure functions.

Symbols and layouts are those of `_selective_step`; `block` is a multiple of `chunk` = K, T need not be one of either.
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
    """Flat arguments, with steps that do nothing at the end for whole blocks: `(steps, masks, *others)`."""
    T = steps.u.shape[0]
    steps, others = flat(steps), [v.reshape(T, -1) for v in others]
    padding = -T % o.block
    if not padding:
        return steps, masks, *others

    def pad(v):
        return jnp.pad(v, [(0, padding)] + [(0, 0)] * (v.ndim - 1))

    valid = jnp.ones((T, 1), bool) if masks.valid is None else masks.valid
    return jax.tree.map(pad, (steps, masks._replace(valid=valid), *others))


def forward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """`(y, last state, starts)`: starts (chunks, E, N, P) are the states before each chunk, in scan direction."""
    T, *shape = steps.u.shape
    steps, masks = in_blocks(o, steps, masks)

    @jax.checkpoint
    def chunk(h, x):
        last, y = lax.scan(partial(one_step, o, weights), h, x, reverse=o.reverse)
        return last, (y, h)

    h, (y, starts) = lax.scan(chunk, h0, split_time((steps, masks), o.chunk), reverse=o.reverse)
    return merge_time(y)[:T].reshape(T, *shape), h, starts


def backward_blocked(o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """Cotangents of (steps, weights, h0) from those of y and of the last state.

    Chunk by chunk, against the direction of the scan: states of the chunk from the one saved before it, then
    the adjoint recurrence dh_{t-1} = A_bar_t (dh_t + c_t dy_t).
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

    zeros = partial(jax.tree.map, jnp.zeros_like)
    buffer = jnp.zeros((K + 1, *dh.shape), dh.dtype)
    carry = (dh, (zeros(dh), zeros(weights.D), zeros(weights.dt_bias)), buffer)
    xs = (split_time((steps, masks), K), starts, split_time(dy, K))
    (dh, (dA, dD, dbias), _), dsteps = lax.scan(chunk, carry, xs, reverse=not o.reverse)
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


def forward_associative(o: Options, steps: Steps, weights: Weights, masks: Masks, h0):
    """As `forward_blocked`, in parallel inside blocks of `o.block` steps: (block, E, N, P) at a time."""
    T, *shape = steps.u.shape
    steps, masks = in_blocks(o, steps, masks)
    block = jax.checkpoint(partial(parallel_block, o, weights))
    h, (y, starts) = lax.scan(block, h0, split_time((steps, masks), o.block), reverse=o.reverse)
    return merge_time(y)[:T].reshape(T, *shape), h, merge_time(starts)


def backward_associative(o: Options, steps: Steps, weights: Weights, masks: Masks, starts, dy, dh):
    """As `backward_blocked`, in parallel inside blocks."""
    given = steps
    steps, masks, dy = in_blocks(o, steps, masks, dy)

    def block(carry, x):
        dh, dweights = carry
        (steps, mask), start, dy = x

        def run(steps, weights, h):
            h, (y, _) = parallel_block(o, weights, h, (steps, mask))
            return y, h

        dsteps, dw, dh = jax.vjp(run, steps, weights, start)[1]((dy, dh))
        return (dh, jax.tree.map(jnp.add, dweights, dw)), dsteps

    count = o.block // o.chunk
    xs = (split_time((steps, masks), o.block), starts[count - 1 if o.reverse else 0 :: count])
    zeros = jax.tree.map(jnp.zeros_like, weights)
    (dh, dweights), dsteps = lax.scan(block, (dh, zeros), (*xs, split_time(dy, o.block)), reverse=not o.reverse)
    return like(merge_time(dsteps), given), dweights, dh
