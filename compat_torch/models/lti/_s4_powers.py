"""Diagonal plus low-rank steps, and the convolution kernel from their powers.

One bilinear step of x' = (Lambda - P P^*) x + B u over n conjugate pairs is h <- h + G h - U Re(V h) + B_bar u, with r
real feedbacks; so is a run of F steps, with F r of them. A kernel of L steps then needs about sqrt(L) states
A_bar^k B_bar, and as many readouts C A_bar^(j F): all products of them are the kernel. Nothing of size n^2 exists.
G is kept rather than 1 + G: rounded, that would be off by the same amount at every step.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from spyx.ops import fft_conv
from spyx.ops._recomputed import recomputed
from spyx.ops.convolution import plain_fft_conv
from spyx.ops.dispatch import platform_primitive

from ._s4_diagonal import read_out

_BLOCK = 2**16  # states in the tables alive at once, unless one channel needs more


class Transition(NamedTuple):
    """One step h <- h + G h - U Re(V h) + B_bar u on one of each conjugate pair.

    Shapes G (H, n), U and V (r, H, n), B_bar (H, n).
    """

    G: Complex[Array, "H n"]
    U: Complex[Array, "r H n"]
    V: Complex[Array, "r H n"]
    B_bar: Complex[Array, "H n"]


def transition(
    dt: Float[Array, "H *n"], A: Complex[Array, "H n"], B: Complex[Array, "H n"], P: Complex[Array, "r H n"]
) -> Transition:
    """The bilinear step of x' = (A - P P^*) x + B u, by the Woodbury identity."""
    D = 1 / (2 / dt - A)
    Q = 2 * jnp.conj(P) * D
    loop = jnp.eye(P.shape[0], dtype=dt.dtype)[..., None] + jnp.sum(Q[:, None] * P, -1).real
    S = 1 / loop if P.shape[0] == 1 else jnp.moveaxis(jnp.linalg.inv(jnp.moveaxis(loop, -1, 0)), 0, -1)
    W = jnp.sum(S[..., None] * Q, 1)
    B_bar = 2 * D * (B - jnp.sum(P * jnp.sum(W * B, -1, keepdims=True).real, 0))
    return Transition(2 * A * D, D * P, 4 / dt * W, B_bar)


def advance(
    s: Transition,
    h: Complex[Array, "*B H n"],
    u: Float[Array, "*B H"] | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Complex[Array, "*B H n"]:
    """The state after one step; without an input, A_bar h."""
    feedback = read_out(s.V, h, precision)[..., None]
    change = s.G * h - jnp.sum(s.U * feedback, -3)
    return h + (change if u is None else change + s.B_bar * u[..., None])


@partial(jax.jit, static_argnames=("L", "precision"))
def kernel(
    s: Transition, C: Complex[Array, "c H n"], L: int, precision: jax.lax.PrecisionLike
) -> Float[Array, "c H L"]:
    """2 Re(C A_bar^l B_bar) for l < L, in blocks of channels: the tables of one block are alive at once."""
    (rank, H, n), channels = s.U.shape, C.shape[0]
    if 0 in (*C.shape, L):
        return jnp.zeros((channels, H, L), s.G.real.dtype)
    fits = (size for size in range(H, 0, -1) if H % size == 0 and size * _fine(L) * (1 + rank) * n <= _BLOCK)
    size = next(fits, 1)
    if size == H:
        return _kernel(s, C, L, precision)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-2], H // size, size, n), -3, 0)

    part = jax.checkpoint(partial(_kernel, L=L, precision=precision))
    K = jax.lax.map(lambda block: part(*block), (jax.tree.map(cut, s), cut(C)))
    return jnp.moveaxis(K, 0, 1).reshape(channels, H, L)


def _kernel(s: Transition, C: Complex[Array, "c H n"], L: int, precision) -> Float[Array, "c H L"]:
    channels, H, _ = C.shape
    run = _Run.of(s, _fine(L), precision)
    rows = _readouts(run, C, -(-L // _fine(L)), precision)[1]
    K = 2 * jnp.einsum("jhcn,hkn->chjk", rows, _functionals(run.states), precision=precision)
    return K.reshape(channels, H, -1)[..., :L]


@partial(jax.jit, static_argnames=("M", "precision"))
def readout_after(
    s: Transition, C: Complex[Array, "c H n"], M: int, precision: jax.lax.PrecisionLike
) -> Complex[Array, "c H n"]:
    """C A_bar^M."""
    fine = _fine(M)

    def step(C, _):
        weights = jnp.sum(C[:, None] * s.U, -1, keepdims=True).real
        return C + (s.G * C - jnp.sum(weights * s.V, 1)), None

    C = jax.lax.scan(step, C, None, length=M % fine)[0]
    if C.size == 0 or fine > M:
        return C
    return _unpaired(_readouts(_Run.of(s, fine, precision), C, M // fine, precision)[0])


def outputs(
    s: Transition, C: Complex[Array, "c H n"], u: Float[Array, "L B H"], precision: jax.lax.PrecisionLike
) -> Float[Array, "L B c H"]:
    """What inputs make of a zero state: the convolution with `kernel`, or, by the kernels for CPU, step by step."""
    return _outputs(precision, (s, C, u), None)


def _convolved(precision, values, masks=None, conv=fft_conv):
    del masks
    s, C, u = values
    return conv(u, jnp.moveaxis(kernel(s, C, u.shape[0], precision), -1, 0))


def _plain(precision, values, masks):
    empty = 0 in values[2].shape
    return _convolved(precision, values, masks, fft_conv if empty else plain_fft_conv)


def _stepped(s: Transition, C, u, *, precision):
    if {jnp.result_type(v, jnp.float32) for v in (u, s.G.real, C.real)} != {jnp.dtype(jnp.float32)} or 0 in u.shape:
        return _convolved(precision, (s, C, u))
    from spyx.ops.native import low_rank
    from spyx.ops.native.custom_call import invoke

    def parts(v):
        return jnp.swapaxes(jnp.stack([v.real, v.imag], -3), -1, -2)

    (L, B, H), (c, _, n) = u.shape, C.shape
    systems = parts(s.G), parts(s.U), parts(s.V), parts(s.B_bar), parts(2 * C)
    result = jax.ShapeDtypeStruct((L, B, c, H), jnp.float32)
    items, sizes = B * -(-H // low_rank.WIDTH), (L, B, H, n, c, s.U.shape[0])
    return invoke(low_rank.forward, items, sizes, (u.astype(jnp.float32), *systems), result)


_outputs_by_platform = platform_primitive(
    "dplr_outputs", lambda s, C, u, *, precision: _convolved(precision, (s, C, u)), native=_stepped
)
_outputs = recomputed(
    lambda precision, values, masks: (_outputs_by_platform(*values, precision=precision), ()),
    lambda precision, values, masks, saved, dy: jax.vjp(partial(_convolved, precision), values)[1](dy)[0],
    _plain,
)


class _Run(NamedTuple):
    """F steps at once: C A_bar^F = C D - sum_k Re(C U_k) V_k, k running over F r feedbacks.

    Shapes: D (H, n); U and V, as real products, (H, F r, 2 n); and the states A_bar^k B_bar, k < F, (F, H, n).
    """

    D: Complex[Array, "H n"]
    U: Float[Array, "H k N"]
    V: Float[Array, "H k N"]
    states: Complex[Array, "F H n"]

    @classmethod
    def of(cls, s: Transition, fine: int, precision: jax.lax.PrecisionLike) -> _Run:
        def ahead(X, _):
            return advance(s, X, precision=precision), X

        def back(power, _):
            return power + s.G * power, power

        rank, H, n = s.U.shape
        columns = jax.lax.scan(ahead, jnp.concatenate([s.B_bar[None], s.U]), None, length=fine)[1]
        D, powers = jax.lax.scan(back, jnp.ones_like(s.G), None, length=fine, reverse=True)
        U = _functionals(columns[:, 1:].reshape(fine * rank, H, n))
        V = _pairs((powers[:, None] * s.V).reshape(fine * rank, H, n))
        return cls(D, U, V, columns[:, 0])


def _readouts(run: _Run, C: Complex[Array, "c H n"], count: int, precision) -> tuple[Array, Float[Array, "j H c N"]]:
    """C A_bar^(j F) as `_pairs`: for j = count, and for all j < count."""
    dot = partial(jnp.einsum, precision=precision)

    def onward(R, _):
        feedback = dot("hck,hkn->hcn", dot("hcn,hkn->hck", R, run.U), run.V)
        return _pairs(_unpaired(R) * run.D) - feedback, R

    return jax.lax.scan(onward, _pairs(C), None, length=count)


def _fine(L: int) -> int:
    """Steps of one run: a power of two near sqrt(L)."""
    return 2 ** round((L - 1).bit_length() / 2)


def _pairs(rows: Complex[Array, "k H n"]) -> Float[Array, "H k N"]:
    """(re, im), by channel."""
    return jnp.moveaxis(jnp.concatenate([rows.real, rows.imag], -1), 1, 0)


def _unpaired(R: Float[Array, "H k N"]) -> Complex[Array, "k H n"]:
    re, im = jnp.split(jnp.moveaxis(R, 1, 0), 2, -1)
    return jax.lax.complex(re, im)


def _functionals(columns: Complex[Array, "k H n"]) -> Float[Array, "H k N"]:
    """What gives Re(row column) as a product with `_pairs(row)`."""
    return _pairs(jnp.conj(columns))
