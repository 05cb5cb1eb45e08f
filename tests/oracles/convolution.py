"""Float64 loops for causal convolutions and for the kernels of state-space layers."""

import numpy as np


def silu(y):
    return y / (1 + np.exp(-y))


def depthwise(x, weight, bias=None, conv_state=None, activation=None, lengths=None, reset=None):
    """(y (T, B, D), state (B, D, K)) of a causal depthwise convolution, row by row and step by step."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    (T, B, D), K = x.shape, weight.shape[1]
    state = np.zeros((B, D, K)) if conv_state is None else np.array(conv_state, np.float64)
    bias = np.zeros(D) if bias is None else np.asarray(bias, np.float64)
    reset = np.zeros((T, B), bool) if reset is None else np.asarray(reset).reshape(T, -1) | np.zeros((T, B), bool)
    y = np.zeros((T, B, D))
    for b in range(B):
        for t in range(T if lengths is None else min(T, int(lengths[b]))):
            if reset[t, b]:
                state[b] = 0
            state[b] = np.concatenate([state[b, :, 1:], x[t, b, :, None]], axis=1)
            y[t, b] = (state[b] * weight).sum(1) + bias
            if activation == "silu":
                y[t, b] = silu(y[t, b])
    return y, state


def long_convolution(x, k):
    """y_t = sum_{s <= t} k_s x_{t - s}: x (T, B, H), k (L, H) or (L, C, H), term by term."""
    x, k = np.asarray(x, np.float64), np.asarray(k, np.float64)
    T, L = len(x), len(k)
    y = np.zeros((*x.shape[:2], *k.shape[1:]))
    for t in range(T):
        for s in range(min(t + 1, L)):
            y[t] += k[s] * (x[t - s] if k.ndim == 2 else x[t - s][:, None])
    return y


def vandermonde(C, dtA, L, conj_sym=False):
    """Re sum_n C[..., h, n] exp(l dtA[h, n]), shape (..., H, L)."""
    C, dtA = np.asarray(C).astype(np.complex128), np.asarray(dtA).astype(np.complex128)
    powers = np.exp(dtA[..., None] * np.arange(L))
    return np.einsum("...hn,hnl->...hl", C, powers).real * (2 if conj_sym else 1)


def cauchy(v, z, w, conj_sym=False):
    """sum_n v / (z - w), plus the conjugate pole's term with conj_sym, shape (..., L)."""
    v, z, w = (np.asarray(a).astype(np.complex128) for a in (v, z, w))
    r = (v[..., None] / (z - w[..., None])).sum(-2)
    return r + (v.conj()[..., None] / (z - w.conj()[..., None])).sum(-2) if conj_sym else r
