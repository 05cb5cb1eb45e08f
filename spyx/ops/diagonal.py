"""A whole linear time-invariant layer with a diagonal state matrix."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from . import _streamed
from ._blocked import is_complex, join, split
from ._recomputed import recomputed
from ._streamed import System
from .dtypes import state_dtype
from .scan import (
    How,
    Method,
    check_lengths,
    check_method,
    check_reset,
    scan_dtype,
    streamed_scan,
    streams,
    valid_steps,
)
from .scan import plain as plain_scan

Matrix = Float[Array, "_ _"] | Complex[Array, "_ _"]
Precision = jax.lax.PrecisionLike


def diagonal_ssm(
    u: Float[Array, "T B H"],
    lam: Float[Array, " N"] | Complex[Array, " N"],
    B: Matrix,
    C: Matrix,
    D: Float[Array, " H"] | Float[Array, "K H"] | None = None,
    h0: Complex[Array, "B N"] | Float[Array, "B N"] | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, "T *B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    conj_sym: bool = False,
    return_state: bool = False,
    method: Method = "auto",
    precision: Precision = None,
    batch_first: bool = False,
):
    """h_t = lam h_{t-1} + B u_t, y_t = Re(C h_t) + D u_t: projections, scan and readout of a diagonal SSM.

    Args:
        u: real input, shape (T, B, H).
        lam: discrete eigenvalues, real or complex, shape (N,).
        B: input matrix, real or complex, shape (N, H).
        C: output matrix, real or complex, shape (K, N); usually K = H.
        D: feedthrough: shape (H,), elementwise (K = H), or (K, H); None is 0.
        h0: state before the first step, shape (B, N); None is zero.
        reverse, reset, lengths: as in `linear_scan`.
        method: as in `linear_scan`, for the layer as a whole: "blocked", which "auto" takes on CPU
            with the hand kernel for its scan, makes projection, scan and readout of one block of steps before
            the next, forward and backward, and holds no array of size (T, B, N).
        conj_sym: `lam`, `B`, `C` hold one of each conjugate pair: the real part counts twice.
        return_state: also return the last state computed.
        precision: of every matrix product, as in `jax.lax.dot`.
        batch_first: `u` is (B, T, H) and y (B, T, K): a CPU then computes without turning them.

    Returns:
        y of shape (T, B, K) in the dtype of `u`; with `return_state`, `(y, state)` with state (B, N),
        complex if any of lam, B, h0 is, float32 or wider.

    Raises:
        ValueError: shapes do not fit. TypeError: dtypes do not fit.

    Source: S5 (arXiv:2208.04933), LRU (arXiv:2303.06349).
    """
    u, lam, B, C = jnp.asarray(u), jnp.asarray(lam), jnp.asarray(B), jnp.asarray(C)
    D = None if D is None else jnp.asarray(D)
    h0 = None if h0 is None else jnp.asarray(h0)
    reset = None if reset is None else jnp.asarray(reset)
    lengths = None if lengths is None else jnp.asarray(lengths)
    if u.ndim != 3:
        raise ValueError(f"u must have shape {'(B, T, H)' if batch_first else '(T, B, H)'}, got {u.shape}")
    u = jnp.swapaxes(u, 0, 1) if batch_first else u
    _check(u, lam, B, C, D, h0)
    check_method(method)
    if reset is not None:
        check_reset(reset, u.shape[:2])
    if lengths is not None:
        check_lengths(lengths, u.shape)
    y, state = _diagonal_ssm(
        u, lam, B, C, D, h0, reset, lengths,
        reverse=reverse, conj_sym=conj_sym, method=method, precision=_hashable(precision), batch_first=batch_first,
    )  # fmt: skip
    y = jnp.swapaxes(y, 0, 1) if batch_first else y
    return (y, state) if return_state else y


def diagonal_ssm_step(
    u: Float[Array, "B H"],
    h: Complex[Array, "B N"] | Float[Array, "B N"],
    lam: Float[Array, " N"] | Complex[Array, " N"],
    B: Matrix,
    C: Matrix,
    D: Float[Array, " H"] | Float[Array, "K H"] | None = None,
    *,
    conj_sym: bool = False,
    precision: Precision = None,
):
    """One step of `diagonal_ssm`: `(y, h_new)` from one input (B, H) and the state (B, N).

    Arguments, dtypes and errors are those of `diagonal_ssm`, without the time axis; but the state keeps its
    dtype (a real one becomes complex if the system is), so that it can be the carry of a scan.
    """
    u, h, lam, B, C = (jnp.asarray(v) for v in (u, h, lam, B, C))
    D = None if D is None else jnp.asarray(D)
    if u.ndim != 2:
        raise ValueError(f"u must have shape (B, H), got {u.shape}")
    _check(u[None], lam, B, C, D, h)
    return _step(u, h, lam, B, C, D, conj_sym=conj_sym, precision=_hashable(precision))


def _hashable(precision):
    return tuple(precision) if isinstance(precision, list) else precision


def _check(u, lam, B, C, D, h0) -> None:
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise TypeError(f"u must be real floating point, got {u.dtype}")
    H, N = u.shape[-1], lam.shape[-1] if lam.ndim else 0
    K = C.shape[0] if C.ndim == 2 else H
    wanted = [("lam", lam, (N,)), ("B", B, (N, H)), ("C", C, (K, N))]
    if D is not None:
        wanted.append(("D", D, (K, H) if D.ndim == 2 or K != H else (H,)))
    if h0 is not None:
        wanted.append(("h0", h0, (u.shape[1], N)))
    for name, value, shape in wanted:
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for u of shape {u.shape}, got {value.shape}")
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")


def _project(u, B, precision):
    """u @ B^T as real products; complex if B is."""
    dot = partial(jnp.einsum, "...h,nh->...n", u, precision=precision)
    return jax.lax.complex(dot(B.real), dot(B.imag)) if jnp.iscomplexobj(B) else dot(B)


def _read_out(h, C, conj_sym, precision):
    """Re(C h) as real products, twice that with conj_sym."""
    dot = partial(jnp.einsum, "...n,kn->...k", precision=precision)
    y = dot(h.real, C.real)
    if jnp.iscomplexobj(h) and jnp.iscomplexobj(C):
        y = y - dot(h.imag, C.imag)
    return 2 * y if conj_sym else y


def _feed_through(u, D, precision):
    return D * u if D.ndim == 1 else jnp.einsum("...h,kh->...k", u, D, precision=precision)


def _cast(real, *values) -> tuple[Any, ...]:
    complex_ = jnp.result_type(real, jnp.complex64)
    return tuple(None if v is None else v.astype(complex_ if jnp.iscomplexobj(v) else real) for v in values)


class _How(NamedTuple):
    """Static arguments of a layer."""

    scan: How
    precision: Precision
    batch_first: bool

    @property
    def streamed(self) -> dict:
        return {
            "reverse": self.scan.reverse,
            "precision": self.precision,
            "batch_first": self.batch_first,
            "by_platform": self.scan.method == "auto",
        }


@partial(jax.jit, static_argnames=("reverse", "conj_sym", "method", "precision", "batch_first"))
def _diagonal_ssm(u, lam, B, C, D, h0, reset, lengths, *, reverse, conj_sym, method, precision, batch_first):
    T, batch = u.shape[:2]
    real, state = state_dtype(u, lam, B, C, D, h0), scan_dtype(lam, B, h0)
    state = jnp.result_type(real, state)
    h0 = jnp.zeros((batch, lam.shape[0]), state) if h0 is None else h0.astype(state)
    if T == 0:
        return jnp.zeros((T, batch, C.shape[0]), u.dtype), h0
    masks = (
        None if reset is None else reset.reshape(T, -1, 1, 1),
        None if lengths is None else valid_steps(lengths, T, 4),
    )
    system = _system(lam, B, 2 * C if conj_sym else C, D, state)
    how = _How(How(reverse, method), precision, batch_first)
    f = _recomputed if streams(method, T) else _plain
    if method == "pallas":
        f = partial(_plain, scan=streamed_scan)
    y, h_last = f(how, (system, u, split(h0, state, -2)), masks)
    return y, join(h_last, -2)


def _system(lam, B, C, D, state) -> System:
    """The system in real numbers, for states of dtype `state`."""
    real = jnp.finfo(state).dtype

    def parts(z):
        return split(z, state if jnp.iscomplexobj(z) else real, 0)

    C = parts(jnp.conj(C.T) if is_complex(state) else C.T.real)
    return System(parts(lam), parts(B), C, None if D is None else D.astype(real))


def _plain(how: _How, values, masks, scan=plain_scan):
    """The layer in plain JAX, differentiable in every mode `scan` is: `(y, h_last)`, h_last in parts."""
    (system, u, h0), valid = values, masks[1]
    inputs = _streamed.clear(u, valid, h0.dtype)
    x = _streamed.project(inputs, system.B, h0.shape[1], how.precision)
    flat = tuple(None if mask is None else mask[..., 0] for mask in masks)
    h, h_last = scan(how.scan, (join(system.lam, 0)[None], join(x, -2), join(h0, -2)), flat)
    y = _streamed.read_out(split(h, h.dtype, -2), inputs, system, how.precision)
    return _streamed.clear(y, valid, u.dtype), split(h_last, h_last.dtype, -2)


def _forward(how: _How, values, masks):
    def streamed(values, masks):
        y, h_last, before = _streamed.forward(*values, *masks, **how.streamed)
        return (y, h_last), before

    def parallel(values, masks):
        return _plain(how, values, masks, scan=streamed_scan), _streamed.saved_states(*values[1:])

    if how.scan.method == "blocked":
        return streamed(values, masks)
    return jax.lax.platform_dependent(values, masks, cpu=streamed, default=parallel)


def _adjoint(how: _How, values, masks, saved, cotangents):
    def streamed(values, masks, saved, cotangents):
        (system, u, h0), (reset, valid), (dy, dh_last) = values, masks, cotangents
        return _streamed.adjoint(system, u, h0, reset, valid, saved, dy, dh_last, **how.streamed)

    def parallel(values, masks, saved, cotangents):
        del saved
        layer = partial(_plain, how, masks=masks, scan=streamed_scan)
        return jax.vjp(layer, values)[1](cotangents)[0]

    args = values, masks, saved, cotangents
    if how.scan.method == "blocked":
        return streamed(*args)
    return jax.lax.platform_dependent(*args, cpu=streamed, default=parallel)


_recomputed = recomputed(_forward, _adjoint, _plain)


@partial(jax.jit, static_argnames=("conj_sym", "precision"))
def _step(u, h, lam, B, C, D, *, conj_sym, precision):
    """With products of its own: `_system` would copy and transpose B and C for every step."""
    out_dtype, kept = u.dtype, h.dtype
    u, h, lam, B, C, D = _cast(state_dtype(u, lam, B, C, D, h), u, h, lam, B, C, D)
    h = lam * h + _project(u, B, precision)
    y = _read_out(h, C, conj_sym, precision)
    if D is not None:
        y = y + _feed_through(u, D, precision)
    return y.astype(out_dtype), h.astype(jnp.result_type(kept, jnp.complex64) if jnp.iscomplexobj(h) else kept)
