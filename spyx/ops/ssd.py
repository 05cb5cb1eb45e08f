"""The state-space dual scan of Mamba-2: one decay per head, a matrix state, computed by matrix products."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .dtypes import state_dtype
from .scan import check_lengths, check_reset

SSDMethod = Literal["auto", "sequential", "chunked"]


def ssd(
    x: Float[Array, "T B H P"],
    dt: Float[Array, "T B H"],
    A: Float[Array, " H"],
    B: Float[Array, "T B G N"],
    C: Float[Array, "T B G N"],
    D: Float[Array, " H"] | Float[Array, "H P"] | None = None,
    z: Float[Array, "T B H P"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    dt_softplus: bool = False,
    *,
    chunk: int = 64,
    h0: Float[Array, "B H P N"] | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    reverse: bool = False,
    reset: Bool[Array, "T *B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    return_state: bool = False,
    precision: jax.lax.PrecisionLike = None,
    method: SSDMethod = "auto",
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, for each of H heads.

    Args:
        x: input, real, shape (T, B, H, P).
        dt: step size in the time unit of `A`, real, shape (T, B, H).
        A: decay rate of each head, real, shape (H,); negative for a stable system.
        B, C: input and readout vectors, real, shape (T, B, G, N), one for each of G groups of H / G
            neighbouring heads.
        D: feedthrough, shape (H,) or (H, P); None is 0.
        z: gate, shape (T, B, H, P): the output is multiplied by silu(z).
        dt_bias: added to `dt`, shape (H,).
        dt_softplus: dt = softplus(dt + dt_bias).
        chunk: steps per block of matrix products, of cost chunk^2 in memory.
        h0: state before the first step, shape (B, H, P, N); None is zero.
        dt_limit: lower and upper bound of dt, after bias and softplus.
        reverse, reset, lengths: as in `selective_scan`; but within a chunk of one row, a non-finite valid
            input may reach every output, since masks enter the matrix products as zeros.
        return_state: also return the last state computed.
        precision: of every matrix product, as in `jax.lax.dot`.
        method: "sequential" (lax.scan), "chunked" (matrix products inside chunks, a scan over them; the
            backward pass saves one state per chunk), or "auto" ("chunked"). Both have every mode of
            differentiation.

    Returns:
        y of shape (T, B, H, P) in the dtype of `x`; with `return_state`, `(y, state)` with state
        (B, H, P, N), float32 or wider. T = 0 gives (empty, h0 or 0).

    Raises:
        ValueError: shapes do not fit, unknown `method`, `chunk` < 1, or `dt_limit` not ascending.
        TypeError: values are not real floating point, `reset` is not bool, `lengths` not integer.

    Source: Mamba-2 (arXiv:2405.21060).
    """
    steps = _Steps(*_arrays(x, dt, B, C, z))
    weights = _Weights(*_arrays(A, D, dt_bias))
    h0, reset, lengths = _arrays(h0, reset, lengths)
    if method not in get_args(SSDMethod):
        raise ValueError(f"method must be one of {get_args(SSDMethod)}, got {method!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if steps.x.ndim != 4:
        raise ValueError(f"x must have shape (T, B, H, P), got {steps.x.shape}")
    _check(steps, weights, h0, "h0", dt_limit)
    if reset is not None:
        check_reset(reset, steps.x.shape[:2])
    if lengths is not None:
        check_lengths(lengths, steps.x.shape)
    o = _Options(bool(dt_softplus), tuple(map(float, dt_limit)), _hashable(precision))
    y, state = _ssd(steps, weights, h0, reset, lengths, o=o, chunk=int(chunk), reverse=bool(reverse), method=method)
    return (y, state) if return_state else y


def ssd_state_update(
    state: Float[Array, "B H P N"],
    x: Float[Array, "B H P"],
    dt: Float[Array, "B H"],
    A: Float[Array, " H"],
    B: Float[Array, "B G N"],
    C: Float[Array, "B G N"],
    D: Float[Array, " H"] | Float[Array, "H P"] | None = None,
    z: Float[Array, "B H P"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H P N"]]:
    """One step of `ssd`: `(y, state)` from one input (B, H, P) and the state (B, H, P, N).

    Arguments, dtypes and errors are those of `ssd`, without the time axis.
    """
    steps = _Steps(*_arrays(x, dt, B, C, z))
    weights = _Weights(*_arrays(A, D, dt_bias))
    (state,) = _arrays(state)
    if steps.x.ndim != 3:
        raise ValueError(f"x must have shape (B, H, P), got {steps.x.shape}")
    _check(steps, weights, state, "state", dt_limit)
    o = _Options(bool(dt_softplus), tuple(map(float, dt_limit)), _hashable(precision))
    return _update(steps, weights, state, o=o)


class _Options(NamedTuple):
    softplus: bool
    dt_limit: tuple[float, ...]
    precision: Any


class _Steps(NamedTuple):
    x: Any
    dt: Any
    B: Any
    C: Any
    z: Any


class _Weights(NamedTuple):
    A: Any
    D: Any
    dt_bias: Any


def _arrays(*values) -> tuple[Any, ...]:
    return tuple(None if v is None else jnp.asarray(v) for v in values)


def _hashable(precision):
    return tuple(precision) if isinstance(precision, list) else precision


def _check(steps: _Steps, weights: _Weights, state, state_name: str, dt_limit) -> None:
    x, B = steps.x, steps.B
    leading, (H, P) = x.shape[:-2], x.shape[-2:]
    if B.ndim != x.ndim or B.shape[:-2] != leading or not B.shape[-2] or H % B.shape[-2]:
        raise ValueError(
            f"B must have shape {(*leading, 'G', 'N')} with G a divisor of {H}, for x {x.shape}, got {B.shape}"
        )
    D = weights.D
    values = [
        ("x", x, x.shape),
        ("dt", steps.dt, (*leading, H)),
        ("A", weights.A, (H,)),
        ("B", B, B.shape),
        ("C", steps.C, B.shape),
        ("D", D, (H, P) if D is not None and D.ndim == 2 else (H,)),
        ("z", steps.z, x.shape),
        ("dt_bias", weights.dt_bias, (H,)),
        (state_name, state, (*leading[-1:], H, P, B.shape[-1])),
    ]
    for name, v, shape in values:
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for x {x.shape} and B {B.shape}, got {v.shape}")
        if v is not None and not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(f"{name} must be real floating point, got {v.dtype}")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (lower, upper), got {dt_limit}")


def _masked(v, valid):
    return v if valid is None else jnp.where(valid.reshape(valid.shape + (1,) * (v.ndim - valid.ndim)), v, 0)


def _prepare(o: _Options, steps: _Steps, weights: _Weights, valid):
    """x (..., B, G, R, P), dt (..., B, G, R), B and C (..., B, G, N), masked; R heads per group."""
    dtype = weights.A.dtype
    x, dt, B, C = (_masked(v, valid).astype(dtype) for v in steps[:4])
    if weights.dt_bias is not None:
        dt = dt + weights.dt_bias
    if o.softplus:
        dt = jax.nn.softplus(dt)
    dt = _masked(jnp.clip(dt, *o.dt_limit), valid)
    heads = (*dt.shape[:-1], B.shape[-2], -1)
    return x.reshape(*heads, x.shape[-1]), dt.reshape(heads), B, C


def _finish(y, x, steps: _Steps, weights: _Weights, valid):
    y, x = y.reshape(steps.x.shape), x.reshape(steps.x.shape)
    if weights.D is not None:
        y = y + (weights.D if weights.D.ndim == 2 else weights.D[:, None]) * x
    y = _masked(y, valid)
    if steps.z is not None:
        y = y * jax.nn.silu(_masked(steps.z, valid).astype(y.dtype))
    return y.astype(steps.x.dtype)


def _step(o: _Options, weights: _Weights, h, inputs):
    """`(h, y)` after one step from the state h (B, G, R, P, N)."""
    steps, valid, reset = inputs
    x, dt, B, C = _prepare(o, steps, weights, valid)
    if reset is not None:
        h = jnp.where(reset[:, None, None, None, None], 0, h)
    decay = jnp.exp(dt * weights.A.reshape(dt.shape[-2:]))
    h = decay[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None, None]
    y = jnp.einsum("bgrpn,bgn->bgrp", h, C, precision=o.precision)
    return h, _finish(y, x, steps, weights, valid)


def _chunk(o: _Options, weights: _Weights, h, inputs):
    """`_step` for L steps at once: pairs of steps by an (L, L) matrix per head, the state before by its decay."""
    steps, valid, reset = inputs
    x, dt, B, C = _prepare(o, steps, weights, valid)
    dot = partial(jnp.einsum, precision=o.precision)
    rate = dt * weights.A.reshape(dt.shape[-2:])
    L = rate.shape[0]
    step = jnp.arange(L)
    later = (step[:, None] > step)[..., None, None, None]
    between = jnp.cumsum(jnp.where(later, rate[:, None], 0), axis=0)
    reaches = (step[:, None] >= step)[..., None, None, None]
    fresh = None
    if reset is not None:
        count = jnp.cumsum(reset, axis=0)
        reaches = reaches & (count[:, None] == count)[..., None, None]
        fresh = (count == 0)[..., None, None, None]
    decay = jnp.exp(jnp.where(reaches, between, -jnp.inf))
    driven = dt[..., None] * x
    pairs = dot("ibgn,jbgn->ijbg", C, B)[..., None] * decay
    y = dot("ijbgr,jbgrp->ibgrp", pairs, driven)
    since = jnp.exp(jnp.cumsum(rate, axis=0))
    before = since[..., None] * dot("ibgn,bgrpn->ibgrp", C, h)
    kept = since[-1][..., None, None] * h
    if fresh is not None:
        before = jnp.where(fresh, before, 0)
        kept = jnp.where(fresh[-1][..., None], kept, 0)
    h = kept + dot("jbgrp,jbgn->bgrpn", decay[-1][..., None] * driven, B)
    return h, _finish(y + before, x, steps, weights, valid)


def _widen(steps: _Steps, weights: _Weights, state):
    dtype = state_dtype(*steps, *weights, state)
    return dtype, _Weights(*(None if v is None else v.astype(dtype) for v in weights))


@partial(jax.jit, static_argnames=("o", "chunk", "reverse", "method"))
def _ssd(steps, weights, h0, reset, lengths, *, o, chunk, reverse, method):
    dtype, weights = _widen(steps, weights, h0)
    T, batch, H, P = shape = steps.x.shape
    G, N = steps.B.shape[-2:]
    h = jnp.zeros((batch, H, P, N), dtype) if h0 is None else h0.astype(dtype)
    if T == 0:
        return jnp.zeros(shape, steps.x.dtype), h
    h = h.reshape(batch, G, -1, P, N)
    chunk = 1 if method == "sequential" else min(chunk, T)
    padding = -T % chunk
    valid = None
    if lengths is not None or padding:
        lengths = jnp.full(batch, T) if lengths is None else jnp.minimum(lengths, T)
        valid = jnp.arange(T + padding)[:, None] < lengths
    if reset is not None:
        reset = jnp.pad(jnp.broadcast_to(reset.reshape(T, -1), (T, batch)), [(0, padding), (0, 0)])
        reset = reset if valid is None else reset & valid
    steps = jax.tree.map(lambda v: jnp.pad(v, [(0, padding)] + [(0, 0)] * (v.ndim - 1)) if padding else v, steps)
    inputs = (steps, valid, reset)
    if method == "sequential":
        h, y = lax.scan(partial(_step, o, weights), h, inputs, reverse=reverse)
    else:
        inputs = jax.tree.map(lambda v: v.reshape(-1, chunk, *v.shape[1:]), inputs)

        @jax.checkpoint
        def body(h, inputs):
            h, y = _chunk(o, weights, h, _flipped(inputs, reverse))
            return h, _flipped(y, reverse)

        h, y = lax.scan(body, h, inputs, reverse=reverse)
        y = y.reshape(-1, *y.shape[2:])
    return y[:T], h.reshape(batch, H, P, N)


def _flipped(tree, reverse: bool):
    return jax.tree.map(lambda v: v[::-1], tree) if reverse else tree


@partial(jax.jit, static_argnames=("o",))
def _update(steps, weights, state, *, o):
    dtype, weights = _widen(steps, weights, state)
    batch, H, P, N = state.shape
    h = state.astype(dtype).reshape(batch, steps.B.shape[-2], -1, P, N)
    h, y = _step(o, weights, h, (steps, None, None))
    return y, h.reshape(batch, H, P, N)
