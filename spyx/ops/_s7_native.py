"""The compiled kernels of S7 behind arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fits(*values: Array) -> bool:
    """Whether the kernels take these values."""
    return all(v.dtype == jnp.float32 and v.size > 0 for v in values)


def inputs(
    x: Float[Array, "T B H"], W_in: Float[Array, "H H"], W: Float[Array, "H J"], base: Float[Array, " N"]
) -> tuple[Float[Array, "T B H"], Float[Array, "T B N"], Float[Array, "T B N"]]:
    """u = x W_in, and decays and inputs of the recurrence.

    Args:
        x: input.
        W_in: matrix of the input.
        W: that makes A, B [h, n], C [h, n], D and the bias of u, J = 2 N + 2 H N + H.
        base: the constant part of A.
    """
    from .native import s7

    (T, B, H), N = x.shape, base.shape[0]
    u, decay, drive = _invoke(
        s7.inputs, (T, B, H, N), (jnp.swapaxes(x, 0, 1), W_in, W, base), [(B, T, H), (T, B, N), (T, B, N)]
    )
    return jnp.swapaxes(u, 0, 1), decay, drive


def outputs(
    x: Float[Array, "T B H"],
    u: Float[Array, "T B H"],
    h: Float[Array, "T B N"],
    W: Float[Array, "H J"],
    W_gate: Float[Array, "H H"],
) -> Float[Array, "T B H"]:
    """x + sigmoid(gelu(y) W_gate) y of y = C h + D u."""
    from .native import s7

    (T, B, H), N = x.shape, h.shape[-1]
    C = jnp.swapaxes(W[:, N + H * N : N + 2 * H * N].reshape(H, H, N), 1, 2)
    operands = (jnp.swapaxes(x, 0, 1), jnp.swapaxes(u, 0, 1), h, W, C, W_gate)
    (y,) = _invoke(s7.outputs, (T, B, H, N), operands, [(B, T, H)])
    return jnp.swapaxes(y, 0, 1)


def _invoke(number, sizes, operands, shapes):
    from .native import s7
    from .native.custom_call import invoke

    items = sizes[1] * -(-sizes[0] // s7.STEPS)
    return invoke(number, items, sizes, operands, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
