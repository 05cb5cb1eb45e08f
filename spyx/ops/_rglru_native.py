"""The compiled kernel of an RG-LRU block behind arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._projections import Affine, biases_of
from .dtypes import float32_of


def forward(
    x: Float[Array, "T B H"],
    projections: Sequence[Affine],
    taps: Float[Array, "K D"],
    conv_bias: Float[Array, " D"] | None,
    a_log: Float[Array, " D"],
    c: float,
    before: tuple[Float[Array, "B D K"], Float[Array, "B D"]] | None,
    lengths: Int[Array, " B"] | None,
) -> tuple[Float[Array, "T B H"], Float[Array, "B D K"], Float[Array, "B D"]]:
    """Outputs, the last K inputs of the convolution, and the last state.

    Args:
        x: input.
        projections: matrix and bias of the gate, the input, the recurrent gate, the input gate, the output.
        taps, conv_bias: of the convolution.
        a_log: logit of the decay.
        c: exponent of the recurrent gate.
        before: the last K inputs of the convolution, and the state, before the first step; None is zero.
        lengths: valid steps of each row; None is all.
    """
    from .native import rglru
    from .native.custom_call import invoke
    from .native.products import STEPS, packed

    (T, B, H), (K, D) = x.shape, taps.shape
    conv_state, h = before or (jnp.zeros((B, D, K), x.dtype), jnp.zeros((B, D), x.dtype))
    matrices = packed(*(matrix for matrix, _ in projections))
    affine = [v for pair in zip(matrices, biases_of(projections), strict=True) for v in pair]
    operands = (
        jnp.swapaxes(x, 0, 1), jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32), *affine,
        taps, *biases_of([(taps, conv_bias)]), a_log, jnp.full((1,), c, jnp.float32),
        jnp.swapaxes(conv_state, 1, 2), h,
    )  # fmt: skip
    results = [*map(float32_of, ((B, T, H), (B, K, D), (B, D)))]
    items = B * -(-T // STEPS)
    y, conv_state, h = invoke(rglru.forward, items, (T, B, H, D, K, STEPS), operands, results, counters=B)
    return jnp.swapaxes(y, 0, 1), jnp.swapaxes(conv_state, 1, 2), h
