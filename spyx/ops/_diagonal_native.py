"""The compiled kernels of a diagonal state-space layer behind arrays."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from .dtypes import float32_of

STEPS = 96
"""Steps of an item, which stay next to a core: a multiple of the rows that `native.products` takes at a time."""
_FEWEST_SUMS, _MOST_SUMS, _SUMS_BYTES = 4, 16, 1 << 20
"""Many sums of few items are more accurate and let threads wait less, but each has the size of the weights."""


def fits(*values: Any) -> bool:
    """Whether the kernels take a layer of these arrays, in pytrees."""
    leaves = jax.tree.leaves(values)
    return all(v.size > 0 and v.dtype in (jnp.float32, jnp.complex64) for v in leaves)


def forward(
    u: Float[Array, "T B H"],
    A: Float[Array, "*TB N"] | Complex[Array, "*TB N"],
    W: Float[Array, "P N H"],
    V: Float[Array, "Q N K"],
    D: Float[Array, " H"] | Float[Array, "K H"] | None,
    h0: Float[Array, "B P N"],
    reset: Bool[Array, "T M 1 1"] | None,
    valid: Bool[Array, "T B 1 1"] | None,
    *,
    reverse: bool = False,
    batch_first: bool = False,
) -> tuple[Float[Array, "T B K"], Float[Array, "B P N"], Float[Array, "C B P N"]]:
    """h_t = A_t h_{t-1} + W u_t, y_t = V h_t + D u_t: y, 0 where not valid, the last h, h before each `STEPS` steps.

    The parts of a complex number lie side by side; V may lack the last one, and its second is minus the imaginary one.
    With `batch_first`, u and y are (B, T, .).
    """
    from .native import diagonal
    from .native.custom_call import invoke
    from .native.products import Turned, packed

    sizes = _sizes(u, A, V, D, h0, reset, valid, reverse, batch_first)
    items = _items(*sizes[:2])
    matrices = packed(Turned(_rows(_whole(W, h0))), _rows(V), *_matrix(D, Turned))
    operands = u, _of_kind(A, h0), *matrices, *_vector(D), h0, *_masks(valid, reset)
    shapes = (*u.shape[:2], V.shape[-1]), h0.shape, (items // len(h0), *h0.shape)
    return invoke(diagonal.forward, items, (*sizes, 0), operands, tuple(map(float32_of, shapes)), counters=len(h0))


def adjoint(u, A, W, V, D, h0, reset, valid, before, dy, dh, *, reverse: bool = False, batch_first: bool = False):
    """The transpose of `forward`, A constant: cotangents of u, A as (P, N), W, V, D and h0.

    Arguments are those of `forward`, the states it saved, and the cotangents of y and of the last h. Those of a real
    part and of an imaginary one are numbers of their own.
    """
    from .native import diagonal
    from .native.custom_call import invoke
    from .native.products import Turned, packed

    sizes = _sizes(u, A, V, D, h0, reset, valid, reverse, batch_first)
    items, parts, (rows, P, N) = _items(*sizes[:2]), W.shape[0], h0.shape
    W, V = _rows(_whole(W, h0)), _rows(V)
    totals = (P * N,), W.shape, V.shape, (1,) if D is None else D.shape
    few = max(_FEWEST_SUMS, _SUMS_BYTES // (4 * sum(map(math.prod, totals))))
    sums = min(items, few, _MOST_SUMS)
    matrices = packed(Turned(W), W, Turned(V), *_matrix(D))
    operands = u, _of_kind(A, h0), *matrices, *_vector(D), before, *_masks(valid, reset), dy, dh
    results = [float32_of(shape) for shape in (u.shape, h0.shape, *((sums, *shape) for shape in totals))]
    du, dh0, *found = invoke(diagonal.adjoint, items, (*sizes, sums), operands, results, counters=rows + sums)
    dA, dW, dV, dD = (jnp.sum(part, 0) for part in found)
    dW, dV = (matrix.reshape(-1, N, matrix.shape[-1]) for matrix in (dW, dV))
    return du, dA.reshape(P, N), dW[:parts], dV, None if D is None else dD, dh0


def _items(T: int, B: int) -> int:
    return -(-T // STEPS) * B


def _rows(matrix):
    """The matrix (parts N, columns) of one (parts, N, columns)."""
    return matrix.reshape(-1, matrix.shape[-1])


def _whole(W, h0):
    """W with as many parts as the states."""
    return jnp.pad(W, ((0, h0.shape[1] - W.shape[0]), (0, 0), (0, 0)))


def _of_kind(A, h0):
    return A.astype(jnp.complex64) if h0.shape[1] == 2 else A


def _matrix(D, turn=lambda D: D):
    return () if D is None or D.ndim == 1 else (turn(D),)


def _vector(D):
    return (jnp.zeros((1,), jnp.float32),) if D is None else (D,) if D.ndim == 1 else ()


def _masks(*masks):
    return tuple(jnp.zeros((1,), jnp.bool_) if mask is None else mask for mask in masks)


def _sizes(u, A, V, D, h0, reset, valid, reverse, batch_first) -> tuple[int, ...]:
    """The table of the kernels, but for the number of sums."""
    H, (B, P, N) = u.shape[-1], h0.shape
    T = u.shape[1 if batch_first else 0]
    mask_rows = (0 if mask is None else math.prod(mask.shape[1:]) for mask in (valid, reset))
    axes = 0 if D is None else D.ndim
    kinds = P == 2, A.ndim > 1, axes, reverse
    return T, B, H, V.shape[-1], N, V.shape[0] * N, *kinds, *mask_rows, STEPS, *((T, 1) if batch_first else (1, B))
