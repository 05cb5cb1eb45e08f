"""The compiled kernels of `spyx.ops.native` behind the interface of `_ssd_runs`."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ._ssd_runs import Options, Values
from .dtypes import float32_of


def fits(values: Values) -> bool:
    """Whether the kernels take these values."""
    dtypes = {jnp.result_type(v, jnp.float32) for v in values}
    return dtypes == {jnp.dtype(jnp.float32)} and all(v.size for v in values)


def forward(o: Options, values: Values, reset: Array | None) -> tuple[Array, Array]:
    """As `_ssd_runs.chunked`."""
    from .native import ssd
    from .native.custom_call import invoke

    operands, sizes, items = _operands(o, values, reset)
    y, h = invoke(ssd.forward, items, sizes, operands, [float32_of(operands[0].shape), float32_of(operands[6].shape)])
    return y.reshape(values.x.shape).astype(o.dtype), _from_rows(h, values)


def backward(o: Options, values: Values, reset: Array | None, cotangents: tuple[Array, Array]) -> Values:
    """Cotangents of the values from those of `(y, last state)`; the states are computed anew, not kept."""
    from .native import ssd
    from .native.custom_call import invoke

    operands, sizes, items = _operands(o, values, reset)
    x, dt, _, b, c, _, h0 = operands
    dy, dh = (v.astype(jnp.float32) for v in cotangents)
    E = h0.shape[0]
    operands = (*operands, dy.reshape(x.shape), _by_rows(dh, values))
    shapes = x.shape, dt.shape, (E, items // E, dt.shape[2]), b.shape, c.shape, h0.shape
    dx, ddt, dA, db, dc, dh0 = invoke(ssd.backward, items, sizes, operands, [*map(float32_of, shapes)], counters=items)
    dA = dA.sum(1).reshape(-1, values.A.size).sum(0)
    found = Values(dx, ddt, dA, db, dc, _from_rows(dh0, values))
    return Values(*(d.reshape(v.shape).astype(v.dtype) for d, v in zip(found, values, strict=True)))


def _operands(o: Options, values: Values, reset: Array | None) -> tuple[tuple[Any, ...], tuple[int, ...], int]:
    """What both kernels take, the table of sizes, and the number of items."""
    from .native.vectors import WIDTH

    x, dt, A, B, C, h0 = (v.astype(jnp.float32) for v in values)
    (T, batch, H, P), (G, N) = x.shape, B.shape[2:]
    E, R = batch * G, H // G
    given = x.reshape(T, E, R * P), dt.reshape(T, E, R), A.reshape(G, R), B.reshape(T, E, N), C.reshape(T, E, N)
    none = jnp.zeros(1, jnp.bool_) if reset is None else reset
    # as many chunks as steps in one
    chunk = max(1, math.isqrt(T))
    sizes = T, E, G, R, P, N, chunk, int(o.reverse), int(reset is not None)
    return (*given, none, _by_rows(h0, values)), sizes, E * -(-R * P // WIDTH)


def _by_rows(h: Array, values: Values) -> Array:
    """States (B, H, P, N) as (B G, N, H / G P)."""
    batch, H, P, N = h.shape
    G = values.B.shape[2]
    return jnp.moveaxis(h.reshape(batch * G, H // G * P, N), 2, 1)


def _from_rows(h: Array, values: Values) -> Array:
    return jnp.moveaxis(h, 1, 2).reshape(values.h0.shape)
