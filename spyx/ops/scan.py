"""The recurrence h_t = a_t h_{t-1} + x_t."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from .dtypes import state_dtype

Method = Literal["auto", "sequential", "associative"]
Values = Float[Array, "T *D"] | Complex[Array, "T *D"]
State = Float[Array, "*D"] | Complex[Array, "*D"]


def linear_scan(
    a: Values | State,
    x: Values,
    h0: State | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, "T *B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    method: Method = "auto",
) -> tuple[Values, State]:
    """First-order linear recurrence h_t = a_t * h_{t-1} + x_t along the leading axis, elementwise.

    Args:
        a: decay, real or complex. With `a.ndim == x.ndim` it varies in time and broadcasts against `x`
            (its leading axis is T); with fewer axes it is constant and broadcasts against `x.shape[1:]`.
        x: input, real or complex, shape (T, ...); with `lengths` or a two-axis `reset`, (T, B, ...).
        h0: state before the first step, shape `x.shape[1:]`; None is zero.
        reverse: run from the last step to the first.
        reset: bool, shape (T,) or (T, B): where true, the incoming state (`h0` included) is cleared
            before that step, in scan direction.
        lengths: int, shape (B,): number of valid steps of each row. `h` is 0 past them, the padding
            (even NaN) reaches neither values nor gradients, `h_last` is the state of the last step
            computed that is valid; with `reverse` the scan starts at the last valid step.
        method: "sequential" (lax.scan, least memory), "associative" (parallel prefix) or "auto"
            (chosen for each platform when lowered: sequential on CPU, associative elsewhere).
            All support forward- and reverse-mode differentiation of any order.

    Returns:
        `(h, h_last)`: h of shape (T, ...) in the dtype of `x` (complex if `a` or `h0` is), and the last state
        computed (that of index 0 when `reverse`), shape `x.shape[1:]`, in the dtype of the state: float32
        or wider. T = 0 gives (empty, h0 or 0).

    Raises:
        ValueError: shapes do not fit, or unknown `method`.
        TypeError: values are not floating point or complex, `reset` is not bool, `lengths` not integer.
    """
    x, a = jnp.asarray(x), jnp.asarray(a)
    h0 = None if h0 is None else jnp.asarray(h0)
    reset = None if reset is None else jnp.asarray(reset)
    lengths = None if lengths is None else jnp.asarray(lengths)
    _check(a, x, h0, reset, lengths, method)
    return _linear_scan(a, x, h0, reset, lengths, reverse=reverse, method=method)


def _check(a, x, h0, reset, lengths, method) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if x.ndim == 0:
        raise ValueError("x must have a leading time axis (T, ...), got a scalar")
    for name, value in (("a", a), ("x", x), ("h0", h0)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point or complex, got {value.dtype}")
    target = x.shape if a.ndim == x.ndim else x.shape[1:]
    try:
        fits = a.ndim <= x.ndim and jnp.broadcast_shapes(a.shape, target) == target
    except ValueError:
        fits = False
    if not fits or (a.ndim == x.ndim and a.shape[0] != x.shape[0]):
        raise ValueError(
            f"a must broadcast against x.shape[1:] = {x.shape[1:]} (constant in time) or have shape "
            f"({x.shape[0]}, ...) broadcasting against x.shape = {x.shape}, got {a.shape}"
        )
    if h0 is not None and h0.shape != x.shape[1:]:
        raise ValueError(f"h0 must have shape x.shape[1:] = {x.shape[1:]}, got {h0.shape}")
    if reset is not None:
        check_reset(reset, x.shape[:2])
    if lengths is not None:
        check_lengths(lengths, x.shape)


def check_reset(reset: Array, leading: tuple[int, ...]) -> None:
    """Raise unless `reset` is bool with shape (T,) or (T, B) = `leading`."""
    if reset.dtype != jnp.bool_:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    if reset.ndim not in (1, 2) or reset.shape != leading[: reset.ndim]:
        raise ValueError(f"reset must have shape {leading[:1]} or {leading}, got {reset.shape}")


def check_lengths(lengths: Array, shape: tuple[int, ...]) -> None:
    """Raise unless `lengths` is integer with shape (B,), where `shape` is (T, B, ...)."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if len(shape) < 2 or lengths.shape != shape[1:2]:
        raise ValueError(
            f"lengths must have shape (B,) and x shape (T, B, ...), got lengths {lengths.shape} and x {shape}"
        )


def valid_steps(lengths: Int[Array, " B"], T: int, ndim: int) -> Bool[Array, "T B *ones"]:
    """Mask of the steps before `lengths`, shape (T, B, 1, ...) with `ndim` axes."""
    mask = jnp.arange(T)[:, None] < lengths[None, :]
    return mask.reshape(mask.shape + (1,) * (ndim - 2))


@partial(jax.jit, static_argnames=("reverse", "method"))
def _linear_scan(a, x, h0, reset, lengths, *, reverse, method):
    T, shape = x.shape[0], x.shape[1:]
    dtype = state_dtype(a, x, h0)
    if any(jnp.iscomplexobj(v) for v in (a, x, h0)):
        dtype = jnp.result_type(dtype, jnp.complex64)
    out_dtype = x.dtype if jnp.iscomplexobj(x) or not _is_complex(dtype) else dtype
    h0 = jnp.zeros(shape, dtype) if h0 is None else h0.astype(dtype)
    if T == 0:
        return jnp.zeros(x.shape, out_dtype), h0
    a, x = a.astype(dtype), x.astype(dtype)
    if a.ndim < x.ndim:
        a = jnp.broadcast_to(a, shape)
    if reset is not None:
        reset = reset.reshape(reset.shape + (1,) * (x.ndim - reset.ndim))
    valid = None
    if lengths is not None:
        valid = valid_steps(lengths, T, x.ndim)
        x = jnp.where(valid, x, 0)
        if a.ndim == x.ndim:
            a = jnp.where(valid, a, 1)
        if reset is not None:
            reset = reset & valid
    args = (a, x, h0, reset, valid)
    if method == "auto":
        h, h_last = jax.lax.platform_dependent(
            *args,
            cpu=partial(_sequential, reverse=reverse),
            default=partial(_associative, reverse=reverse),
        )
    else:
        h, h_last = (_sequential if method == "sequential" else _associative)(*args, reverse=reverse)
    if valid is not None:
        h = jnp.where(valid, h, 0)
    return h.astype(out_dtype), h_last


def _is_complex(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _sequential(a, x, h0, reset, valid, *, reverse):
    """lax.scan over real arrays; complex values travel as (re, im) pairs, which vectorises better."""
    is_complex = _is_complex(x.dtype)
    split = (lambda z: (z.real, z.imag)) if is_complex else (lambda z: (z,))
    join = (lambda z: jax.lax.complex(*z)) if is_complex else (lambda z: z[0])
    varying = a.ndim == x.ndim
    a_parts = split(a)

    def step(h, inputs):
        x_t, a_t, reset_t, valid_t = inputs
        a_t = a_t if varying else a_parts
        kept = h if reset_t is None else tuple(jnp.where(reset_t, 0, part) for part in h)
        new = tuple(p + x_p for p, x_p in zip(_multiply(a_t, kept), x_t, strict=True))
        if valid_t is not None:
            new = tuple(jnp.where(valid_t, p, old) for p, old in zip(new, h, strict=True))
        return new, new

    inputs = (split(x), a_parts if varying else None, reset, valid)
    h_last, h = jax.lax.scan(step, split(h0), inputs, reverse=reverse)
    return join(h), join(h_last)


def _multiply(a, b):
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _associative(a, x, h0, reset, valid, *, reverse):
    first, last = (-1, 0) if reverse else (0, -1)
    if a.ndim == x.ndim:
        a = jnp.broadcast_to(a, x.shape)
    elif valid is not None:
        a = jnp.where(valid, a[None], 1)
    else:
        a = jnp.broadcast_to(a[None], x.shape)
    carried = a[first] * (h0 if reset is None else jnp.where(reset[first], 0, h0))
    x = x.at[first].add(carried)

    if reset is None:

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(combine, (a, x), reverse=reverse)
        return h, h[last]

    def combine_reset(left, right):
        keep = jnp.where(right[2], 0, left[1])
        return left[0] * right[0], right[0] * keep + right[1], left[2] | right[2]

    flags = jnp.broadcast_to(reset, x.shape)
    _, h, _ = jax.lax.associative_scan(combine_reset, (a, x, flags), reverse=reverse)
    return h, h[last]
