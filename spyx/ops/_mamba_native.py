"""The compiled kernel of a small Mamba block behind arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._projections import Affine, biases_of
from .dtypes import float32_of

_STEPS = 96
"""Steps of an item, which stay next to a core: a multiple of the rows that `native.products` takes at a time."""


def forward(
    x: Float[Array, "T B H"],
    projections: Sequence[Affine],
    taps: Float[Array, "K D"],
    conv_bias: Float[Array, " D"] | None,
    A: Float[Array, "D N"],
    D: Float[Array, " D"],
    norm_eps: float | None,
    before: tuple[Float[Array, "B D K"], Float[Array, "B D N"]] | None,
    lengths: Int[Array, " B"] | None,
) -> tuple[Float[Array, "T B H"], Float[Array, "B D K"], Float[Array, "B D N"]]:
    """Outputs, the last K inputs of the convolution, and the last state.

    Args:
        x: input.
        projections: matrix and bias of the input (to 2 D channels), of r, B and C, of dt, of the output.
        taps, conv_bias: of the convolution.
        A, D: of the scan.
        norm_eps: if not None, r, B and C are divided by their root mean square, with this under the root.
        before: the last K inputs of the convolution, and the state, before the first step; None is zero.
        lengths: valid steps of each row; None is all.
    """
    from .native import mamba
    from .native.custom_call import invoke
    from .native.products import packed
    from .native.selective import WIDTH

    (T, B, H), (K, P), N = x.shape, taps.shape, A.shape[1]
    conv_state, h = before or (jnp.zeros((B, P, K), x.dtype), jnp.zeros((B, P, N), x.dtype))
    (both, bias), *others = projections
    halves = [(both[:, part], None if bias is None else bias[part]) for part in (slice(P), slice(P, None))]
    matrices = packed(*(matrix for matrix, _ in (*halves, *others)))
    affine = [v for pair in zip(matrices, biases_of((*halves, *others)), strict=True) for v in pair]
    operands = (
        jnp.swapaxes(x, 0, 1), jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32),
        taps, *biases_of([(taps, conv_bias)]), *affine, A.T, D, jnp.full((1,), norm_eps or 0, jnp.float32),
        jnp.swapaxes(conv_state, 1, 2), jnp.swapaxes(h, 1, 2),
    )  # fmt: skip
    results = [*map(float32_of, ((B, T, H), (B, K, P), (B, N, P)))]
    rank = others[1][0].shape[0]
    sizes = T, B, H, P, N, K, rank, _STEPS, norm_eps is not None
    counters = B * (1 + -(-P // WIDTH))
    y, conv_state, h = invoke(mamba.forward, B * -(-T // _STEPS), sizes, operands, results, counters)
    return jnp.swapaxes(y, 0, 1), jnp.swapaxes(conv_state, 1, 2), jnp.swapaxes(h, 1, 2)
