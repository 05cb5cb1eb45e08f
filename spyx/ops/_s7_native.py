"""The compiled kernels of S7 behind arrays."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .dtypes import float32_of


def fits(*values: Array) -> bool:
    """Whether the kernels take these values."""
    return all(v.dtype == jnp.float32 and v.size > 0 for v in values)


def forward(
    x: Float[Array, "T B H"],
    W_in: Float[Array, "H H"],
    W: Float[Array, "H J"],
    W_gate: Float[Array, "H H"],
    base: Float[Array, " N"],
    h0: Float[Array, "B N"] | None,
    lengths: Int[Array, " B"] | None,
) -> tuple[Float[Array, "T B H"], Float[Array, "B N"]]:
    """x + sigmoid(gelu(y) W_gate) y of y = C h + D u, u = x W_in, and the last h.

    Args:
        x: input.
        W_in: matrix of the input.
        W: that makes A, B [h, n], C [h, n], D and the bias of u, J = 2 N + 2 H N + H.
        W_gate: matrix of the gate.
        base: the constant part of A.
        h0: state before the first step; None is zero.
        lengths: valid steps of each row; None is all.
    """
    from .native import s7
    from .native.custom_call import invoke
    from .native.products import STEPS

    (T, B, H), N = x.shape, base.shape[0]
    operands = (
        jnp.swapaxes(x, 0, 1), jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32), base,
        W_in, W_gate, W, jnp.zeros((B, N), x.dtype) if h0 is None else h0,
    )  # fmt: skip
    results = [*map(float32_of, ((B, T, H), (B, N), *((n,) for n in s7.sizes(H, N))))]
    items = s7.items(T, B, H, N, STEPS)
    y, h, *_ = invoke(s7.forward, items, (T, B, H, N, STEPS), operands, results, counters=3 + B)
    return jnp.swapaxes(y, 0, 1), h
