"""One step of the selective scan, and its adjoint, as pure functions.

Glossary: T time, B batch, D = G * P channels in G groups, E = B * G rows, N states per channel, K steps per
chunk; `b` and `c` are the input and readout vectors of a row. The state is (E, N, P), channels last, and everything
of that size is made step by step or chunk by chunk: no array of size T * B * D * N exists.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Options(NamedTuple):
    """What is fixed at trace time, sizes in steps.

    A `chunk` is what a backward pass holds the states of, a `block` of whole chunks what is done in parallel, and a
    state is saved before each `segment`: a chunk, or whole blocks. What lies further apart is recomputed once more.
    """

    discretization: str
    softplus: bool
    conj_sym: bool
    reverse: bool
    method: str
    chunk: int
    block: int
    segment: int


class Steps(NamedTuple):
    """What varies in time, in the caller's dtypes: u, dt, dt_a, z (T, B * D) and B, C (T, B * G * N).

    They come in the caller's shapes, with more axes, and cotangents leave in them: XLA copies whole arrays to change
    the layout of axes of length 1. What loops over time in JAX works on `flat` ones, for the same reason.
    """

    u: Any
    dt: Any
    dt_a: Any
    B: Any
    C: Any
    z: Any


def flat(steps: Steps) -> Steps:
    return jax.tree.map(lambda v: v.reshape(v.shape[0], -1), steps)


def like(cotangents: Steps, steps: Steps) -> Steps:
    """Cotangents of flat steps, perhaps longer ones, as cotangents of `steps`."""
    return jax.tree.map(lambda d, v: d[: v.shape[0]].astype(v.dtype).reshape(v.shape), cotangents, steps)


class Weights(NamedTuple):
    """What does not: A (N, P) if G = 1, else (E, N, P); D and dt_bias (D,); in the dtype of the state."""

    A: Any
    D: Any
    dt_bias: Any


class Masks(NamedTuple):
    """`valid`, bool (T, B) or (T, 1), and `reset`, bool (T, E) or (T, 1); or None."""

    valid: Any
    reset: Any


def padding(o: Options, T: int) -> int:
    """How many steps are missing to whole blocks and segments."""
    return -T % max(o.block, o.segment)


def saved_states(o: Options, T: int) -> int:
    """How many states are saved for T steps: one before each segment, in whole blocks."""
    return (T + padding(o, T)) // o.segment


class Prepared(NamedTuple):
    """Steps in the dtype of the state: u, dt, dt_a (..., E, P) and b, c (..., E, N)."""

    u: Any
    dt: Any
    dt_a: Any
    b: Any
    c: Any


def _masked(v, valid):
    return v if valid is None else jnp.where(valid[..., None], v.reshape(*valid.shape, -1), 0).reshape(v.shape)


def prepare(o: Options, steps: Steps, weights: Weights, valid) -> Prepared:
    """Mask, widen, activate and group; any leading axes. A masked step is the identity."""
    N, P = weights.A.shape[-2:]
    real = jnp.finfo(weights.A.dtype).dtype

    def rows(v, width):
        v = _masked(v, valid)
        return v.astype(jnp.result_type(v.dtype, real)).reshape(*v.shape[:-1], -1, width)

    dt = rows(steps.dt, P)
    if weights.dt_bias is not None:
        dt = (dt.reshape(*dt.shape[:-2], -1, weights.dt_bias.shape[0]) + weights.dt_bias).reshape(dt.shape)
    if o.softplus:
        dt = jax.nn.softplus(dt)
    if weights.dt_bias is not None or o.softplus:
        dt = rows(dt.reshape(steps.dt.shape), P)
    c = rows(steps.C, N)
    return Prepared(
        u=rows(steps.u, P),
        dt=dt,
        dt_a=None if steps.dt_a is None else rows(steps.dt_a, P),
        b=rows(steps.B, N),
        c=2 * c if o.conj_sym else c,
    )


def finish(y, u, z, D, valid, dtype):
    """Feedthrough, gate and mask of the readout y (..., E, P): (..., B * D)."""
    flat = (*y.shape[:-2], -1)
    if D is not None:
        per_channel = (*flat, D.shape[0])
        y = y.reshape(per_channel) + D * u.reshape(per_channel)
    y = _masked(y.reshape(flat), valid)
    if z is not None:
        y = y * jax.nn.silu(_masked(z, valid).astype(y.dtype))
    return y.astype(dtype)


def phi1(z, exp_z):
    """(exp(z) - 1) / z given exp(z): a Taylor polynomial for |z| < 1/2."""
    near = jnp.abs(z) < 0.5
    terms = 9 if jnp.finfo(z.dtype).bits == 32 else 16
    small, large = jnp.where(near, z, 0), jnp.where(near, 1, z)
    series = jnp.full_like(z, 1 / math.factorial(terms))
    for k in range(terms - 1, 0, -1):
        series = series * small + 1 / math.factorial(k)
    return jnp.where(near, series, (exp_z - 1) / large)


def phi1_slope(z, exp_z):
    """The derivative of phi1, (exp(z) - phi1(z)) / z."""
    near = jnp.abs(z) < 0.5
    terms = 9 if jnp.finfo(z.dtype).bits == 32 else 16
    small, large = jnp.where(near, z, 0), jnp.where(near, 1, z)
    series = jnp.full_like(z, terms / math.factorial(terms + 1))
    for k in range(terms - 1, 0, -1):
        series = series * small + k / math.factorial(k + 1)
    return jnp.where(near, series, (exp_z - (exp_z - 1) / large) / large)


def _over_states(v):
    return v[..., None, :]


def transition(o: Options, p: Prepared, A):
    """A_bar (..., E, N, P)."""
    z = _over_states(p.dt if p.dt_a is None else p.dt_a) * A
    return (1 + 0.5 * z) / (1 - 0.5 * z) if o.discretization == "bilinear" else jnp.exp(z)


def _exp_dt(p: Prepared, A, a):
    return a if p.dt_a is None else jnp.exp(_over_states(p.dt) * A)


def gain(o: Options, p: Prepared, A, a):
    """The factor of b u in the state: (..., E, N or 1, P), or 1."""
    dt = _over_states(p.dt)
    if o.discretization == "mamba":
        return dt
    if o.discretization == "dirac":
        return 1
    if o.discretization == "zoh":
        return dt * phi1(dt * A, _exp_dt(p, A, a))
    return dt / (1 - 0.5 * dt * A)


def gain_slopes(o: Options, p: Prepared, A, a):
    """The derivatives of `gain` with respect to dt and A."""
    dt = _over_states(p.dt)
    if o.discretization == "zoh":
        e = _exp_dt(p, A, a)
        return e, dt * dt * phi1_slope(dt * A, e)
    v = 1 / (1 - 0.5 * dt * A)
    return v * v, 0.5 * (dt * v) ** 2


def transition_slopes(o: Options, p: Prepared, A, a):
    """The derivatives of `transition` with respect to its step size and A."""
    dt = _over_states(p.dt if p.dt_a is None else p.dt_a)
    if o.discretization == "bilinear":
        v = 1 / (1 - 0.5 * dt * A)
        return A * v * v, dt * v * v
    return a * A, a * dt


def drive(o: Options, p: Prepared, A, a):
    return gain(o, p, A, a) * _over_states(p.u) * p.b[..., None]


def read_out(h, c):
    """Re(sum_n c_n h_n): (E, P)."""
    if h.shape[0] == 1:
        return _dot("np,n->p", h[0], c[0]).real[None]
    return _dot("enp,en->ep", h, c).real


def over_channels(h, v):
    """sum_p h_p v_p: (E, N)."""
    v = v.astype(h.dtype)
    if h.shape[0] == 1:
        return _dot("np,p->n", h[0], v[0])[None]
    return _dot("enp,ep->en", h, v)


def cleared(h, reset):
    return h if reset is None else jnp.where(reset[..., None, None], 0, h)


def advance(o: Options, A, h, p: Prepared, reset):
    """The state after one step, from the state h (E, N, P) before it."""
    a = transition(o, p, A)
    return a * cleared(h, reset) + drive(o, p, A, a)


def as_like(cotangent, value):
    return cotangent if jnp.iscomplexobj(value) else cotangent.real


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def pairwise(terms):
    while len(terms) > 1:
        terms = [x + y for x, y in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def sum_states(f, *arrays):
    """sum_n f(*arrays) over axis -2, as a pairwise sum of slices, which XLA fuses and vectorises over channels."""
    N = max(v.shape[-2] for v in arrays)
    parts = divisor(N, 16)
    if parts == 1:
        return f(*arrays).sum(-2)
    size = N // parts

    def part(k):
        return f(*(v[..., k * size : (k + 1) * size, :] if v.shape[-2] == N else v for v in arrays))

    total = pairwise([part(k) for k in range(parts)])
    return total[..., 0, :] if size == 1 else sum_states(lambda v: v, total)


def adjoint_step(o: Options, A, p: Prepared, a, h, dh, dA, dy):
    """One step back: (dh before it, dA accumulated, cotangents of p but for c); h is the state before it."""
    g = dh + _over_states(dy) * p.c[..., None]
    before = a * g
    b = p.b[..., None]
    if o.discretization in ("mamba", "dirac"):
        u = p.u if o.discretization == "dirac" else p.dt * p.u
        db = over_channels(g, u)
        du = sum_states(lambda g, b: g * b, g, b).real
        ddt = du * p.u if o.discretization == "mamba" else jnp.zeros_like(p.dt)
        du = du * p.dt if o.discretization == "mamba" else du
    else:
        scale = gain(o, p, A, a)
        slope, slope_A = gain_slopes(o, p, A, a)
        db = over_channels(g * scale, p.u)
        w = g * b
        du = sum_states(jnp.multiply, w, scale).real
        ddt = sum_states(jnp.multiply, w, slope).real * p.u
        dA = dA + w * slope_A * _over_states(p.u)
    if o.discretization == "bilinear":
        slope, slope_A = transition_slopes(o, p, A, a)
        w = g * h
        dstep = sum_states(jnp.multiply, w, slope).real
        dA = dA + w * slope_A
    else:
        dt = _over_states(p.dt if p.dt_a is None else p.dt_a)
        dstep = sum_states(lambda x, h, A: x * h * A, before, h, A).real
        dA = dA + before * h * dt
    ddt, ddt_a = (ddt + dstep, None) if p.dt_a is None else (ddt, dstep)
    return before, dA, Prepared(du, ddt, ddt_a, as_like(db, p.b), None)


def one_step(o: Options, weights: Weights, h, x):
    """`(h, y)` after one step; x is `(steps, masks)` of that step."""
    steps, mask = x
    p = prepare(o, steps, weights, mask.valid)
    h = advance(o, weights.A, h, p, mask.reset)
    return h, finish(read_out(h, p.c), p.u, steps.z, weights.D, mask.valid, steps.u.dtype)
