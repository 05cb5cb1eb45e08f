"""How a diagonal plus low-rank system steps: "dense", "linear" or "diagonal", each with a cache of its own.

linear: the cache of the kernel itself, O(r n) a channel.
dense: lrnn_state (B, H, 2 n), the states and their conjugates; dA (H, 2 n, 2 n), dB (H, 2 n), dC (c, H, 2 n).
diagonal: the same in the eigenbasis of A_bar, where dA is (H, 2 n), with the basis V and its inverse (H, 2 n, 2 n).

HiPPO matrices are far from normal: in their eigenbasis the parts of an output are a thousand times its size for 8
states, and more for more. What is "diagonal" is therefore computed in float64; all its arrays have a last axis of 4:
(re, im), and what is left of them where that is float32.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from spyx.ops.dtypes import to_complex

from ...core.compiled import compiled
from ..lti import _s4_dplr as dplr
from ..lti._s4_diagonal import read_out
from ..lti._s4_kernels import Cache, Dropout, SSMKernelDPLR, half, whole
from ..lti._s4_powers import transition

StepMode = Literal["dense", "linear", "diagonal"]
Parts = tuple[Float[Array, "..."], Float[Array, "..."]]

_RESIDUAL = 1e-6  # of V diag(dA) V^-1 - A_bar, relative to the largest element of A_bar


def mode_of(cache: Any) -> StepMode:
    """The mode that a cache is for."""
    if "V" in cache:
        return "diagonal"
    return "dense" if "dA" in cache else "linear"


def zero_cache(kernel: SSMKernelDPLR, batch_size: int, mode: StepMode) -> Cache:
    """The cache before the first step, with the matrices of the parameters as they are now.

    Raises:
        ValueError: "diagonal" for a matrix whose eigenvectors are too ill-conditioned (not seen while tracing).
    """
    if mode == "linear":
        return kernel.zero_state(batch_size)
    matrices = _dense_matrices(kernel) if mode == "dense" else _diagonal_matrices(kernel)
    dB = matrices["dB"]
    return {"lrnn_state": jnp.zeros((batch_size, *dB.shape), dB.dtype), **matrices}


@compiled
def respond(
    kernel: SSMKernelDPLR,
    u: Float[Array, "L B H"],
    cache: Cache,
    valid: Bool[Array, "L B"] | None,
    drop: Dropout | None,
) -> tuple[Float[Array, "L B c H"], Cache]:
    """As `Kernel.respond`, from and to a cache of any mode."""
    mode, state = mode_of(cache), cache["lrnn_state"]
    if mode == "linear":
        return kernel.respond(u, cache, valid, drop)
    if mode == "dense":
        y, h = kernel.run(u, half(state), half(cache["dC"]), valid, drop)
        return y, {**cache, "lrnn_state": whole(h).astype(state.dtype)}
    y, h = kernel.run(u, _from_eigenbasis(cache["V"], state), kernel.readout(), valid, drop)
    return y, {**cache, "lrnn_state": _to_eigenbasis(cache["V_inv"], h)}


@compiled
def update(kernel: SSMKernelDPLR, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
    """As `Kernel.update`, with a cache of any mode."""
    mode, state = mode_of(cache), cache["lrnn_state"]
    if mode == "linear":
        return kernel.update(u, cache)
    if mode == "dense":
        after = jnp.einsum("hmn,bhn->bhm", cache["dA"], state, precision=kernel.precision)
        after = (after + cache["dB"] * u[..., None]).astype(state.dtype)
        return read_out(cache["dC"], after), {**cache, "lrnn_state": after}
    with jax.enable_x64(True):
        (re, im), (b_re, b_im) = _times(_unpack(cache["dA"]), _unpack(state)), _unpack(cache["dB"])
        wide = u.astype(np.float64)[..., None]
        re, im = re + b_re * wide, im + b_im * wide
        y, _ = _times(_unpack(cache["dC"]), (re[:, None], im[:, None]))
        return jnp.sum(y, -1).astype(u.dtype), {**cache, "lrnn_state": _pack(re, im, state.dtype)}


@compiled
def _dense_matrices(kernel: SSMKernelDPLR) -> Cache:
    system, _ = kernel.continuous()
    on_parts, b = dplr.dense(system), transition(*system).B_bar
    n = b.shape[-1]
    (a, b_), (c, d) = ((rows[..., :n], rows[..., n:]) for rows in (on_parts[:, :n], on_parts[:, n:]))
    same, other = 0.5 * to_complex(a + d, c - b_), 0.5 * to_complex(a - d, c + b_)
    top = jnp.concatenate([same, other], -1)
    below = jnp.concatenate([jnp.conj(other), jnp.conj(same)], -1)
    return {"dA": jnp.concatenate([top, below], -2), "dB": whole(b), "dC": whole(kernel.readout())}


def _diagonal_matrices(kernel: SSMKernelDPLR) -> Cache:
    stored, C = kernel.continuous()
    dtype = stored.dt.dtype
    with jax.enable_x64(True):
        wide = [value.astype(np.complex128 if jnp.iscomplexobj(value) else np.float64) for value in (*stored, C)]
        system, C = dplr.Continuous(*wide[:-1]), wide[-1]
        A, b = dplr.dense(system), transition(*system).B_bar
        C = dplr.relength(system, C, kernel.l_kernel[...], 0, kernel.precision)
        dA, V = jnp.linalg.eig(A)
        V_inv = jnp.linalg.inv(V)
        rebuilt = jnp.matmul(V * dA[:, None], V_inv, precision=kernel.precision)
        error = jnp.where(jnp.isfinite(rebuilt), jnp.abs(rebuilt - A), jnp.inf)
        _check_residual(kernel.owner, jnp.max(error, initial=0.0), jnp.max(jnp.abs(A), initial=1.0))
        rows = 2 * jnp.concatenate([C.real, -C.imag], -1)
        matrices = {
            "dA": dA,
            "dB": jnp.sum(V_inv * jnp.concatenate([b.real, b.imag], -1)[:, None], -1),
            "dC": jnp.sum(rows[..., None] * V, -2),
            "V": V,
            "V_inv": V_inv,
        }
        return {name: _pack(value.real, value.imag, dtype) for name, value in matrices.items()}


def _check_residual(owner: str, residual: Array, size: Array) -> None:
    if not isinstance(residual, Tracer) and not float(residual) <= _RESIDUAL * float(size):
        raise ValueError(
            f'{owner}: mode="diagonal" needs eigenvectors of A_bar that can be inverted in float64, but what they '
            f'give back is off by {float(residual):.0e}; use mode="linear" or "dense"'
        )


def _from_eigenbasis(V: Float[Array, "H N N 4"], state: Float[Array, "B H N 4"]) -> Array:
    """The states h (B, H, n)."""
    with jax.enable_x64(True):
        s_re, s_im = _unpack(state)
        re, _ = _times(_unpack(V), (s_re[:, :, None], s_im[:, :, None]))
        parts = jnp.sum(re, -1).astype(state.dtype)
    n = parts.shape[-1] // 2
    return to_complex(parts[..., :n], parts[..., n:])


def _to_eigenbasis(V_inv: Float[Array, "H N N 4"], h: Array) -> Float[Array, "B H N 4"]:
    parts = jnp.concatenate([h.real, h.imag], -1)[:, :, None]
    with jax.enable_x64(True):
        re, im = (jnp.sum(part * parts.astype(np.float64), -1) for part in _unpack(V_inv))
        return _pack(re, im, V_inv.dtype)


def _times(a: Parts, b: Parts) -> Parts:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _pack(re: Array, im: Array, dtype: Any) -> Float[Array, "... 4"]:
    high = jnp.stack([re, im], -1)
    low = high - high.astype(dtype).astype(high.dtype)
    return jnp.concatenate([high, low], -1).astype(dtype)


def _unpack(packed: Float[Array, "... 4"]) -> Parts:
    """(re, im) in float64."""
    wide = packed.astype(np.float64)
    parts = wide[..., :2] + wide[..., 2:]
    return parts[..., 0], parts[..., 1]
