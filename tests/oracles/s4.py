"""S4 and S4D by their definitions: dense matrices, one step after the other, NumPy float64."""

import math

import numpy as np


def positive(stored, transform):
    return {
        "none": lambda s: s,
        "exp": np.exp,
        "relu": lambda s: np.maximum(s, 0) + 1e-4,
        "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
        "softplus": lambda s: np.logaddexp(0, s),
    }[transform](stored)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


def _complex(value, is_real):
    return value + 0j if is_real else value[..., 0] + 1j * value[..., 1]


def parameters(layer):
    return {name: np.asarray(value, np.float64) for name, value in layer.state_dict().items()}


def systems(layer, rate=1.0):
    """(A_bar (N, N), B_bar (N,), C (c, N)) of every channel, over both halves of the conjugate pairs."""
    p, found = parameters(layer), []
    inv_dt = np.sinh(p["inv_dt"]) if layer.dt_fast else p["inv_dt"]
    dt = rate * positive(inv_dt, layer.dt_transform)
    A = -positive(p["A_real"], layer.real_transform) + 0j
    if not layer.is_real:
        A = A - 1j * positive(p["A_imag"], layer.imag_transform)
    B, C = _complex(p["B"][0], layer.is_real), _complex(p["C"], layer.is_real)
    for h in range(layer.d_inner):
        s = h % layer.n_ssm
        a, b, c = (np.concatenate([q, q.conj()], -1) for q in (A[s], B[s], C[:, h]))
        step = np.broadcast_to(dt[h], A[s].shape)
        step = np.concatenate([step, step])
        matrix = np.diag(a)
        if "P" in p:
            P = _complex(p["P"], False)[:, s]
            P = np.concatenate([P, P.conj()], -1)
            matrix = matrix - P.T @ P.conj()
        matrix, b = step[:, None] * matrix, step * b
        if getattr(layer, "disc", "bilinear") == "zoh":
            z = np.diag(matrix)
            A_bar, B_bar = np.diag(np.exp(z)), np.expm1(z) / z * b
        else:
            eye = np.eye(len(a))
            A_bar = np.linalg.solve(eye - matrix / 2, eye + matrix / 2)
            B_bar = np.linalg.solve(eye - matrix / 2, b)
        if M := int(p.get("layer.kernel.l_kernel", 0)):
            c = np.linalg.solve((np.eye(len(a)) - np.linalg.matrix_power(A_bar, M)).T, c.T).T
        found.append((A_bar, B_bar, c))
    return found


def respond(found, u, cut=None):
    """y (B, L, c, H) for u (B, L, H), step by step; only the last `cut` inputs count where it is given."""
    B, L, H = u.shape
    y = np.zeros((B, L, found[0][2].shape[0], H))
    for h, (A_bar, B_bar, C) in enumerate(found):
        kernel, state = np.zeros((L, len(C))), B_bar
        for t in range(L):
            kernel[t] = (C @ state).real
            state = A_bar @ state
        if cut is not None:
            kernel[cut:] = 0
        for t in range(L):
            y[:, t, :, h] = np.einsum("bs,sc->bc", u[:, t::-1, h], kernel[: t + 1])
    return y


def _dense(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def enter(layer, x):
    p = parameters(layer)
    return _dense(p, "input_linear", x) if layer.bottleneck is not None else x


def leave(layer, y, u, x, activation=gelu, swap=False):
    """The outputs (B, L, W) from those of the systems (B, L, c, H), their inputs u and the layer's x."""
    p = parameters(layer)
    y = y + u[:, :, None] * p["D"]
    if swap:
        y = np.swapaxes(y, 2, 3)
    y = gelu(y.reshape(*y.shape[:2], -1))
    if layer.gate is not None:
        gated = y if layer.gate == layer.channels else _dense(p, "output_gate", y)
        y = gated * gelu(_dense(p, "input_gate.0", x))
    if layer.reference == "lrnnx":
        y = gelu(y)
    return y if layer.final_act is None else activation(_dense(p, "output_linear.0", y))


def forward(layer, x, *, truncate=True, swap=None, activation=gelu, rate=1.0):
    """The layer on x (B, L, H); `truncate` as lrnnx does at l_max, `swap` None for what the layer says."""
    cut = None
    if truncate and layer.l_max is not None and layer.reference == "lrnnx":
        cut = round(layer.l_max / rate)
    u = enter(layer, x)
    swap = layer.swap_channels if swap is None else swap
    return leave(layer, respond(systems(layer, rate), u, cut), u, x, activation, swap)
