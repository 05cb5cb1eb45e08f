"""Vandermonde and Cauchy products: the convolution kernels of diagonal and DPLR state-space layers.

Neither builds the (..., n, L) tensor of its definition, forward or backward.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .dtypes import state_dtype

Number = Float[Array, "..."] | Complex[Array, "..."]
Precision = jax.lax.PrecisionLike

_BLOCK = 2**19  # elements of the arrays alive at once, unless one head or node needs more
_FINE_MAX = 2**12  # steps that one table of powers covers: see `_turns`


def vandermonde_kernel(
    C: Number, dtA: Number, L: int, *, conj_sym: bool = False, precision: Precision = "highest"
) -> Float[Array, "*c H L"]:
    """K[..., h, l] = Re sum_n C[..., h, n] exp(l dtA[h, n]) for l < L: the kernel of a diagonal SSM.

    With C B_bar for `C` it is the convolution kernel of the layer; with C A_bar h0 it is what the initial
    state h0 adds to the outputs.

    Args:
        C: coefficients, real or complex, shape (..., H, n).
        dtA: logarithm of the discrete eigenvalues, dt A, real or complex, shape (H, n).
        L: number of steps, 0 to 2^24.
        conj_sym: `C` and `dtA` hold one of each conjugate pair: the real part counts twice.
        precision: of the matrix products, as in `jax.lax.dot`.

    Returns:
        K, real, shape (..., H, L), float32 or wider. In float32 the phase l Im(dtA) is reduced exactly, so the
        error does not grow with L or |Im(dtA)|: about 5e-7 of max|K|. Working memory beside the result is
        a few MB whatever n, forward and backward. Differentiable to any order in both modes.

    Raises:
        ValueError: shapes do not fit, or L out of range. TypeError: values are not floating point or complex.

    Source: S4D (arXiv:2206.11893).
    """
    C, dtA = jnp.asarray(C), jnp.asarray(dtA)
    if dtA.ndim != 2 or C.ndim < 2 or C.shape[-2:] != dtA.shape:
        raise ValueError(f"C must have shape (..., H, n) and dtA (H, n), got C {C.shape} and dtA {dtA.shape}")
    if not 0 <= L <= _FINE_MAX**2:
        raise ValueError(f"L must be between 0 and {_FINE_MAX**2}, got {L}")
    _check_inexact(("C", C), ("dtA", dtA))
    return _vandermonde(C, dtA, L=int(L), conj_sym=conj_sym, precision=precision)


def cauchy_kernel(
    v: Number, z: Number, w: Number, *, conj_sym: bool = False, precision: Precision = "highest"
) -> Complex[Array, "*S L"]:
    """r[..., l] = sum_n v[..., n] / (z[l] - w[..., n]): the kernel of a DPLR SSM in the frequency domain.

    Args:
        v: numerators, real or complex, shape (..., *S, n).
        z: nodes, real or complex, finite, shape (L,).
        w: poles, real or complex, shape (*S, n): the last axes of `v`.
        conj_sym: `v` and `w` hold one of each conjugate pair: conj(v) / (z - conj(w)) is added.
        precision: of the matrix products, as in `jax.lax.dot`.

    Returns:
        r, complex, shape (..., *S, L), complex64 or wider. Working memory beside the result is a few MB
        whatever n, forward and backward. Differentiable to any order in both modes; where a node meets a pole
        the result is not finite.

    Raises:
        ValueError: shapes do not fit. TypeError: values are not floating point or complex.

    Source: S4 (arXiv:2111.00396).
    """
    v, z, w = jnp.asarray(v), jnp.asarray(z), jnp.asarray(w)
    if z.ndim != 1:
        raise ValueError(f"z must have shape (L,), got {z.shape}")
    if w.ndim == 0 or v.ndim < w.ndim or v.shape[v.ndim - w.ndim :] != w.shape:
        raise ValueError(f"v must have shape (..., *S, n) and w (*S, n), got v {v.shape} and w {w.shape}")
    _check_inexact(("v", v), ("z", z), ("w", w))
    return _cauchy(v, z, w, conj_sym=conj_sym, precision=precision)


def _check_inexact(*named) -> None:
    for name, value in named:
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")


def _parts(value, dtype):
    """Real and imaginary part in a real dtype."""
    return value.real.astype(dtype), value.imag.astype(dtype)


@partial(jax.jit, static_argnames=("L", "conj_sym", "precision"))
def _vandermonde(C, dtA, *, L, conj_sym, precision):
    """exp(l a) = exp(i m a) exp(j a) for l = i m + j: one product of a coarse and a fine table per head."""
    dtype = state_dtype(C, dtA)
    (H, n), lead = dtA.shape, C.shape[:-2]
    if 0 in (*C.shape, L):
        return jnp.zeros((*lead, H, L), dtype)
    c = math.prod(lead)
    fine = min(_FINE_MAX, L, 2 ** round(math.log2(L * c) / 2))
    coarse = -(-L // fine)

    @jax.checkpoint
    def head(C, a):
        left = tuple(p.T for p in _powers(*a, coarse, fine))
        right = _powers(*a, fine, 1)
        left = _multiply(tuple(p[:, None] for p in C), left)
        if jnp.iscomplexobj(dtA):
            left = jnp.concatenate([left[0], -left[1]], axis=-1)
            right = jnp.concatenate(right, axis=0)
        else:
            left, right = left[0], right[0]
        K = jnp.einsum("cin,nj->cij", left, right, precision=precision)
        return K.reshape(c, -1)[:, :L]

    C = jnp.moveaxis(C.reshape(c, H, n), 1, 0)
    heads = _block(2 * n * (c * coarse + fine))
    K = jax.lax.map(lambda args: head(*args), (_parts(C, dtype), _parts(dtA, dtype)), batch_size=heads)
    K = jnp.moveaxis(K, 0, 1).reshape(*lead, H, L)
    return 2 * K if conj_sym else K


def _block(elements: int) -> int:
    return max(1, _BLOCK // elements)


def _multiply(a, b):
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _powers(a_re, a_im, count, stride):
    """Real and imaginary part of exp(stride l a) for l < count, shape (..., count)."""
    steps = jnp.arange(count, dtype=a_re.dtype)
    size = jnp.exp(a_re[..., None] * (stride * steps))
    if a_im.dtype == jnp.float32:
        cos, sin = _cos_sin(tuple(part[..., None] for part in _turns(a_im, stride)), steps)
    else:
        phase = a_im[..., None] * (stride * steps)
        cos, sin = jnp.cos(phase), jnp.sin(phase)
    return size * cos, size * sin


@_powers.defjvp
def _powers_jvp(count, stride, primals, tangents):
    powers = _powers(*primals, count, stride)
    steps = stride * jnp.arange(count, dtype=primals[0].dtype)
    return powers, _multiply(powers, tuple(steps * t[..., None] for t in tangents))


# 1 / (2 pi) in pieces of 12 bits, the last one rounded to float32.
_INVERSE_TURN = np.array(
    [float.fromhex(x) for x in ("0x1.45ep-3", "0x1.306p-15", "0x1.b9p-28", "0x1.c88p-39", "0x1.529fc2p-54")],
    np.float32,
)
_DIGIT = 2.0**12


def _turns(angle, multiple: int):
    """multiple * angle / (2 pi) modulo 1, `multiple` at most 2^12, as three float32 digits, coarsest first.

    The first digit is a multiple of 2^-12, the second of 2^-24, so that both can be multiplied by an
    integer up to 2^12 without rounding; together they are within 2^-40 of the exact value. Every product
    and difference but those of the last digit is exact.
    """
    bits = jax.lax.bitcast_convert_type(angle, jnp.int32) & jnp.int32(-(2**12))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    products = jnp.stack([high, angle - high])[..., None] * _INVERSE_TURN
    rest = products - jnp.round(products)
    first = jnp.round(rest * _DIGIT) / _DIGIT
    rest = rest - first
    second = jnp.round(rest * _DIGIT**2) / _DIGIT**2
    digits = tuple(jnp.sum(d, axis=(0, -1)) for d in (first, second, rest - second))
    return _carry(*(d * multiple for d in _carry(*digits)))


def _carry(first, second, third):
    carried = jnp.round(third * _DIGIT**2) / _DIGIT**2
    second, third = second + carried, third - carried
    carried = jnp.round(second * _DIGIT) / _DIGIT
    first = first - jnp.round(first) + carried
    return first - jnp.round(first), second - carried, third


def _cos_sin(turns, steps):
    """Cosine and sine of `steps` times the angle given by `_turns`, integers up to 2^12."""
    first, second, third = turns
    fraction = first * steps
    fraction = fraction - jnp.round(fraction) + second * steps
    quadrant = jnp.round(4 * fraction)
    angle = (fraction - quadrant / 4 + third * steps) * np.float32(2 * np.pi)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    quadrant = quadrant.astype(jnp.int32)
    odd = quadrant % 2 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    return jnp.where((quadrant + 1) & 2, -cos, cos), jnp.where(quadrant & 2, -sin, sin)


@partial(jax.jit, static_argnames=("conj_sym", "precision"))
def _cauchy(v, z, w, *, conj_sym, precision):
    dtype = state_dtype(v, z, w)
    n, shared = w.shape[-1], w.shape[:-1]
    lead, S, L = v.shape[: v.ndim - w.ndim], math.prod(shared), len(z)
    if 0 in (*v.shape, L):
        return jnp.zeros((*lead, *shared, L), jnp.result_type(dtype, jnp.complex64))
    node = jax.checkpoint(partial(_cauchy_pairs if conj_sym else _cauchy_node, precision=precision))
    alive = 8 * n  # the pairs z - w, z - conj(w) and their reciprocals
    nodes = min(L, _block(alive))

    def head(args):
        return jax.lax.map(lambda z: node(*args, *z), _parts(z, dtype), batch_size=nodes)

    v = jnp.moveaxis(v.reshape(-1, S, n), 1, 0)
    args = (_parts(v, dtype), _parts(w.reshape(S, n), dtype))
    r = jax.lax.map(head, args, batch_size=_block(alive * nodes))
    r = jax.lax.complex(*r)
    return jnp.moveaxis(r, (0, 1, 2), (1, 2, 0)).reshape(*lead, *shared, L)


def _cauchy_node(v, w, z_re, z_im, *, precision):
    """sum_n v / (z - w) for one node; v (e, n) and w (n) as pairs."""
    inverse = _reciprocal(z_re - w[0], z_im - w[1])
    dot = partial(jnp.einsum, "en,n->e", precision=precision)
    return dot(v[0], inverse[0]) - dot(v[1], inverse[1]), dot(v[0], inverse[1]) + dot(v[1], inverse[0])


def _cauchy_pairs(v, w, z_re, z_im, *, precision):
    """The sum over pairs, 2 sum_n (z Re v - Re(v conj w)) / ((z - w) (z - conj w))."""
    d = z_re - w[0]
    inverse = _multiply(_reciprocal(d, z_im - w[1]), _reciprocal(d, z_im + w[1]))
    dot = partial(jnp.einsum, "en,n->e", precision=precision)
    slope = _multiply((z_re, z_im), tuple(dot(v[0], part) for part in inverse))
    offset = tuple(dot(v[0] * w[0] + v[1] * w[1], part) for part in inverse)
    return tuple(2 * (s - o) for s, o in zip(slope, offset, strict=True))


@jax.custom_jvp
def _reciprocal(re, im):
    """1 / (re + i im) as a pair."""
    scale = 1 / (re * re + im * im)
    return re * scale, -im * scale


@_reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    inverse = _reciprocal(*primals)
    change = _multiply(_multiply(inverse, inverse), tangents)
    return inverse, tuple(-c for c in change)
