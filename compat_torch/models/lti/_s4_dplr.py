"""Diagonal plus low-rank single-input systems, one per channel, under the bilinear method.

x' = (Lambda - P P^*) x + B u over n conjugate pairs. A state h (B, H, n) holds one of each pair; y = 2 Re(C h).
The kernel comes from the generating function truncated at M steps, which needs C~ = C (I - A_bar^M).
Source: S4 (arXiv:2111.00396), appendix C.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from spyx.ops import cauchy_kernel
from spyx.ops.dtypes import to_complex

from ._s4_diagonal import read_out
from ._s4_powers import Transition, advance, readout_after, transition

_EXPONENT_BITS = 25
_CAUCHY_BLOCK = 2**16  # states times nodes of the channels whose sums are formed together
_BLOCK = 2**18  # elements of the dense matrices alive at once, unless one channel needs more


class Continuous(NamedTuple):
    """Shapes (H, 1) or (H, n), (H, n), (H, n), (r, H, n): steps, Lambda, B, P."""

    dt: Float[Array, "H *n"]
    A: Complex[Array, "H n"]
    B: Complex[Array, "H n"]
    P: Complex[Array, "r H n"]


@partial(jax.jit, static_argnames=("M", "L", "precision"))
def kernel(
    system: Continuous, C_tilde: Complex[Array, "c H n"], M: int, L: int, precision: jax.lax.PrecisionLike
) -> Float[Array, "c H L"]:
    """The first L of the M steps of the kernel, L <= M, from C~ = C (I - A_bar^M).

    With z = 2 (1 - w) / (1 + w) = 2 i tan(pi j / M) at the M-th roots of unity w, the spectrum is
    2 / (1 + w) = 1 + z / 2 times C~ (z - dt (Lambda - P P^*))^-1 dt B. At w = -1, where z has its pole, that is
    the limit Re(C~ dt B).

    Steps that are the same for all states divide z instead of multiplying Lambda, B and P: otherwise large parts of
    the gradient of dt cancel. Where a pole is close to a node z, the resolvent of Lambda is large and most of it
    cancels in the Woodbury correction (Fourier systems have a pole at z = 0). The pair of each channel for which this
    is worst is therefore left out of the resolvent, and solved for after the correction.
    """
    dt, A, B, P = system
    channels, rank = C_tilde.shape[0], P.shape[0]
    scale, inputs, w = dt[:, :1], jnp.concatenate([B[None], P]), A
    if dt.shape[-1] > 1:
        inputs, w = inputs * (dt / scale), w * (dt / scale)
    outputs = jnp.concatenate([C_tilde, jnp.conj(P)])
    v = inputs[:, None] * outputs
    half = np.tan(np.pi * np.arange((M + 1) // 2) / M).astype(dt.dtype)
    z = to_complex(jnp.zeros(()), 2 * half / scale)
    node = M / np.pi * jnp.arctan(0.5 * scale * jnp.abs(w.imag))
    nearest = 2 * jnp.asarray(half)[jnp.clip(jnp.round(node).astype(int), 0, half.size - 1)] / scale
    distance = jnp.hypot(w.real, nearest - jnp.abs(w.imag))
    strongest = jnp.argmax(jnp.sum(jnp.abs(P) ** 2, 0) / distance, -1, keepdims=True)
    others = jnp.where(jnp.arange(w.shape[-1]) == strongest, 0, v)
    sums = partial(cauchy_kernel, conj_sym=True, precision=precision)
    alive = max(1, _CAUCHY_BLOCK // (w.shape[-1] * half.size))
    resolvent = jax.lax.map(lambda head: sums(*head), (jnp.moveaxis(others, 2, 0), z, w), batch_size=alive)
    resolvent = jnp.moveaxis(resolvent, 0, 2)

    def pair(q):
        """Of the strongest pair, as one column each for its real and imaginary part: (2, *lead, H, 1)."""
        chosen = jnp.take_along_axis(q, jnp.broadcast_to(strongest, (*q.shape[:-1], 1)), -1)
        return jnp.stack([chosen.real, chosen.imag])

    drive = jnp.swapaxes(pair(inputs), 0, 1)
    sense = 2 * pair(jnp.conj(outputs))
    resolvent = _bordered(resolvent, drive, sense, channels)
    for _ in range(rank):
        left, top, corner = resolvent[:-1, -1:], resolvent[-1:, :-1], resolvent[-1:, -1:]
        resolvent = resolvent[:-1, :-1] - left * top / (1 + corner)
    decay, turn = pair(w)
    a, b = z - decay - resolvent[1, channels], turn - resolvent[2, channels]
    c, d = -turn - resolvent[1, channels + 1], z - decay - resolvent[2, channels + 1]
    right = resolvent[0, channels:]
    states = jnp.stack([d * right[0] - b * right[1], a * right[1] - c * right[0]]) / (a * d - b * c)
    spectrum = resolvent[0, :channels] + jnp.sum(resolvent[1:, :channels] * states[:, None], 0)
    spectrum = spectrum * to_complex(np.ones_like(half), half)
    if M % 2 == 0:
        last = scale * jnp.sum(v[0, :channels], -1, keepdims=True).real
        spectrum = jnp.concatenate([spectrum, last.astype(spectrum.dtype)], -1)
    return jnp.fft.irfft(spectrum, M)[..., :L]


def _bordered(resolvent, drive, sense, channels: int):
    """The resolvent (1 + r, c + r, H, nodes) with two rows and columns put before those of the correction."""
    shape = resolvent.shape[2:]
    first, corrections = resolvent[:, :channels], resolvent[:, channels:]
    drive = jnp.broadcast_to(drive, (*drive.shape[:2], *shape))
    rows = jnp.concatenate([first, drive, corrections], 1)
    blank = jnp.zeros((2, 2, *shape), resolvent.dtype)
    sense = jnp.broadcast_to(sense, (*sense.shape[:2], *shape))
    border = jnp.concatenate([sense[:, :channels], blank, sense[:, channels:]], 1)
    return jnp.concatenate([rows[:1], border, rows[1:]])


def observe(C: Complex[Array, "c H n"], h: Complex[Array, "B H n"]) -> Float[Array, "B c H"]:
    """y = 2 Re(C h)."""
    return 2 * read_out(C, h)


@jax.jit
def run(
    s: Transition,
    C: Complex[Array, "c H n"],
    u: Float[Array, "L B H"],
    h: Complex[Array, "B H n"],
    valid: Bool[Array, "L B"],
) -> tuple[Float[Array, "L B c H"], Complex[Array, "B H n"]]:
    """Outputs, and the state after the last valid step; the backward pass keeps about sqrt(L) states."""
    L = u.shape[0]
    if L == 0:
        return jnp.zeros((0, *u.shape[1:2], C.shape[0], u.shape[2]), s.G.real.dtype), h
    size = math.isqrt(L - 1) + 1
    blocks = -(-L // size)

    def pad(x):
        x = jnp.pad(x, ((0, blocks * size - L), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(blocks, size, *x.shape[1:])

    def one(h, inputs):
        u, valid = inputs
        h = jnp.where(valid[:, None, None], advance(s, h, u), h)
        return h, observe(C, h)

    @jax.checkpoint
    def block(h, inputs):
        return jax.lax.scan(one, h, inputs)

    h, y = jax.lax.scan(block, h, (pad(u), pad(valid)))
    return y.reshape(blocks * size, *y.shape[2:])[:L], h


@partial(jax.jit, static_argnames=("new", "precision"))
def relength(
    system: Continuous,
    C: Complex[Array, "c H n"],
    old: Int[Array, ""],
    new: int,
    precision: jax.lax.PrecisionLike,
) -> Complex[Array, "c H n"]:
    """C (I - A_bar^new) from C (I - A_bar^old), where length 0 stands for C itself.

    Costs nothing where old == new, O(n) a step and channel from C itself, else O(n^3) a channel, in blocks of channels.
    """
    if C.size == 0:
        return C

    def change(C):
        C = jax.lax.cond(old == 0, lambda C: C, lambda C: _restored(system, C, old, precision), C)
        return C - readout_after(transition(*system), C, new, precision) if new else C

    return jax.lax.cond(old == new, lambda C: C, change, C)


def _restored(system: Continuous, C, old, precision):
    """C from C (I - A_bar^old), by dense matrices."""
    rank, dt = system.P.shape[0], jnp.broadcast_to(system.dt, system.A.shape)
    heads = (Continuous(dt, system.A, system.B, jnp.moveaxis(system.P, 1, 0)), jnp.moveaxis(C, 1, 0))

    @jax.checkpoint
    def head(arguments):
        (dt, A, B, P), C = arguments
        matrix = dense(Continuous(dt[None], A[None], B[None], P.reshape(rank, 1, -1)), precision)[0]
        decayed = jnp.eye(len(matrix), dtype=matrix.dtype) - _power(matrix, old, precision)
        rows = jnp.concatenate([C.real, -C.imag], -1)
        re, im = jnp.split(jnp.linalg.solve(decayed.T, rows.T).T, 2, -1)
        return to_complex(re, -im)

    restored = jax.lax.map(head, heads, batch_size=max(1, _BLOCK // (2 * C.shape[-1]) ** 2))
    return jnp.moveaxis(restored, 0, 1)


def dense(system: Continuous, precision: jax.lax.PrecisionLike = "highest") -> Float[Array, "H N N"]:
    """A_bar on (Re h, Im h)."""
    H, n = system.A.shape
    basis = jnp.broadcast_to(jnp.eye(2 * n, dtype=system.dt.dtype)[:, None], (2 * n, H, 2 * n))
    images = advance(transition(*system), to_complex(basis[..., :n], basis[..., n:]), precision=precision)
    return jnp.moveaxis(jnp.concatenate([images.real, images.imag], -1), 0, -1)


def _power(A, exponent, precision):
    """A^exponent for an exponent known at run time only."""

    def square(carry):
        power, product, rest = carry
        product = jnp.where(rest % 2 == 1, jnp.matmul(product, power, precision=precision), product)
        return jnp.matmul(power, power, precision=precision), product, rest // 2

    def body(carry, _):
        return jax.lax.cond(carry[-1] > 0, square, lambda carry: carry, carry), None

    start = (A, jnp.eye(A.shape[0], dtype=A.dtype), exponent)
    return jax.lax.scan(body, start, None, length=_EXPONENT_BITS)[0][1]
