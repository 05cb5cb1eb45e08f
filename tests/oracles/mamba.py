"""lrnnx's Mamba block in 64 bits, from its state_dict alone."""

import numpy as np

from .selective import selective_scan, silu, softplus


def mamba(weights, x, *, discretization="mamba", timesteps=None):
    """(B, L, H) -> (B, L, H)."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    B, L, _ = x.shape
    K, (R, N) = w["conv1d.weight"].shape[2], (w["dt_proj.weight"].shape[1], w["A_log"].shape[1])
    xz = np.asarray(x, np.float64) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    x, z = np.split(xz, 2, -1)
    padded = np.concatenate([np.zeros((B, K - 1, x.shape[-1])), x], 1)
    u = sum(padded[:, k : k + L] * w["conv1d.weight"][:, 0, k] for k in range(K)) + w.get("conv1d.bias", 0)
    u = silu(u)
    r, b, c = np.split(u @ w["x_proj.weight"].T, [R, R + N], -1)
    dt = softplus(r @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    dt_A = None
    if timesteps is not None:
        dt_A = np.asarray(timesteps, np.float64)[..., None] * softplus(w["dtA_proj.bias"])
    time_major = [None if v is None else np.swapaxes(v, 0, 1) for v in (u, dt, b, c, z, dt_A)]
    u, dt, b, c, z, dt_A = time_major
    y, _ = selective_scan(u, dt, -np.exp(w["A_log"]), b, c, w["D"], z, discretization=discretization, dt_A=dt_A)
    return np.swapaxes(y, 0, 1) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)
