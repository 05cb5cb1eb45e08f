"""linear_scan and its adjoint on complex arrays with masks, by way of a kernel on real parts.

Arguments here are those of `spyx.ops.linear_scan` made uniform: `values` is (a, x, h0), with `a` of as many axes
as x or one less and h0 in the dtype of the state; `masks` is (reset, valid), each None or
broadcastable against x. `run` is `linear_scan_forward` of `tpu` or `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .linear import Flags, Parts, fits

Values = tuple[Array, Array, Array]
Masks = tuple[Array | None, Array | None]


def scan_fits(values: Values) -> bool:
    """Whether the kernels take these values: state in float32 (pairs), nothing empty."""
    parts: list[Any] = [(jax.ShapeDtypeStruct(v.shape, jnp.finfo(v.dtype).dtype),) for v in values]
    return fits(*parts)


def scan(run: Callable[..., Any], values: Values, masks: Masks, *, reverse: bool) -> tuple[Array, Array]:
    """`(h, h_last)` of the scan, as `linear_scan` returns them."""
    _, x, h0 = values
    _, valid = masks
    a_parts, x_parts, flags = _kernel_arguments(values, masks, reverse)
    h, h_last = run(a_parts, x_parts, _split(h0, h0), flags)
    h, h_last = _join(h), _join(h_last)
    dtype = h0.dtype if jnp.iscomplexobj(h0) and not jnp.iscomplexobj(x) else x.dtype
    return _where(valid, h).astype(dtype), h_last.astype(h0.dtype)


def scan_adjoint(
    run: Callable[..., Any], values: Values, masks: Masks, cotangents: tuple[Array, Array], *, reverse: bool
) -> Values:
    """Cotangents of `values` from those of `(h, h_last)`; the states are computed anew, not kept."""
    a, x, h0 = values
    reset, valid = masks
    dh, dh_last = cotangents
    a_parts, x_parts, flags = _kernel_arguments((a, x.astype(h0.dtype), h0), masks, reverse)
    h = _join(run(a_parts, x_parts, _split(h0, h0), flags)[0])
    dh = _where(valid, dh).astype(h0.dtype)
    back = flags.adjoint()._replace(conj=False)
    g = _join(run(a_parts, _split(dh, h0), _split(dh_last.astype(h0.dtype), h0), back)[0])

    first = -1 if reverse else 0
    before = jnp.concatenate([h[1:], h0[None]] if reverse else [h0[None], h[:-1]])
    da = _where(valid, g * before)
    decay = _join(a_parts)
    dh0 = (decay[first] if decay.ndim == x.ndim else decay) * g[first]
    if reset is not None:
        reset = jnp.broadcast_to(reset if valid is None else reset & valid, x.shape)
        da, dh0 = jnp.where(reset, 0, da), jnp.where(reset[first], 0, dh0)
    return _like(_reduced(da, a.shape), a), _like(_where(valid, g), x), _like(dh0, h0)


def _kernel_arguments(values: Values, masks: Masks, reverse: bool) -> tuple[Parts, Parts, Flags]:
    """A padded step keeps the state (a = 1, x = 0); a reset is a decay of 0 that clears."""
    a, x, h0 = values
    reset, valid = masks
    if a.ndim == x.ndim or reset is not None or valid is not None:
        a = jnp.broadcast_to(a, x.shape)
    else:
        a = jnp.broadcast_to(a, x.shape[1:])
    if valid is not None:
        a, x = jnp.where(valid, a, 1), jnp.where(valid, x, 0)
        reset = None if reset is None else reset & valid
    if reset is not None:
        a = jnp.where(reset, 0, a)
    return _split(a, h0), _split(x, h0), Flags(reverse=reverse, clears=reset is not None)


def _split(value: Array, state: Array) -> Parts:
    if not jnp.iscomplexobj(state):
        return (value,)
    return value.real.astype(jnp.float32), value.imag.astype(jnp.float32)


def _join(parts: Parts) -> Array:
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def _where(valid: Array | None, value: Array) -> Array:
    return value if valid is None else jnp.where(valid, value, 0)


def _reduced(value: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the axes along which an array of `shape` is broadcast to `value`."""
    value = value.sum(tuple(range(value.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and value.shape[i] != 1)
    return value.sum(axes, keepdims=True)


def _like(cotangent: Array, value: Array) -> Array:
    return (cotangent if jnp.iscomplexobj(value) else cotangent.real).astype(value.dtype)
