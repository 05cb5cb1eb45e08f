"""lrnnx's gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..core.base import check_device
from ..core.layers import linear
from ..random import default_rngs


class GatedMLP(nnx.Module):
    """fc2(a * activation(b)) with [a; b] = fc1(x): (..., in_features) -> (..., out_features).

    Args:
        in_features: width of the input.
        hidden_features: width of a and b, rounded up to a multiple of `multiple_of`; None is int(8 in_features / 3).
        out_features: width of the output; None is `in_features`.
        activation: of the gate b.
        bias: of fc1 and fc2.
        multiple_of: see `hidden_features`.
        device: None or "cpu", no effect.
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        precision: of the matrix products, as in `jax.lax.dot`.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: fc1.weight (2 hidden, in), fc2.weight (out, hidden), and their biases.

    Raises:
        ValueError: a device other than the CPU.

    Source: GLU variants (arXiv:2002.05202); lrnnx 1.0.0 `lrnnx.layers.mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: DTypeLike | None = None,
        *,
        param_dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = "highest",
        rngs: nnx.Rngs | None = None,
    ):
        check_device("GatedMLP", device)
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        common: dict[str, Any] = {
            "bias": bias,
            "param_dtype": param_dtype or dtype or jnp.float32,
            "precision": precision,
            "rngs": default_rngs(rngs),
        }
        self.dtype, self.activation = dtype, activation
        self.fc1 = linear(in_features, 2 * hidden, **common)
        self.fc2 = linear(hidden, in_features if out_features is None else out_features, **common)

    def __call__(self, x: Float[Array, "*L I"]) -> Float[Array, "*L O"]:
        """The output, in `dtype` or else the dtype of `x`."""
        a, b = jnp.split(self.fc1(x), 2, -1)
        return self.fc2(a * self.activation(b)).astype(self.dtype or x.dtype)
