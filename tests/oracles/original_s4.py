"""S4Block, S4D and S4Model of state-spaces/s4 by their definitions: NumPy float64, one step after the other."""

import math
from types import SimpleNamespace

import numpy as np
from oracles import s4 as systems_of

BLOCK = {
    "bottleneck": None, "gate": None, "gate_act": None, "mult_act": None, "final_act": "glu", "activation": "gelu",
    "mode": "dplr", "disc": None, "channels": 1, "swap_channels": False, "bidirectional": False, "l_max": None,
    "bandlimit": None, "n_ssm": None, "is_real": False, "dt_fast": False, "dt_transform": "exp",
    "real_transform": "exp", "imag_transform": "none",
}  # fmt: skip


def glu(x):
    a, b = np.split(x, 2, -1)
    return a / (1 + np.exp(-b))


ACTIVATIONS = {
    None: lambda x: x, "id": lambda x: x, "gelu": systems_of.gelu, "glu": glu, "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}  # fmt: skip


def parameters(layer):
    return {name: np.asarray(value, np.float64) for name, value in layer.state_dict().items()}


def dense(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def block(kwargs, p, x, *, step=False, whole=False):
    """An S4Block on x (B, L, H); `step` as the reference steps, `whole` with the whole kernel."""
    k = SimpleNamespace(**{**BLOCK, **kwargs})
    v = None
    if k.gate is not None:
        v = ACTIVATIONS[k.gate_act](dense(p, "input_gate.0" if k.gate_act else "input_gate", x))
    u = dense(p, "input_linear", x) if k.bottleneck else x
    found = systems_of.systems(_view(k, p, u.shape[-1]))
    cut = None if step or whole or k.l_max is None else k.l_max
    if k.bidirectional:
        y = systems_of.respond(_rows(found, 0), u, cut)
        later = systems_of.respond(_rows(found, 1), u[:, ::-1], cut)[:, ::-1]
        y[:, :-1] += later[:, 1:]
    else:
        y = systems_of.respond(found, u, cut)
    y = y + u[:, :, None] * p["layer.D"]
    y = np.swapaxes(y, 2, 3) if k.swap_channels and not step else y
    y = ACTIVATIONS[k.activation](y.reshape(*y.shape[:2], -1))
    if v is not None:
        y = (y if k.gate == k.channels else dense(p, "output_gate", y)) * v
    y = ACTIVATIONS[k.mult_act](y)
    return y if k.final_act is None else ACTIVATIONS[k.final_act](dense(p, "output_linear.0", y))


def _view(k, p, H):
    """The systems of the block as `oracles.s4.systems` reads them."""
    names = {name.removeprefix("layer.kernel."): value for name, value in p.items() if name.startswith("layer.kernel.")}
    if k.bandlimit is not None:
        dt = systems_of.positive(np.sinh(names["inv_dt"]) if k.dt_fast else names["inv_dt"], k.dt_transform)
        A_imag = systems_of.positive(names["A_imag"], k.imag_transform)
        slow = dt * np.tile(A_imag, (H // len(A_imag), 1)) / (2 * math.pi) < k.bandlimit / 2
        names["C"] = names["C"] * slow[..., None]
    if "l_kernel" in names:
        names["layer.kernel.l_kernel"] = names.pop("l_kernel")
    disc = (k.disc or "zoh") if k.mode in ("diag", "s4d") else "bilinear"
    return SimpleNamespace(
        state_dict=lambda: names, d_inner=H, n_ssm=k.n_ssm or H, disc=disc, is_real=k.is_real, dt_fast=k.dt_fast,
        dt_transform=k.dt_transform, real_transform=k.real_transform, imag_transform=k.imag_transform,
    )  # fmt: skip


def _rows(found, half):
    return [(A, B, np.split(C, 2)[half]) for A, B, C in found]


def s4d(p, x, prefix=""):
    """The standalone S4D on x (B, L, H)."""
    p = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
    C = p["kernel.C"][..., 0] + 1j * p["kernel.C"][..., 1]
    A = -np.exp(p["kernel.log_A_real"]) + 1j * p["kernel.A_imag"]
    A_bar = np.exp(A * np.exp(p["kernel.log_dt"])[:, None])
    B_bar = (A_bar - 1) / A
    h, y = np.zeros((len(x), *A.shape), complex), np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = A_bar * h + B_bar * x[:, t, :, None]
        y[:, t] = 2 * (C * h).sum(-1).real + p["D"] * x[:, t]
    return glu(systems_of.gelu(y) @ p["output_linear.0.weight"][..., 0].T + p["output_linear.0.bias"])


def model(p, x, n_layers, prenorm):
    """S4Model on x (B, L, I)."""

    def norm(h, i):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h * p[f"norms.{i}.weight"] + p[f"norms.{i}.bias"]

    h = dense(p, "encoder", x)
    for i in range(n_layers):
        h = h + s4d(p, norm(h, i) if prenorm else h, f"s4_layers.{i}.")
        h = h if prenorm else norm(h, i)
    return dense(p, "decoder", h.mean(1))
