"""A whole linear time-invariant layer with a diagonal state matrix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from .dtypes import state_dtype
from .scan import Method, check_lengths, check_reset, linear_scan, valid_steps

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
):
    """h_t = lam h_{t-1} + B u_t, y_t = Re(C h_t) + D u_t: projections, scan and readout of a diagonal SSM.

    Args:
        u: real input, shape (T, B, H).
        lam: discrete eigenvalues, real or complex, shape (N,).
        B: input matrix, real or complex, shape (N, H).
        C: output matrix, real or complex, shape (K, N); usually K = H.
        D: feedthrough: shape (H,), elementwise (K = H), or (K, H); None is 0.
        h0: state before the first step, shape (B, N); None is zero.
        reverse, reset, lengths, method: as in `linear_scan`.
        conj_sym: `lam`, `B`, `C` hold one of each conjugate pair: the real part counts twice.
        return_state: also return the last state computed.
        precision: of every matrix product, as in `jax.lax.dot`.

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
        raise ValueError(f"u must have shape (T, B, H), got {u.shape}")
    _check(u, lam, B, C, D, h0)
    if reset is not None:
        check_reset(reset, u.shape[:2])
    if lengths is not None:
        check_lengths(lengths, u.shape)
    y, state = _diagonal_ssm(
        u, lam, B, C, D, h0, reset, lengths,
        reverse=reverse, conj_sym=conj_sym, method=method, precision=_hashable(precision),
    )  # fmt: skip
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

    Arguments, dtypes and errors are those of `diagonal_ssm`, without the time axis.
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


def _cast(real, *values):
    complex_ = jnp.result_type(real, jnp.complex64)
    return tuple(
        None if v is None else v.astype(complex_ if jnp.iscomplexobj(v) else real) for v in values
    )


@partial(jax.jit, static_argnames=("reverse", "conj_sym", "method", "precision"))
def _diagonal_ssm(u, lam, B, C, D, h0, reset, lengths, *, reverse, conj_sym, method, precision):
    out_dtype = u.dtype
    u, lam, B, C, D, h0 = _cast(state_dtype(u, lam, B, C, D, h0), u, lam, B, C, D, h0)
    if lengths is not None:
        u = jnp.where(valid_steps(lengths, u.shape[0], u.ndim), u, 0)
    h, state = linear_scan(
        lam, _project(u, B, precision), h0, reverse=reverse, reset=reset, lengths=lengths, method=method
    )
    y = _read_out(h, C, conj_sym, precision)
    if D is not None:
        y = y + _feed_through(u, D, precision)
    return y.astype(out_dtype), state


@partial(jax.jit, static_argnames=("conj_sym", "precision"))
def _step(u, h, lam, B, C, D, *, conj_sym, precision):
    out_dtype = u.dtype
    u, h, lam, B, C, D = _cast(state_dtype(u, lam, B, C, D, h), u, h, lam, B, C, D)
    h = lam * h + _project(u, B, precision)
    y = _read_out(h, C, conj_sym, precision)
    if D is not None:
        y = y + _feed_through(u, D, precision)
    return y.astype(out_dtype), h
