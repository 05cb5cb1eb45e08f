"""Float64 loops for the state-space dual scan."""

import numpy as np
from oracles.selective import silu, softplus


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, h0=None, dt_limit=(0, np.inf), reverse=False,
    reset=None, lengths=None,
):  # fmt: skip
    """(y (T, B, H, P), state (B, H, P, N)): one head and one step at a time."""
    x, dt, A, B, C = (np.asarray(v).astype(np.float64) for v in (x, dt, A, B, C))
    D, z, dt_bias, h0 = (None if v is None else np.asarray(v).astype(np.float64) for v in (D, z, dt_bias, h0))
    T, batch, heads, _ = x.shape
    y = np.zeros_like(x)
    state = np.zeros((*x.shape[1:], B.shape[-1])) if h0 is None else h0.copy()
    for b in range(batch):
        last = T if lengths is None else min(int(lengths[b]), T)
        order = range(last - 1, -1, -1) if reverse else range(last)
        for k in range(heads):
            g = k * B.shape[2] // heads
            h = state[b, k]
            for t in order:
                if reset is not None and (reset[t] if reset.ndim == 1 else reset[t, b]):
                    h = np.zeros_like(h)
                step = dt[t, b, k] + (0 if dt_bias is None else dt_bias[k])
                step = np.clip(softplus(step) if dt_softplus else step, *dt_limit)
                h = np.exp(step * A[k]) * h + step * np.outer(x[t, b, k], B[t, b, g])
                y[t, b, k] = h @ C[t, b, g]
                y[t, b, k] += 0 if D is None else D[k] * x[t, b, k]
                y[t, b, k] *= 1 if z is None else silu(z[t, b, k])
            state[b, k] = h
    return y, state
