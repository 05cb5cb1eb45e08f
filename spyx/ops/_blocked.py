"""The recurrence in blocks of time: only the state before each block is saved, the rest is recomputed.

Here a complex array is a real one with a `parts` axis (re, im); a real one has a single part. Everything is
written for speed on CPU: loops that overwrite their input, block by block, in arrays that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK_BYTES = 512 << 10
MIN_STEPS = 16
_MIN_BLOCKS = 8


def is_complex(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def split(z, dtype, axis: int):
    """`z` cast to `dtype`, its real part and (if `dtype` has one) imaginary part on a new `axis`."""
    z = z.astype(dtype)
    return jnp.stack([z.real, z.imag], axis) if is_complex(dtype) else jnp.expand_dims(z, axis)


def join(parts, axis: int):
    """The inverse of `split`."""
    pick = partial(lax.index_in_dim, parts, axis=axis, keepdims=False)
    return lax.complex(pick(0), pick(1)) if parts.shape[axis] == 2 else pick(0)


def cut(z, start, steps: int) -> Any:
    """`steps` steps of `z` from `start`; None stays None."""
    return None if z is None else lax.dynamic_slice_in_dim(z, start, steps, 0)


def quarter_turn(h, axis: int):
    """The parts of i h."""
    re, im = (lax.index_in_dim(h, k, axis) for k in (0, 1))
    return jnp.concatenate([-im, re], axis)


def factor(a, axis: int):
    """(re, signed im) of the parts `a`, with which `multiply` takes two products and one flip."""
    if a.shape[axis] == 1:
        return a, None
    re, im = (lax.index_in_dim(a, k, axis) for k in (0, 1))
    return re, jnp.concatenate([-im, im], axis)


def multiply(a, h, axis: int):
    """The parts of a h, with `a` from `factor`."""
    re, im = a
    return re * h if im is None else re * h + im * jnp.flip(h, axis)


def overwrite(step: Callable, carry, out, inputs, *, reverse: bool):
    """lax.scan of `carry, y = step(carry, out[t], inputs[t])` that stores y in the place of out[t].

    XLA does it in place as long as out[t] is read once in `step`.
    """
    length = out.shape[0]

    def body(i, state):
        carry, out = state
        t = length - 1 - i if reverse else i
        at = partial(lax.dynamic_index_in_dim, index=t, axis=0, keepdims=False)
        carry, y = step(carry, at(out), jax.tree.map(at, inputs))
        return carry, lax.dynamic_update_index_in_dim(out, y, t, 0)

    return lax.fori_loop(0, length, body, (carry, out))


def run(a, x, h, reset, valid, *, axis: int, varying: bool, reverse: bool):
    """States of one block: `(h_last, H)` from the inputs x (L, ...) and the state h before it.

    `axis`, negative, is that of the parts; `a` from `factor`, with a leading L if `varying`;
    `reset` and `valid` (L, ...) or None.
    """

    def step(h, x_t, inputs):
        a_t, reset_t, valid_t = inputs
        kept = h if reset_t is None else jnp.where(reset_t, 0, h)
        new = multiply(a_t if varying else a, kept, axis) + x_t
        if valid_t is not None:
            new = jnp.where(valid_t, new, h)
        return new, new

    return overwrite(step, h, x, (a if varying else None, reset, valid), reverse=reverse)


def run_adjoint(a, dH, c, reset, valid, *, axis: int, varying: bool, reverse: bool):
    """Transpose of `run`: `(c_before, G)` from the cotangents dH of H and c of h_last.

    G is the cotangent of x, 0 at steps that are not valid; c_before that of the state before the
    block. `reverse` is that of `run`.
    """
    re, im = a
    a = re, None if im is None else -im

    def transition(g, inputs):
        a_t, reset_t, valid_t = inputs
        c = multiply(a_t if varying else a, g, axis)
        if reset_t is not None:
            c = jnp.where(reset_t, 0, c)
        return c if valid_t is None else jnp.where(valid_t, c, g)

    def step(carry, dh_t, inputs):
        g = transition(*carry) + dh_t
        return (g, inputs), g

    inputs = (a if varying else None, reset, valid)
    first = jax.tree.map(lambda z: jnp.zeros_like(z[0]), inputs)
    dH = dH.at[0 if reverse else -1].add(c)
    carry, G = overwrite(step, (jnp.zeros_like(c), first), dH, inputs, reverse=not reverse)
    return transition(*carry), G if valid is None else jnp.where(valid, G, 0)


def previous(h, H, reset, reverse: bool):
    """What the decay multiplied at each step of a block: the state before it, 0 where it was reset."""
    kept = jnp.concatenate([H[1:], h[None]] if reverse else [h[None], H[:-1]])
    return kept if reset is None else jnp.where(reset, 0, kept)


def over_blocks(body: Callable, carry, T: int, length: int, *, reverse: bool):
    """Fold `body(carry, index, start, steps)` over blocks of `length` steps, last block first if `reverse`.

    The end of time is left to a shorter block where `length` does not divide T; `steps` is static.
    """
    full, tail = divmod(T, length)

    def one(i, carry):
        i = full - 1 - i if reverse else i
        return body(carry, i, i * length, length)

    def rest(carry):
        return body(carry, full, full * length, tail) if tail else carry

    if reverse:
        return lax.fori_loop(0, full, one, rest(carry))
    return rest(lax.fori_loop(0, full, one, carry))


def block_length(shape: tuple[int, ...], dtype) -> int:
    """Steps per block of the scan of an array of this shape, whose states have this dtype."""
    T, *features = shape
    row_bytes = max(1, math.prod(features)) * jnp.dtype(dtype).itemsize
    return min(T, max(MIN_STEPS, min(_BLOCK_BYTES // row_bytes, -(-T // _MIN_BLOCKS))))


def saved_states(x, h0):
    """Zeros for the states before the blocks: (blocks, parts, ...)."""
    blocks = -(-x.shape[0] // block_length(x.shape, h0.dtype))
    return jnp.zeros((blocks, *split(h0, h0.dtype, 0).shape), h0.real.dtype)


def forward(a, x, h0, reset, valid, *, reverse: bool, out_dtype):
    """linear_scan, block by block.

    Args:
        a: (T, ...) if it varies in time, else (...); as many axes as x or one less, broadcastable.
        x: (T, ...) in any dtype, padding included. h0: (...) in the dtype of the state.
        reset, valid: bool, broadcastable against x, or None.

    Returns:
        h (T, ...), 0 at steps that are not valid, h_last (...), and the states before the blocks, in parts.
    """
    T, dtype = x.shape[0], h0.dtype
    L, axis, varying = block_length(x.shape, dtype), -x.ndim, a.ndim == x.ndim
    constant = None if varying else _decay(a, dtype, axis)

    def block(state, i, start, steps):
        h, out, before = state
        before = lax.dynamic_update_index_in_dim(before, h, i, 0)
        x_b, a_b, reset_b, valid_b = _inputs(a, x, reset, valid, start, steps, dtype, axis)
        a_b = a_b if varying else constant
        h, H = run(a_b, x_b, h, reset_b, valid_b, axis=axis, varying=varying, reverse=reverse)
        if valid_b is not None:
            H = jnp.where(valid_b, H, 0)
        h_b = join(H, 1).astype(out_dtype)
        return h, lax.dynamic_update_slice_in_dim(out, h_b, start, 0), before

    state = (split(h0, dtype, 0), jnp.zeros(x.shape, out_dtype), saved_states(x, h0))
    h, out, before = over_blocks(block, state, T, L, reverse=reverse)
    return out, join(h, 0), before


def adjoint(a, x, h0, reset, valid, before, dh, dh_last, *, reverse: bool):
    """Transpose of `forward` with its arguments and the states `before` the blocks: `(da, dx, dh0)`.

    Cotangents follow JAX's convention: the transpose, without conjugation.
    """
    T, dtype = x.shape[0], h0.dtype
    L, axis, varying = block_length(x.shape, dtype), -x.ndim, a.ndim == x.ndim
    constant = None if varying else _decay(a, dtype, axis)

    def block(state, i, start, steps):
        c, dx, da = state
        h = lax.dynamic_index_in_dim(before, i, 0, keepdims=False)
        x_b, a_b, reset_b, valid_b = _inputs(a, x, reset, valid, start, steps, dtype, axis)
        a_b = a_b if varying else constant
        _, H = run(a_b, x_b, h, reset_b, valid_b, axis=axis, varying=varying, reverse=reverse)
        dH = split(jnp.conj(cut(dh, start, steps)), dtype, 1)
        if valid_b is not None:
            dH = jnp.where(valid_b, dH, 0)
        c, G = run_adjoint(a_b, dH, c, reset_b, valid_b, axis=axis, varying=varying, reverse=reverse)
        dx = lax.dynamic_update_slice_in_dim(dx, _cotangent(G, 1, x.dtype), start, 0)
        da_b = _decay_cotangent(G, previous(h, H, reset_b, reverse), a)
        if varying:
            da_b = _unbroadcast(da_b, (*da_b.shape[:2], *a.shape[1:]))
            return c, dx, lax.dynamic_update_slice_in_dim(da, _cotangent(da_b, 1, a.dtype), start, 0)
        return c, dx, da + _unbroadcast(jnp.sum(da_b, 0), (da.shape[0], *a.shape))

    da = jnp.zeros_like(a) if varying else jnp.zeros_like(split(a, _like(a, dtype), 0))
    state = (split(jnp.conj(dh_last), dtype, 0), jnp.zeros_like(x), da)
    c, dx, da = over_blocks(block, state, T, L, reverse=not reverse)
    return da if varying else _cotangent(da, 0, a.dtype), dx, _cotangent(c, 0, dtype)


def _like(a, dtype):
    """`dtype`, or its real counterpart if `a` is real."""
    return dtype if is_complex(a.dtype) else jnp.finfo(dtype).dtype


def _decay(a, dtype, axis):
    return factor(split(a, _like(a, dtype), -a.ndim - 1), axis)


def _inputs(a, x, reset, valid, start, steps, dtype, axis):
    """One block of everything, with a parts axis after time; `a` only if it varies in time."""
    reset, valid = (m if m is None else jnp.expand_dims(cut(m, start, steps), 1) for m in (reset, valid))
    x_b = split(cut(x, start, steps), dtype, 1)
    if valid is not None:
        x_b = jnp.where(valid, x_b, 0)
    a_b = None
    if a.ndim == x.ndim:
        a_b = factor(split(cut(a, start, steps), _like(a, dtype), 1), axis)
    return x_b, a_b, reset, valid


def _decay_cotangent(G, kept, a):
    """Parts, on axis 1, of the cotangent of the decay at every step of a block, before broadcasting."""
    re = jnp.sum(G * kept, 1, keepdims=True)
    if not is_complex(a.dtype):
        return re
    return jnp.concatenate([re, jnp.sum(G * quarter_turn(kept, 1), 1, keepdims=True)], 1)


def _cotangent(parts, axis, dtype):
    """The cotangent of an array of `dtype` from that of its parts."""
    if not is_complex(dtype):
        return lax.index_in_dim(parts, 0, axis, keepdims=False).astype(dtype)
    return jnp.conj(join(parts, axis)).astype(dtype)


def _unbroadcast(z, shape):
    axes = tuple(k for k, n in enumerate(shape) if n == 1 and z.shape[k] != 1)
    return jnp.sum(z, axes, keepdims=True)
