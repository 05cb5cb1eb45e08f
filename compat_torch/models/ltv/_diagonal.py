"""A diagonal state-space layer whose system varies: with time, with the row of the batch, with its input."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import linear_scan
from spyx.ops.dtypes import state_dtype, to_complex


def project(
    x: Float[Array, "*L H"], B: Complex[Array, "P H"], precision: jax.lax.PrecisionLike
) -> Complex[Array, "*L P"]:
    """x B^T, as real products."""
    dot = partial(jnp.einsum, "...h,ph->...p", x, precision=precision)
    return to_complex(dot(B.real), dot(B.imag))


def read_out(
    h: Complex[Array, "*L P"], C: Complex[Array, "H P"], conj_sym: bool, precision: jax.lax.PrecisionLike
) -> Float[Array, "*L H"]:
    """Re(h C^T), as real products; twice that with `conj_sym`."""
    dot = partial(jnp.einsum, "...p,hp->...h", precision=precision)
    y = dot(h.real, C.real) - dot(h.imag, C.imag)
    return 2 * y if conj_sym else y


def varying_ssm(
    x: Float[Array, "L B H"],
    A_bar: Complex[Array, "..."],
    B: Complex[Array, "P H"],
    C: Complex[Array, "H P"],
    D: Float[Array, " H"] | None = None,
    h0: Complex[Array, "B P"] | None = None,
    *,
    gain: Complex[Array, "..."] | float = 1.0,
    liquid: bool = False,
    lengths: Int[Array, " B"] | None = None,
    reverse: bool = False,
    conj_sym: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "L B H"], Complex[Array, "B P"]]:
    """h_t = A_t h_{t-1} + g_t B x_t, y_t = Re(C h_t) + D x_t; holds arrays of size (L, B, P).

    Args:
        x: real, shape (L, B, H); 0 past `lengths`.
        A_bar: A_t: shape (P,), (B, P) or (L, B, P).
        B, C, D: as in `spyx.ops.diagonal_ssm`; B and C are complex.
        h0: state before the first step, shape (B, P); None is zero.
        gain: g_t, a number, or shaped as `A_bar`.
        liquid: g_t B x_t is added to A_t.
        lengths, reverse: as in `spyx.ops.linear_scan`.
        conj_sym: one of each conjugate pair is stored: the real part counts twice.
        precision: of every matrix product, as in `jax.lax.dot`.

    Returns:
        (y (L, B, H), in float32 or wider, last state (B, P)).

    Source: S5 (arXiv:2208.04933), Event-SSM (arXiv:2404.18508), Liquid-S4 (arXiv:2209.12951).
    """
    x = jnp.asarray(x, state_dtype(x, A_bar))
    drive = gain * project(x, B, precision)
    h, last = linear_scan(A_bar + drive if liquid else A_bar, drive, h0, lengths=lengths, reverse=reverse)
    y = read_out(h, C, conj_sym, precision)
    return (y if D is None else y + D * x), last
