"""lrnnx's gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..core.base import check_device, check_sizes, parameter_dtype
from ..core.layers import linear
from ..interop import torch_in_torch_out
from ..random import default_rngs


def silu(x: Array) -> Array:
    """`jax.nn.silu`, as a function that pickle knows by name."""
    return jax.nn.silu(x)


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
        ValueError: a size that is not a positive integer, a device other than the CPU. TypeError: `activation` is not
            callable, a dtype is not real floating point.

    Source: GLU variants (arXiv:2002.05202); lrnnx 1.0.0 `lrnnx.layers.mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Array], Array] = silu,
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
        sizes = {"hidden_features": hidden_features, "out_features": out_features}
        given = {name: size for name, size in sizes.items() if size is not None}
        check_sizes("GatedMLP", in_features=in_features, multiple_of=multiple_of, **given)
        if not callable(activation):
            raise TypeError(f"GatedMLP: activation must be a function, such as jax.nn.silu, got {activation!r}")
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        common: dict[str, Any] = {
            "bias": bias,
            "param_dtype": parameter_dtype("GatedMLP", dtype, param_dtype),
            "precision": precision,
            "rngs": default_rngs(rngs),
        }
        self.dtype, self.activation = dtype, activation
        self.fc1 = linear(in_features, 2 * hidden, **common)
        self.fc2 = linear(hidden, in_features if out_features is None else out_features, **common)

    @torch_in_torch_out
    def __call__(self, x: Float[Array, "*L I"]) -> Float[Array, "*L O"]:
        """The output, in `dtype` or else the dtype of `x`.

        Raises:
            ValueError: wrong width. TypeError: `x` is not real floating point.
        """
        x, width = jnp.asarray(x), self.fc1.in_features
        if x.shape[-1:] != (width,):
            raise ValueError(f"GatedMLP expects input (..., {width}), got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"GatedMLP expects real floating point input, got {x.dtype}")
        a, b = jnp.split(self.fc1(x), 2, -1)
        return self.fc2(a * self.activation(b)).astype(self.dtype or x.dtype)
