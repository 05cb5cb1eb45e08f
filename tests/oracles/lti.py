"""Float64 loops for diagonal linear time-invariant layers."""

import numpy as np


def diagonal_layer(u, lam, B, C, D=None, h0=None, conj_sym=False):
    """(y (T, B, K), last state (B, N)) of h = lam h + B u, y = Re(C h) + D u, step by step in 64 bits."""
    u, lam, B, C = (np.asarray(v).astype(np.complex128) for v in (u, lam, B, C))
    h = np.zeros((u.shape[1], len(lam)), np.complex128) if h0 is None else np.asarray(h0, np.complex128)
    outputs = []
    for u_t in u:
        h = lam * h + u_t @ B.T
        y = (h @ C.T).real * (2 if conj_sym else 1)
        if D is not None:
            D64 = np.asarray(D, np.float64)
            y = y + (D64 * u_t.real if D64.ndim == 1 else u_t.real @ D64.T)
        outputs.append(y)
    return np.array(outputs).reshape(*u.shape[:2], len(C)), h
