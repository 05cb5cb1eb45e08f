"""Sequential numpy oracles of `spyx.ops.linear_scan` and `diagonal_ssm`: one step of one row at a time."""

from __future__ import annotations

import numpy as np


def linear_scan(a, x, h0=None, *, reverse=False, reset=None, lengths=None, real=np.float64):
    """`(h, h_last)` with every operation in `real` or its complex counterpart."""
    dtype = np.result_type(real, np.complex64) if any(map(np.iscomplexobj, (a, x, h0))) else np.dtype(real)
    a, x = np.asarray(a), np.asarray(x)
    T = x.shape[0]
    a = np.broadcast_to(a if a.ndim == x.ndim else a[None], x.shape).astype(dtype)
    x = x.astype(dtype)
    h = np.zeros_like(x)
    state = np.zeros(x.shape[1:], dtype) if h0 is None else np.array(h0, dtype)
    by_row = lengths is not None or np.ndim(reset) == 2
    rows = [(b,) for b in range(x.shape[1])] if by_row else [()]
    for row in rows:
        length = T if lengths is None else min(T, int(lengths[row]))
        steps = range(length)
        for t in reversed(steps) if reverse else steps:
            if reset is not None and (reset[t] if np.ndim(reset) == 1 else reset[(t, *row)]):
                state[row] = 0
            state[row] = a[(t, *row)] * state[row] + x[(t, *row)]
            h[(t, *row)] = state[row]
    return h, state


def diagonal_ssm(
    u, lam, B, C, D=None, h0=None, *, reverse=False, reset=None, lengths=None, conj_sym=False, real=np.float64
):
    """`(y, state)` of a diagonal state-space layer, every operation in `real` or its complex counterpart."""
    complex_ = np.result_type(real, np.complex64)
    cast = lambda z: np.asarray(z).astype(complex_ if np.iscomplexobj(z) else real)  # noqa: E731
    u, lam, B, C = (cast(z) for z in (u, lam, B, C))
    if lengths is not None:
        u = np.where(np.arange(u.shape[0])[:, None, None] < np.asarray(lengths)[:, None], u, 0)
    x = np.einsum("tbh,nh->tbn", u, B)
    h, state = linear_scan(lam, x, h0, reverse=reverse, reset=reset, lengths=lengths, real=real)
    y = np.einsum("tbn,kn->tbk", h, C).real * (2 if conj_sym else 1)
    if D is not None:
        y = y + (cast(D) * u if np.ndim(D) == 1 else np.einsum("tbh,kh->tbk", u, cast(D)))
    return y, state


def directional(loss, values, directions, step=1e-6):
    """Central finite difference of the scalar `loss(*values)` along `directions`; None is passed over."""
    moved = [
        loss(*(None if v is None else v + sign * step * d for v, d in zip(values, directions, strict=True)))
        for sign in (1, -1)
    ]
    return (moved[0] - moved[1]) / (2 * step)
