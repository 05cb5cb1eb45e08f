"""The recurrence h_t = a_t h_{t-1} + x_t."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from . import _blocked
from ._recomputed import recomputed
from .dispatch import platform_primitive
from .dtypes import state_dtype

Method = Literal["auto", "sequential", "blocked", "associative", "pallas"]
Values = Float[Array, "T *D"] | Complex[Array, "T *D"]
State = Float[Array, "*D"] | Complex[Array, "*D"]

_CHUNK = 1024


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
        method: "sequential": lax.scan. "associative": parallel prefix within chunks of 1024 steps, one chunk
            after the other. "blocked": sequential, and the backward pass keeps nothing but the inputs and
            the state before each block of steps. "pallas": the hand kernels for TPU and NVIDIA GPU, an error
            for what they do not take. "auto": chosen for each platform when lowered: the hand kernels where they
            take the values (on CPU: numba, float32, 16 values in a row), else blocked on CPU, associative elsewhere;
            the backward pass keeps only the inputs and, on CPU, the state before each block of steps.
            Reverse-mode differentiation works to any order with each of them, forward over reverse too;
            forward mode alone (`jax.jvp`) needs "sequential" or "associative" (or T <= 16).

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
    check_method(method)
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


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one of `Method`."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")


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
    T, dtype = x.shape[0], scan_dtype(a, x, h0)
    h0 = jnp.zeros(x.shape[1:], dtype) if h0 is None else h0.astype(dtype)
    if T == 0:
        return jnp.zeros(x.shape, _out_dtype(x, h0)), h0
    if a.ndim < x.ndim:
        a = a.reshape((1,) * (x.ndim - 1 - a.ndim) + a.shape)
    if reset is not None:
        reset = reset.reshape(reset.shape + (1,) * (x.ndim - reset.ndim))
    valid = None if lengths is None else valid_steps(lengths, T, x.ndim)
    how = How(reverse, method)
    f = streamed_scan if streams(method, T) else plain
    return f(how, (a, x, h0), (reset, valid))


def streams(method: Method, T: int) -> bool:
    """Whether the backward pass is hand-written: not for so few steps that it would save nothing."""
    return method in ("blocked", "pallas") or (method == "auto" and T > _blocked.MIN_STEPS)


class How(NamedTuple):
    """Static arguments of a scan."""

    reverse: bool
    method: Method


def scan_dtype(*values):
    """The dtype of the state: float32 or wider, complex if any value is; None is passed over."""
    dtype = state_dtype(*values)
    complex_ = any(v is not None and jnp.iscomplexobj(v) for v in values)
    return jnp.result_type(dtype, jnp.complex64) if complex_ else dtype


def _out_dtype(x, h0):
    return h0.dtype if jnp.iscomplexobj(h0) and not jnp.iscomplexobj(x) else x.dtype


def plain(how: How, values, masks):
    """The scan in plain JAX, differentiable in every mode: `(h, h_last)`.

    `values` is (a, x, h0): a with as many axes as x, or one less if constant in time, h0 in the dtype of the
    state. `masks` is (reset, valid), each None or broadcastable against x. "blocked" is run as "sequential".
    """
    (a, x, h0), (reset, valid) = values, masks
    out_dtype = _out_dtype(x, h0)
    a, x = a.astype(h0.dtype), x.astype(h0.dtype)
    if valid is not None:
        x = jnp.where(valid, x, 0)
        if a.ndim == x.ndim:
            a = jnp.where(valid, a, 1)
        if reset is not None:
            reset = reset & valid
    args = (a, x, h0, reset, valid)
    sequential, associative = (partial(f, reverse=how.reverse) for f in (_sequential, _associative))
    if how.method == "auto":
        h, h_last = jax.lax.platform_dependent(*args, cpu=sequential, default=associative)
    else:
        h, h_last = (associative if how.method in ("associative", "pallas") else sequential)(*args)
    if valid is not None:
        h = jnp.where(valid, h, 0)
    return h.astype(out_dtype), h_last


def _adjoint_by_scan(reverse: bool, values, masks, cotangents):
    """The adjoint of a scan is the scan in the other direction; the states are computed again."""
    (a, x, h0), (reset, valid), (dh, dh_last) = values, masks, cotangents
    dtype = h0.dtype
    parallel = partial(plain, How(not reverse, "associative"))

    def following(z, fill):
        edge = jnp.full_like(z[:1], fill)
        return jnp.concatenate([edge, z[:-1]] if reverse else [z[1:], edge])

    dh = dh.astype(dtype)
    if valid is not None:
        dh = jnp.where(valid, dh, 0)
    dh = dh.at[0 if reverse else -1].add(dh_last)
    a_next = following(a, 1) if a.ndim == x.ndim else a
    reset_next = None if reset is None else following(reset, False)
    if valid is not None:
        valid_next = following(valid, True)
        a_next = jnp.where(valid_next, a_next if a.ndim == x.ndim else a[None], 1)
        reset_next = None if reset_next is None else reset_next & valid_next
    g, _ = parallel((a_next, dh, jnp.zeros_like(h0)), (reset_next, None))

    h, _ = plain(How(reverse, "associative"), (a, x.astype(dtype), h0), masks)
    if valid is not None:
        h = jnp.where(valid, h, h0)
    kept = jnp.concatenate([h[1:], h0[None]] if reverse else [h0[None], h[:-1]])
    first = -1 if reverse else 0
    dh0 = g[first] * (a[first] if a.ndim == x.ndim else a)
    if reset is not None:
        kept, dh0 = jnp.where(reset, 0, kept), jnp.where(reset[first], 0, dh0)
    if valid is not None:
        dh0, g = jnp.where(valid[first], dh0, g[first]), jnp.where(valid, g, 0)
    da = g * kept if a.ndim == x.ndim else jnp.sum(g * kept, 0)
    axes = tuple(k for k, n in enumerate(a.shape) if n == 1 and da.shape[k] != 1)
    real = lambda z, like: (z if jnp.iscomplexobj(like) else z.real).astype(like.dtype)  # noqa: E731
    return real(jnp.sum(da, axes, keepdims=True), a), real(g, x), dh0.astype(dtype)


def _streamed_forward(values, masks, *, reverse: bool, required: bool):
    if required:
        raise ValueError('method="pallas": there are kernels for TPU and NVIDIA GPU, none for CPU; use method="auto"')
    out_dtype = _out_dtype(values[1], values[2])
    h, h_last, before = _blocked.forward(*values, *masks, reverse=reverse, out_dtype=out_dtype)
    return (h, h_last), before


def _native_forward(values, masks, *, reverse: bool, required: bool):
    from .native import linear

    x, h0 = values[1:]
    if required or not linear.fits(*values, *masks):
        return _streamed_forward(values, masks, reverse=reverse, required=required)
    h, h_last, before = linear.scan(*values, *masks, reverse=reverse, steps=_blocked.block_length(x.shape, h0.dtype))
    return (h, h_last), before


def _streamed_adjoint(values, masks, saved, cotangents, *, reverse: bool, required: bool):
    del required
    (a, x, h0), (reset, valid), (dh, dh_last) = values, masks, cotangents
    return _blocked.adjoint(a, x, h0, reset, valid, saved, dh, dh_last, reverse=reverse)


def _native_adjoint(values, masks, saved, cotangents, *, reverse: bool, required: bool):
    from .native import linear

    (a, x, h0), (reset, valid), (dh, dh_last) = values, masks, cotangents
    if not linear.fits(a, x, h0, reset, valid):
        return _streamed_adjoint(values, masks, saved, cotangents, reverse=reverse, required=required)
    steps = _blocked.block_length(x.shape, h0.dtype)
    return linear.scan_adjoint(a, x, h0, reset, valid, saved, dh, dh_last, reverse=reverse, steps=steps)


def _parallel_forward(values, masks, *, reverse: bool, required: bool):
    del required
    return plain(How(reverse, "associative"), values, masks), _blocked.saved_states(*values[1:])


def _parallel_adjoint(values, masks, saved, cotangents, *, reverse: bool, required: bool):
    del saved, required
    return _adjoint_by_scan(reverse, values, masks, cotangents)


def _kernel(platform: str, values, required: bool):
    """The kernel of `spyx.ops.pallas` for a platform, or None where its block rules do not fit."""
    from .pallas import values as on_values

    if on_values.scan_fits(values):
        return importlib.import_module(f".pallas.{platform}", __package__).linear_scan_forward
    if required:
        dtypes = [str(v.dtype) for v in values]
        raise ValueError(f'method="pallas" needs float32 or bfloat16 values and a float32 state, got {dtypes}')
    return None


def _kernel_forward(platform: str, values, masks, *, reverse: bool, required: bool):
    run = _kernel(platform, values, required)
    if run is None:
        return _parallel_forward(values, masks, reverse=reverse, required=required)
    from .pallas.values import scan

    return scan(run, values, masks, reverse=reverse), _blocked.saved_states(*values[1:])


def _kernel_adjoint(platform: str, values, masks, saved, cotangents, *, reverse: bool, required: bool):
    run = _kernel(platform, values, required)
    if run is None:
        return _parallel_adjoint(values, masks, saved, cotangents, reverse=reverse, required=required)
    from .pallas.values import scan_adjoint

    return scan_adjoint(run, values, masks, cotangents, reverse=reverse)


_forward_by_platform = platform_primitive(
    "linear_scan", _parallel_forward, cpu=_streamed_forward, native=_native_forward,
    cuda=partial(_kernel_forward, "gpu"), tpu=partial(_kernel_forward, "tpu"),
)  # fmt: skip
_adjoint_by_platform = platform_primitive(
    "linear_scan_adjoint", _parallel_adjoint, cpu=_streamed_adjoint, native=_native_adjoint,
    cuda=partial(_kernel_adjoint, "gpu"), tpu=partial(_kernel_adjoint, "tpu"),
)  # fmt: skip


def _forward(how: How, values, masks):
    if how.method == "blocked":
        return _streamed_forward(values, masks, reverse=how.reverse, required=False)
    return _forward_by_platform(values, masks, reverse=how.reverse, required=how.method == "pallas")


def _adjoint(how: How, *args):
    if how.method == "blocked":
        return _streamed_adjoint(*args, reverse=how.reverse, required=False)
    return _adjoint_by_platform(*args, reverse=how.reverse, required=how.method == "pallas")


streamed_scan = recomputed(_forward, _adjoint, plain)
"""As `plain`, with a hand-written backward pass: `how.method` is "auto", "blocked" or "pallas"."""


def _sequential(a, x, h0, reset, valid, *, reverse):
    """lax.scan over real arrays; complex values travel as (re, im) pairs, which vectorises better."""
    is_complex = _blocked.is_complex(x.dtype)
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
    """Chunk after chunk, so that the time to compile does not grow with T."""
    T, constant = x.shape[0], None if a.ndim == x.ndim else a
    if T <= _CHUNK:
        return _chunk(a, x, h0, reset, valid, reverse=reverse)
    chunks = -(-T // _CHUNK)
    length = -(-T // chunks)
    missing = chunks * length - T
    if missing and valid is None:
        valid = jnp.ones((T,) + (1,) * (x.ndim - 1), jnp.bool_)

    def cut(z, fill):
        if z is None:
            return None
        z = jnp.pad(z, ((0, missing),) + ((0, 0),) * (z.ndim - 1), constant_values=fill)
        return z.reshape(chunks, length, *z.shape[1:])

    def step(h, inputs):
        a_c, x_c, reset_c, valid_c = inputs
        h_c, h = _chunk(a_c if constant is None else constant, x_c, h, reset_c, valid_c, reverse=reverse)
        return h, h_c

    inputs = cut(a if constant is None else None, 1), cut(x, 0), cut(reset, False), cut(valid, False)
    h_last, h = jax.lax.scan(step, h0, inputs, reverse=reverse)
    return h.reshape(chunks * length, *x.shape[1:])[:T], h_last


def _chunk(a, x, h0, reset, valid, *, reverse):
    first, last = (-1, 0) if reverse else (0, -1)
    if a.ndim < x.ndim and valid is not None:
        a = jnp.where(valid, a[None], 1)
    a = jnp.broadcast_to(a, x.shape)
    carried = a[first] * (h0 if reset is None else jnp.where(reset[first], 0, h0))
    x = x.at[first].add(carried)

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def combine_reset(left, right):
        a_left = jnp.where(left[2], 0, left[0])
        a_right, kept = (jnp.where(right[2], 0, z) for z in (right[0], left[1]))
        return a_left * a_right, a_right * kept + right[1], left[2] | right[2]

    if reset is None:
        h = jax.lax.associative_scan(combine, (a, x), reverse=reverse)[1]
    else:
        flags = jnp.broadcast_to(reset, x.shape)
        h = jax.lax.associative_scan(combine_reset, (a, x, flags), reverse=reverse)[1]
    return h, h[last]
