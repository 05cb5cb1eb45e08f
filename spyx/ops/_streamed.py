"""diagonal_ssm in blocks of time: projection, recurrence and readout of one block before the next.

Nothing of size (T, B, N) exists, forward or backward; the backward pass keeps the inputs and the state before
each block. All arrays are real: the P parts (re, im) of a complex state lie side by side, h as (B, P, N).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import _diagonal_native
from ._blocked import cut, factor, join, over_blocks, previous, quarter_turn, run, run_adjoint
from ._diagonal_native import STEPS
from .dispatch import platform_primitive

_BLOCK_BYTES = 4 << 20
_MAX_ROWS = 2048
_MIN_BLOCKS = 8
_AXIS = -2


class System(NamedTuple):
    """A discrete diagonal system in real numbers, in the dtype of the state; P = 1 for what is real."""

    lam: Float[Array, "P N"]
    B: Float[Array, "P N H"]
    C: Float[Array, "P N K"]  # the second part is minus the imaginary one
    D: Float[Array, " H"] | Float[Array, "K H"] | None


def block_length(system: System, u, h0) -> int:
    """Steps per block, a multiple of `STEPS`: few enough for the cache and for little memory, many for good GEMMs."""
    T, B, H = u.shape
    _, N, K = system.C.shape
    row_bytes = (h0.shape[1] * N + H + K) * h0.dtype.itemsize
    rows = min(_MAX_ROWS, _BLOCK_BYTES // max(1, row_bytes), -(-T * B // _MIN_BLOCKS))
    return min(T, STEPS * max(1, rows // (STEPS * max(1, B))))


def saved_states(u, h0):
    """Zeros for the states that are kept: (ceil(T / STEPS), B, P, N)."""
    return jnp.zeros((-(-u.shape[0] // STEPS), *h0.shape), h0.dtype)


def _entry(start, steps: int, reverse: bool):
    """Which of the kept states is the one before a block."""
    return (start + steps - 1 if reverse else start) // STEPS


def forward(system: System, u, h0, reset, valid, *, by_platform: bool, **how: Any):
    """The whole layer, block by block.

    Args:
        system: parameters.
        u: (T, B, H) in any real dtype, padding included. h0: (B, P, N).
        reset: bool (T, 1 or B, 1, 1) or None. valid: bool (T, B, 1, 1) or None.
        by_platform: CPUs may run it by a kernel of `spyx.ops.native`.
        how: `reverse`, `precision`, and `batch_first`: whether u is the transpose of an array (B, T, H), as y then is.

    Returns:
        y (T, B, K) in the dtype of u, h_last (B, P, N), and the states kept: those before the blocks at least.
    """
    compute = _forward_by_platform if by_platform else _forward
    return compute(system, u, h0, reset, valid, **how)


def adjoint(system: System, u, h0, reset, valid, before, dy, dh_last, *, by_platform: bool, **how: Any):
    """Transpose of `forward` with its arguments and the states it kept: `(d_system, du, dh0)`."""
    compute = _adjoint_by_platform if by_platform else _adjoint
    return compute(system, u, h0, reset, valid, before, dy, dh_last, **how)


def _forward(system: System, u, h0, reset, valid, *, reverse: bool, precision, batch_first: bool):
    del batch_first
    T, B, _ = u.shape
    L = block_length(system, u, h0)

    def block(state, i, start, steps):
        h, y, before = state
        reset_b, valid_b = cut(reset, start, steps), cut(valid, start, steps)
        before = lax.dynamic_update_index_in_dim(before, h, _entry(start, steps, reverse), 0)
        u_b = clear(cut(u, start, steps), valid_b, h.dtype)
        x = project(u_b, system.B, h.shape[1], precision)
        h, H = _scan(system.lam, x, h, reset_b, valid_b, reverse=reverse)
        y_b = clear(read_out(H, u_b, system, precision), valid_b, y.dtype)
        return h, lax.dynamic_update_slice_in_dim(y, y_b, start, 0), before

    state = (h0, jnp.zeros((T, B, system.C.shape[-1]), u.dtype), saved_states(u, h0))
    h, y, before = over_blocks(block, state, T, L, reverse=reverse)
    return y, h, before


def _adjoint(system: System, u, h0, reset, valid, before, dy, dh_last, *, reverse: bool, precision, batch_first: bool):
    del batch_first
    T, P, L = u.shape[0], h0.shape[1], block_length(system, u, h0)

    def block(state, i, start, steps):
        c, du, total = state
        reset_b, valid_b = cut(reset, start, steps), cut(valid, start, steps)
        u_b = clear(cut(u, start, steps), valid_b, h0.dtype)
        dy_b = clear(cut(dy, start, steps), valid_b, h0.dtype)
        h = lax.dynamic_index_in_dim(before, _entry(start, steps, reverse), 0, keepdims=False)
        x = project(u_b, system.B, P, precision)
        dH = project(dy_b, system.C, P, precision)
        H, d_lam, G, c = _transpose(system.lam, x, h, dH, c, reset_b, valid_b, reverse=reverse)
        du_b, dD = _input_cotangent(G, dy_b, u_b, system, precision)
        du = lax.dynamic_update_slice_in_dim(du, clear(du_b, valid_b, du.dtype), start, 0)
        parts = System(
            d_lam,
            _outer(G, u_b, system.B.shape[0], precision),
            _outer(H, dy_b, system.C.shape[0], precision),
            dD,
        )
        return c, du, jax.tree.map(jnp.add, total, parts)

    zero = jax.tree.map(jnp.zeros_like, system)
    zero = zero._replace(**{name: jnp.zeros(_rotated(getattr(system, name).shape), h0.dtype) for name in "BC"})
    c, du, total = over_blocks(block, (dh_last, jnp.zeros_like(u), zero), T, L, reverse=not reverse)
    return total._replace(B=total.B.transpose(1, 2, 0), C=total.C.transpose(1, 2, 0)), du, c


def _rotated(shape):
    return shape[-1], *shape[:-1]


def _scan(lam, x, h, reset, valid, *, reverse: bool):
    """One block: `(h_last, H)` from the inputs x (L, B, P, N) and the state h before it."""
    return run(factor(lam, _AXIS), x, h, reset, valid, axis=_AXIS, varying=False, reverse=reverse)


def _transpose(lam, x, h, dH, c, reset, valid, *, reverse: bool):
    """`_scan`, and its transpose: `(H, d_lam, G, c_before)` from the cotangents dH of H and c of h_last."""
    a, how = factor(lam, _AXIS), {"axis": _AXIS, "varying": False, "reverse": reverse}
    _, H = run(a, x, h, reset, valid, **how)
    c, G = run_adjoint(a, dH, c, reset, valid, **how)
    return H, _decay_cotangent(G, previous(h, H, reset, reverse), lam.shape[0]), G, c


def _native_forward(system: System, u, h0, reset, valid, *, reverse: bool, precision, batch_first: bool):
    how = {"reverse": reverse, "batch_first": batch_first}
    if not _diagonal_native.fits(u, system, h0):
        return _forward(system, u, h0, reset, valid, precision=precision, **how)
    turn = _turned if batch_first else _as_it_is
    values = turn(u), join(system.lam, 0), system.B, system.C, system.D, h0, reset, valid
    y, h_last, before = _diagonal_native.forward(*values, **how)
    return turn(y), h_last, before


def _native_adjoint(system: System, u, h0, reset, valid, before, dy, dh_last, *, reverse: bool, precision, batch_first):
    how = {"reverse": reverse, "batch_first": batch_first}
    if not _diagonal_native.fits(u, system, h0):
        return _adjoint(system, u, h0, reset, valid, before, dy, dh_last, precision=precision, **how)
    turn = _turned if batch_first else _as_it_is
    values = turn(u), join(system.lam, 0), system.B, system.C, system.D, h0, reset, valid
    du, d_lam, dB, dC, dD, dh0 = _diagonal_native.adjoint(*values, before, turn(dy), dh_last, **how)
    return System(d_lam[: system.lam.shape[0]], dB, dC, dD), turn(du), dh0


def _turned(z):
    return jnp.swapaxes(z, 0, 1)


def _as_it_is(z):
    return z


_forward_by_platform = platform_primitive("diagonal_layer", _forward, native=_native_forward)
_adjoint_by_platform = platform_primitive("diagonal_layer_adjoint", _adjoint, native=_native_adjoint)


def clear(z, valid, dtype):
    """z (L, B, H) in `dtype`, 0 at padding."""
    z = z.astype(dtype)
    return z if valid is None else jnp.where(valid[..., 0], z, 0)


def project(z, W, P: int, precision):
    """z (L, B, H) times W (P', N, H) over H, as (L, B, P, N); parts that W lacks are 0."""
    L, B, H = z.shape
    have, N, _ = W.shape
    x = jnp.einsum("rh,nh->rn", z.reshape(L * B, H), W.reshape(have * N, H), precision=precision)
    x = x.reshape(L, B, have, N)
    return x if have == P else jnp.pad(x, ((0, 0), (0, 0), (0, P - have), (0, 0)))


def read_out(h, u, system: System, precision):
    """C h + D u, (L, B, K), of states (L, B, P, N) and inputs (L, B, H)."""
    L, B, H = u.shape
    parts, N, K = system.C.shape
    C, D = system.C.reshape(parts * N, K), system.D
    y = jnp.einsum("rn,nk->rk", _rows(h, parts), C, precision=precision).reshape(L, B, K)
    if D is None:
        return y
    if D.ndim == 1:
        return y + D * u
    return y + jnp.einsum("rh,kh->rk", u.reshape(L * B, H), D, precision=precision).reshape(L, B, K)


def _rows(h, parts):
    """States (L, B, P, N) as a matrix (L B, parts N)."""
    L, B, _, N = h.shape
    return h[:, :, :parts].reshape(L * B, parts * N)


def _outer(h, z, parts, precision):
    """Sum over rows of z (L, B, H) times h (L, B, P, N), as (H, parts, N): the faster of the two orders."""
    L, B, H = z.shape
    product = jnp.einsum("rh,rn->hn", z.reshape(L * B, H), _rows(h, parts), precision=precision)
    return product.reshape(H, parts, h.shape[-1])


def _input_cotangent(G, dy, u, system, precision):
    """Cotangents of a block of inputs and of D."""
    L, B, H = u.shape
    parts, N, _ = system.B.shape
    W, D = system.B.reshape(parts * N, H), system.D
    du = jnp.einsum("rn,nh->rh", _rows(G, parts), W, precision=precision).reshape(L, B, H)
    if D is None:
        return du, None
    if D.ndim == 1:
        return du + D * dy, jnp.sum(dy * u, axis=(0, 1))
    flat_dy, flat_u = dy.reshape(L * B, -1), u.reshape(L * B, H)
    du = du + jnp.einsum("rk,kh->rh", flat_dy, D, precision=precision).reshape(L, B, H)
    return du, jnp.einsum("rk,rh->kh", flat_dy, flat_u, precision=precision)


def _decay_cotangent(G, kept, parts):
    """Cotangent (parts, N) of lam from those of the inputs and what it multiplied, both (L, B, P, N)."""
    re = jnp.sum(G * kept, axis=(0, 1, 2))
    return re[None] if parts == 1 else jnp.stack([re, jnp.sum(G * quarter_turn(kept, _AXIS), axis=(0, 1, 2))])
