"""Float64 loops for the selective scan."""

import numpy as np


def coefficients(discretization, dt, dt_A, A):
    """(A_bar, gamma), elementwise, in 64 bits."""
    z, zA = dt * A, dt_A * A
    if discretization == "bilinear":
        return (1 + zA / 2) / (1 - zA / 2), dt / (1 - z / 2)
    if discretization == "zoh":
        safe = np.where(A == 0, 1, A)
        return np.exp(zA), np.where(A == 0, dt, np.expm1(z) / safe)
    return np.exp(zA), dt if discretization == "mamba" else np.ones_like(dt)


def softplus(x):
    return np.logaddexp(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def wide(v):
    """`v` in 64 bits, real or complex."""
    return None if v is None else np.asarray(v).astype(np.result_type(np.asarray(v).dtype, np.float64))


def selective_scan(
    u, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, discretization="mamba", dt_A=None, h0=None,
    conj_sym=False, reverse=False, reset=None, lengths=None,
):  # fmt: skip
    """(y (T, B, D), state (B, D, N)): one channel and one step at a time."""
    u, dt, A, B, C, D, z, dt_bias, dt_A, h0 = map(wide, (u, dt, A, B, C, D, z, dt_bias, dt_A, h0))
    T, batch, channels = u.shape
    N = A.shape[1]
    B, C = (v if v.ndim == 4 else v[:, :, None] for v in (B, C))
    y = np.zeros((T, batch, channels))
    state = np.zeros((batch, channels, N), np.result_type(A, B, C, np.float64 if h0 is None else h0))
    if h0 is not None:
        state[:] = h0
    for b in range(batch):
        last = T if lengths is None else min(int(lengths[b]), T)
        order = range(last - 1, -1, -1) if reverse else range(last)
        for d in range(channels):
            h = state[b, d]
            for t in order:
                if reset is not None and (reset[t] if reset.ndim == 1 else reset[t, b]):
                    h = np.zeros_like(h)
                step = dt[t, b, d] + (0 if dt_bias is None else dt_bias[d])
                step = softplus(step) if dt_softplus else step
                step_A = step if dt_A is None else dt_A[t, b, d]
                a, gamma = coefficients(discretization, step, step_A, A[d])
                h = a * h + gamma * B[t, b, d * B.shape[2] // channels] * u[t, b, d]
                out = (C[t, b, d * C.shape[2] // channels] * h).sum().real * (2 if conj_sym else 1)
                out += 0 if D is None else D[d] * u[t, b, d]
                y[t, b, d] = out * (1 if z is None else silu(z[t, b, d]))
            state[b, d] = h
    return y, state
