"""The S5 layers of lindermanlab/S5 and s5-pytorch in 64 bits, loop by loop, from their state_dicts alone."""

from math import erf

import numpy as np

_gelu = np.vectorize(lambda v: v * (1 + erf(v / 2**0.5)) / 2, otypes=[np.float64])


def _wide(values):
    return {
        name: np.asarray(v).astype(np.complex128 if np.iscomplexobj(v) else np.float64) for name, v in values.items()
    }


def _pairs(value):
    return value[..., 0] + 1j * value[..., 1]


def flax_s5(weights, x, *, discretization="zoh", conj_sym=True, clip_eigs=False, step_rescale=1.0):
    """(L, H) or (B, L, H) -> the same; bidirectional if there are two matrices C or twice the columns."""
    w, x = _wide(weights), np.asarray(x, np.float64)
    if x.ndim == 3:
        how = {"discretization": discretization, "conj_sym": conj_sym, "clip_eigs": clip_eigs}
        return np.array([flax_s5(weights, row, step_rescale=step_rescale, **how) for row in x]).reshape(x.shape)
    re = np.where(w["Lambda_re"] > -1e-4, -1e-4, w["Lambda_re"]) if clip_eigs else w["Lambda_re"]
    A, B, dt = re + 1j * w["Lambda_im"], _pairs(w["B"]), step_rescale * np.exp(w["log_step"][:, 0])
    if discretization == "zoh":
        A_bar, B_bar = np.exp(A * dt), ((np.exp(A * dt) - 1) / A)[:, None] * B
    else:
        A_bar, B_bar = (2 + dt * A) / (2 - dt * A), (2 * dt / (2 - dt * A))[:, None] * B
    n = len(A)
    C = (
        [_pairs(w[name]) for name in ("C1", "C2")]
        if "C1" in w
        else np.split(_pairs(w["C"]), _pairs(w["C"]).shape[1] // n, 1)
    )
    y = w["D"] * x
    for matrix, steps in zip(C, (range(len(x)), range(len(x))[::-1]), strict=False):
        h = np.zeros(n, complex)
        for t in steps:
            h = A_bar * h + B_bar @ x[t]
            y[t] += (2 if conj_sym else 1) * (matrix @ h).real
    return y


def s5_pytorch(weights, x, step_scale=1.0, state=None, *, liquid=False, degree=1):
    """(y (B, L, H), last state (B, P)) of s5-pytorch's S5; bidirectional if C has 2 P columns."""
    w, x = _wide({name.removeprefix("seq."): value for name, value in weights.items()}), np.asarray(x, np.float64)
    A, P = w["Lambda"], len(w["Lambda"])
    B, C = (w["BP"] @ w["BH"].T, w["CH"].T @ w["CP"]) if "BH" in w else (_pairs(w["B"]), w["C"])
    scale = np.asarray(step_scale, np.float64)
    scale = np.broadcast_to(scale[:, None] if scale.ndim == 1 else scale, x.shape[:2])
    y, last = w["D"] * x, np.zeros((len(x), P), complex)
    for b, row in enumerate(x):
        for columns, steps in ((C[:, :P], range(len(row))), (C[:, P:], range(len(row))[::-1])):
            if not columns.size:
                continue
            ahead = steps.step > 0
            h = np.array(state[b], complex) if ahead and state is not None else np.zeros(P, complex)
            for t in steps:
                A_bar = np.exp(A * scale[b, t] * np.exp(w["log_step"]))
                drive = (((A_bar - 1) / A)[:, None] * B) ** degree @ row[t]
                h = (A_bar + drive if liquid and ahead else A_bar) * h + drive
                y[b, t] += (columns @ h).real
            last[b] = h if ahead else last[b]
    return y, last


def s5_block(weights, x, **options):
    """y (B, L, H) of s5-pytorch's S5Block without dropout; gated if ff_enc is wider than ff_dec."""
    w, x = _wide(weights), np.asarray(x, np.float64)

    def norm(name, v):
        v = v - v.mean(-1, keepdims=True)
        v = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5)
        return v * w[f"{name}.weight"] + w[f"{name}.bias"]

    a = norm("attn_norm", x)
    inner = {name.removeprefix("s5."): value for name, value in weights.items() if name.startswith("s5.")}
    b = norm("ff_norm", _gelu(s5_pytorch(inner, a, **options)[0]) + a)
    hidden, width = b @ w["ff_enc.weight"].T, w["ff_dec.weight"].shape[1]
    if hidden.shape[-1] == 2 * width:
        hidden = hidden[..., :width] * _gelu(hidden[..., width:])
    return hidden @ w["ff_dec.weight"].T + b
