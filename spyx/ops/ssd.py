"""The state-space dual scan of Mamba-2: one decay per head, a matrix state, computed by matrix products."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._ssd_kernels import by_platform
from ._ssd_runs import Options, Values, chunked, one_step, sequential
from .dtypes import state_dtype
from .scan import check_lengths, check_reset

SSDMethod = Literal["auto", "sequential", "chunked", "pallas"]
_METHODS = {"auto": by_platform, "sequential": sequential, "chunked": chunked, "pallas": by_platform}


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
        chunk: steps per block of matrix products, of cost chunk^2 in memory; the hand kernels have their own or none.
        h0: state before the first step, shape (B, H, P, N); None is zero.
        dt_limit: lower and upper bound of dt, after bias and softplus.
        reverse, reset, lengths: as in `selective_scan`; but where there are chunks, a non-finite valid input may reach
            every output of its chunk and row, since masks enter the matrix products as zeros.
        return_state: also return the last state computed.
        precision: of every matrix product, as in `jax.lax.dot`. The hand kernels know two: one pass of bfloat16
            (TPU) or TF32 (GPU) for DEFAULT, and for all others float32 (TPU) or three products of TF32 parts
            (GPU); they leave a `DotAlgorithm` to "chunked".
        method: "sequential" (lax.scan), "chunked" (matrix products inside chunks, a scan over them; the
            backward pass saves one state per chunk; both have every mode of differentiation), "pallas" (the hand
            kernels for TPU and NVIDIA GPU, an error for what they do not take) or "auto" (the hand kernels where
            they fit, "chunked" elsewhere, chosen when lowered; reverse mode first, then any; nothing but the
            arguments is kept for the backward pass). The kernels for CPU, step by step, need numba and float32 state.

    Returns:
        y of shape (T, B, H, P) in the dtype of `x`; with `return_state`, `(y, state)` with state
        (B, H, P, N), float32 or wider. T = 0 gives (empty, h0 or 0).

    Raises:
        ValueError: shapes do not fit, unknown `method`, `chunk` < 1, `dt_limit` not ascending, or, when lowered,
            method "pallas" for what the kernels do not take.
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
    y, state = _ssd(
        steps, weights, h0, reset, lengths, step=_StepSize(bool(dt_softplus), tuple(map(float, dt_limit))),
        chunk=int(chunk), reverse=bool(reverse), precision=_resolved(precision), method=method,
    )  # fmt: skip
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
    step = _StepSize(bool(dt_softplus), tuple(map(float, dt_limit)))
    return _update(steps, weights, state, step=step, precision=_resolved(precision))


class _StepSize(NamedTuple):
    softplus: bool
    limit: tuple[float, ...]


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


def _resolved(precision):
    """Hashable, and the ambient one for None: what is lowered later does not see the context of the call."""
    if precision is None:
        return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
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


@partial(jax.checkpoint, static_argnums=0)
def _step_size(step: _StepSize, dt, dt_bias, A, valid):
    """dt after bias, softplus and bounds; 0 where not valid."""
    dt = _masked(dt, valid).astype(A.dtype)
    if dt_bias is not None:
        dt = dt + dt_bias
    if step.softplus:
        dt = jax.nn.softplus(dt)
    return _masked(jnp.clip(dt, *step.limit), valid)


@jax.checkpoint
def _finish(y, x, D, z, valid):
    """Feedthrough and gate, in the dtype of x."""
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    if z is not None:
        y = y * jax.nn.silu(_masked(z, valid).astype(y.dtype))
    return _masked(y, valid).astype(x.dtype)


def _options(steps: _Steps, weights: _Weights, dtype, **options) -> Options:
    """y is rounded to the dtype of x after feedthrough and gate, not before."""
    plain = weights.D is None and steps.z is None
    return Options(dtype=jnp.dtype(steps.x.dtype if plain else dtype), **options)


def _widen(steps: _Steps, weights: _Weights, state):
    dtype = state_dtype(*steps, *weights, state)
    return dtype, _Weights(*(None if v is None else v.astype(dtype) for v in weights))


@partial(jax.jit, static_argnames=("step", "chunk", "reverse", "precision", "method"))
def _ssd(steps, weights, h0, reset, lengths, *, step, chunk, reverse, precision, method):
    dtype, weights = _widen(steps, weights, h0)
    T, batch, H, P = shape = steps.x.shape
    h0 = jnp.zeros((batch, H, P, steps.B.shape[-1]), dtype) if h0 is None else h0.astype(dtype)
    if T == 0:
        return jnp.zeros(shape, steps.x.dtype), h0
    valid = None if lengths is None else jnp.arange(T)[:, None] < lengths
    if reset is not None:
        reset = jnp.broadcast_to(reset.reshape(T, -1), (T, batch))
        reset = reset if valid is None else reset & valid
    x, B, C = (_masked(v, valid) for v in (steps.x, steps.B, steps.C))
    dt = _step_size(step, steps.dt, weights.dt_bias, weights.A, valid)
    o = _options(steps, weights, dtype, chunk=chunk, reverse=reverse, precision=precision, method=method)
    y, h = _METHODS[method](o, Values(x, dt, weights.A, B, C, h0), reset)
    return _finish(y, x, weights.D, steps.z, valid), h


@partial(jax.jit, static_argnames=("step", "precision"))
def _update(steps, weights, state, *, step, precision):
    dtype, weights = _widen(steps, weights, state)
    dt = _step_size(step, steps.dt, weights.dt_bias, weights.A, None)
    o = _options(steps, weights, dtype, chunk=1, reverse=False, precision=precision, method="sequential")
    y, h = one_step(o, Values(steps.x, dt, weights.A, steps.B, steps.C, state.astype(dtype)))
    return _finish(y, steps.x, weights.D, steps.z, None), h
