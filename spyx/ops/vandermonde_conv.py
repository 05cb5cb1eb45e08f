"""Causal convolution with the kernels of diagonal systems."""

from __future__ import annotations

from math import isqrt

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._recomputed import recomputed
from .convolution import fft_conv, plain_fft_conv
from .dispatch import platform_primitive
from .dtypes import float32_of, state_dtype
from .ssm_kernels import Number, Precision, vandermonde_kernel

_MOST_STATES = 128
"""With more of them the FFT is as fast as the recurrence."""


def vandermonde_conv(
    u: Float[Array, "T B H"], C: Number, dtA: Number, *, conj_sym: bool = False, precision: Precision = "highest"
) -> Float[Array, "T B c H"]:
    """`fft_conv(u, K)` with K = `vandermonde_kernel(C, dtA, T)`: the response of diagonal systems to inputs from t = 0.

    On CPU, where the kernels of `spyx.ops.native` are and n <= 128, it runs the recurrence instead: c T B H n complex
    multiplications, no array of states, and the rounding errors of a sequential float32 scan.

    Args:
        u: real input, shape (T, B, H).
        C: coefficients, real or complex, shape (c, H, n).
        dtA: logarithm of the discrete eigenvalues, real or complex, shape (H, n).
        conj_sym: `C` and `dtA` hold one of each conjugate pair: the real part counts twice.
        precision: of the matrix products, where there are any.

    Returns:
        y, shape (T, B, c, H), float32 or wider. Reverse-mode differentiable to any order.

    Raises:
        ValueError: shapes do not fit. TypeError: values are not floating point or complex.

    Source: S4D (arXiv:2206.11893).
    """
    u, C, dtA = jnp.asarray(u), jnp.asarray(C), jnp.asarray(dtA)
    if u.ndim != 3 or C.ndim != 3 or C.shape[1] != u.shape[2]:
        raise ValueError(f"u must have shape (T, B, H) and C (c, H, n), got u {u.shape} and C {C.shape}")
    vandermonde_kernel(C, dtA, 0)
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise TypeError(f"u must be real floating point, got {u.dtype}")
    return _conv((conj_sym, precision), (u, C, dtA), None)


def _plain(how, values, masks, conv=plain_fft_conv):
    del masks
    (conj_sym, precision), (u, C, dtA) = how, values
    K = vandermonde_kernel(C, dtA, u.shape[0], conj_sym=conj_sym, precision=precision)
    u = u.astype(state_dtype(u, K))
    if 0 in (*u.shape, *C.shape):
        return jnp.zeros((*u.shape[:2], *C.shape[:2]), u.dtype)
    return conv(u, jnp.moveaxis(K, -1, 0))


def _forward(u, C, dtA, *, how):
    return _plain(how, (u, C, dtA), None, fft_conv)


def _adjoint(u, C, dtA, dy, *, how):
    return jax.vjp(lambda *values: _plain(how, values, None, fft_conv), u, C, dtA)[1](dy)


def _parts(C, dtA, conj_sym) -> tuple[Float[Array, "2 n H"], Float[Array, "c 2 n H"]]:
    """exp(dtA) - 1 and the readout, as the kernels take them."""
    re, im = (v.astype(jnp.float32).T for v in (dtA.real, dtA.imag))
    grown = jnp.expm1(re)
    G = jnp.stack([grown * jnp.cos(im) - 2 * jnp.sin(im / 2) ** 2, (1 + grown) * jnp.sin(im)])
    w = (2 if conj_sym else 1) * jnp.stack([C.real, C.imag], 1).astype(jnp.float32)
    return G, jnp.swapaxes(w, 2, 3)


def _fits(u, C, dtA) -> bool:
    return state_dtype(u, C.real, dtA.real) == jnp.float32 and 0 < dtA.shape[1] <= _MOST_STATES and u.size > 0


def _sizes(u, w) -> tuple[int, ...]:
    T, B, H = u.shape
    return T, B, H, w.shape[2], w.shape[0], min(T, max(64, isqrt(T)))


def _native_forward(u, C, dtA, *, how):
    if not _fits(u, C, dtA):
        return _forward(u, C, dtA, how=how)
    from .native import convolution
    from .native.custom_call import invoke

    G, w = _parts(C, dtA, how[0])
    T, B, H, _, c, _ = sizes = _sizes(u, w)
    items = B * c * -(-H // convolution.WIDTH)
    return invoke(convolution.forward, items, sizes, (u.astype(jnp.float32), G, w), float32_of((T, B, c, H)))


def _native_adjoint(u, C, dtA, dy, *, how):
    if not _fits(u, C, dtA):
        return _adjoint(u, C, dtA, dy, how=how)
    from .native import convolution
    from .native.custom_call import invoke

    (G, w), pull = jax.vjp(lambda C, dtA: _parts(C, dtA, how[0]), C, dtA)
    T, B, H, n, c, _ = sizes = _sizes(u, w)
    results = [*map(float32_of, ((T, B, H), (B, 2, n, H), (B, c, 2, n, H)))]
    operands = (u.astype(jnp.float32), G, w, dy.astype(jnp.float32))
    du, dG, dw = invoke(convolution.backward, B * -(-H // convolution.WIDTH), sizes, operands, results)
    return du.astype(u.dtype), *pull((dG.sum(0), dw.sum(0)))


_forward_by_platform = platform_primitive("vandermonde_conv", _forward, native=_native_forward)
_adjoint_by_platform = platform_primitive("vandermonde_conv_adjoint", _adjoint, native=_native_adjoint)
_conv = recomputed(
    lambda how, values, masks: (_forward_by_platform(*values, how=how), ()),
    lambda how, values, masks, saved, dy: _adjoint_by_platform(*values, dy, how=how),
    _plain,
)
