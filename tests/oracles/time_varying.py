"""lrnnx's time-varying S5, RG-LRU and S7 in 64 bits, from their state_dicts alone: (B, L, H) -> (B, L, H)."""

from math import erf

import numpy as np

from .selective import coefficients, wide

_gelu = np.vectorize(lambda v: v * (1 + erf(v / 2**0.5)) / 2, otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _parts(w, name):
    return w[name][..., 0] + 1j * w[name][..., 1]


def s5(weights, x, *, discretization="zoh", conj_sym=False, step_rescale=1.0, timesteps=None):
    w, x = {name: wide(value) for name, value in weights.items()}, wide(x)
    A, B, C = (_parts(w, name) for name in "ABC")
    dt = step_rescale * np.exp(w["log_dt"])
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros_like(A)
        for t in range(x.shape[1]):
            elapsed = 1.0 if timesteps is None else wide(timesteps)[b, t]
            A_bar, gamma = coefficients(discretization, dt, elapsed * dt, A)
            h = A_bar * h + gamma * (B @ x[b, t])
            y[b, t] = (2 if conj_sym else 1) * (C @ h).real + w["D"] * x[b, t]
    return y


def rglru(weights, x, *, c=8.0):
    w, x = {name: wide(value) for name, value in weights.items()}, wide(x)

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w.get(f"{name}.bias", 0)

    taps = w["conv1d.weight"][:, 0]
    a = _sigmoid(w["a_log"][:, 0])
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h, window = np.zeros(len(a)), np.zeros(taps.shape)
        for t in range(x.shape[1]):
            window = np.concatenate([window[:, 1:], linear("in_proj", x[b, t])[:, None]], 1)
            u = (window * taps).sum(1) + w.get("conv1d.bias", 0)
            decay = a ** (c * _sigmoid(linear("recurrent_gate_proj", u)))
            h = decay * h + np.sqrt(1 - decay**2) * _sigmoid(linear("input_gate_proj", u)) * u
            y[b, t] = linear("out_proj", _gelu(linear("gate_proj", x[b, t])) * h)
    return y


def s7(weights, x, *, d_state):
    w, x = {name: wide(value) for name, value in weights.items()}, wide(x)
    H, N = x.shape[-1], d_state
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros(N)
        for t in range(x.shape[1]):
            u = w["in_proj.weight"] @ x[b, t]
            rows = w["x_proj.weight"] @ u
            A, B, C, D, bias = np.split(rows, np.cumsum([N, H * N, H * N, H]))
            A = A + w["base_params"]
            h = (1 - 1 / (A**2 + 0.5)) * h + B.reshape(H, N).T @ u + bias
            out = C.reshape(H, N) @ h + D * u
            y[b, t] = x[b, t] + _sigmoid(w["gate_proj.weight"] @ _gelu(out)) * out
    return y
