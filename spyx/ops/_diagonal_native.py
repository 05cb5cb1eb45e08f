"""The compiled kernel of a small diagonal state-space layer behind arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from ._rglru_native import MOST_WEIGHTS


def fits(x: Float[Array, "T B H"], A_bar: Array, gain: Array, B: Array, C: Array, D: Array, h0: Array | None) -> bool:
    """Whether `forward` takes these values, and gains by it."""
    reals, complexes = (x, D), jax.tree.leaves((A_bar, gain, B, C, h0))
    few = 0 < B.size + C.size <= MOST_WEIGHTS // 2
    dtypes = all(v.dtype == jnp.float32 for v in reals) and all(v.dtype == jnp.complex64 for v in complexes)
    return few and x.size > 0 and dtypes


def forward(
    x: Float[Array, "T B H"],
    A_bar: Complex[Array, " P"] | Complex[Array, "T B P"],
    gain: Complex[Array, " P"],
    B: Complex[Array, "P H"],
    C: Complex[Array, "H P"],
    D: Float[Array, " H"],
    h0: Complex[Array, "B P"] | None,
    lengths: Int[Array, " B"] | None,
    *,
    conj_sym: bool,
) -> tuple[Float[Array, "T B H"], Complex[Array, "B P"]]:
    """y_t = Re(C h_t) + D x_t of h_t = A_t h_{t-1} + g B x_t, 0 past `lengths`, and the last state.

    Arguments are those of `spyx.ops.diagonal_ssm`; A_bar may vary, and `gain` is g.
    """
    from .native import diagonal
    from .native.custom_call import invoke

    T, rows, H = x.shape
    P = B.shape[0]
    operands = (
        jnp.swapaxes(x, 0, 1),
        jnp.full((rows,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32),
        A_bar,
        gain,
        B,
        C,
        D,
        jnp.zeros((rows, P), jnp.complex64) if h0 is None else h0,
    )
    results = [jax.ShapeDtypeStruct((rows, T, H), jnp.float32), jax.ShapeDtypeStruct((rows, P), jnp.complex64)]
    y, h = invoke(diagonal.forward, rows, (T, rows, H, P, A_bar.ndim > 1, conj_sym), operands, results)
    return jnp.swapaxes(y, 0, 1), h
