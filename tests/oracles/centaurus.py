"""lrnnx's Centaurus in 64 bits, from its state_dict alone: (B, L, H) -> (B, L, H)."""

import numpy as np

from .selective import coefficients, wide


def centaurus(weights, x, mode, discretization=None):
    """The recurrence over all modes; `discretization` None is A_bar = exp(dt A), gamma = dt."""
    w, x = {name: wide(value) for name, value in weights.items()}, wide(x)
    H, (N, M) = x.shape[-1], w["A"].shape
    dt = np.exp(w["log_delta"])[:, None]
    A_bar, gamma = coefficients(discretization or "mamba", dt, dt, w["A"])
    gamma = np.broadcast_to(gamma, A_bar.shape)
    B, C = np.zeros((N, M, H)), np.zeros((H, N, M))
    for n in range(N):
        for m in range(M):
            if mode == "pointwise":
                B[n, m], C[:, n, m] = w["B"][n * M + m], w["C"][:, n * M + m]
            elif mode == "neck":
                B[n, m], C[:, n, m] = w["B"][n], w["C"][:, n] * w["E"][n, m]
            else:
                target, source = (n, n) if mode == "dws" else divmod(n, H)
                B[n, m, source], C[target, n, m] = w["B"][n], w["C"][n] * w["E"][n, m]
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros((N, M), np.complex128)
        for t in range(x.shape[1]):
            h = A_bar * h + gamma * (B @ x[b, t])
            y[b, t] = np.einsum("hnm,nm->h", C, h.real)
    return y
