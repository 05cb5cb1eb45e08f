"""The whole model of the example of state-spaces/s4."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..core.base import LRNN
from ..core.layers import linear
from ..interop import torch_in_torch_out
from ..layers.block import layer_norm
from ..models.original import S4D
from ..random import default_rngs
from ._pooling import SequencePooling, per_row, valid_steps
from .embedding import apply_dropout, dropout_layer

__all__ = ["S4Model"]


class S4Model(LRNN):
    """Sequence classification with standalone S4D layers: (B, L, d_input) -> (B, d_output).

    A linear encoder; n_layers times x <- norm(x + dropout(s4(x))), or x <- x + dropout(s4(norm(x))); the mean over
    time; a linear decoder.

    Args:
        d_input: width of the input.
        d_output: width of the output.
        d_model: width of the layers.
        n_layers: number of layers.
        dropout: rate in and after each S4D, one mask for all steps.
        prenorm: the norm is before the S4D, not after the sum.
        d_state: real states of each channel of the S4D.
        lr: learning rate of the state-space parameters, see `S4D`; None follows the optimizer. (The example takes its
            own learning rate, but 0.001 at most.)
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of activations and output; None: the output has that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: encoder.*, s4_layers.i.* as in `S4D`, norms.i.{weight, bias}, decoder.*.

    There is no `step`: the mean needs the whole sequence.

    Raises:
        ValueError: a size that is not a positive integer, a rate outside of [0, 1].

    Source: S4D (arXiv:2206.11893); state-spaces/s4 `example.py`.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int = 10,
        d_model: int = 256,
        n_layers: int = 4,
        dropout: float = 0.2,
        prenorm: bool = False,
        *,
        d_state: int = 64,
        lr: float | None = 0.001,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_input=d_input, d_output=d_output, d_model=d_model, n_layers=n_layers)
        self.d_input, self.d_model, self.prenorm = d_input, d_model, bool(prenorm)
        self.dropout = dropout_layer(self._name, dropout, (1,))
        rngs = default_rngs(rngs)
        common: dict[str, Any] = {"precision": precision, "param_dtype": self.param_dtype, "rngs": rngs}
        self.encoder = linear(d_input, d_model, **common)
        self.s4_layers = nnx.List(
            S4D(d_model, d_state, dropout, transposed=False, lr=lr, dtype=dtype, **common) for _ in range(n_layers)
        )
        self.norms = nnx.List(layer_norm(d_model, param_dtype=self.param_dtype) for _ in range(n_layers))
        self.pooling = SequencePooling("mean")
        self.decoder = linear(d_model, d_output, **common)

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L I"],
        lengths: Int[Array, " B"] | int | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B O"]:
        """Logits.

        Args:
            x: real floating point, shape (B, L, d_input).
            lengths: valid steps of each row: integer, shape (B,), or a Python integer for all rows. The mean is over
                them; the padding, even NaN, reaches nothing. (The reference has no such argument.)
            rngs: with a stream "dropout"; needed in training mode with dropout.

        Returns:
            Shape (B, d_output), in `dtype`, or else the dtype of x.

        Raises:
            ValueError: wrong rank or width; no `rngs` where needed. TypeError: wrong dtype.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.d_input:
            raise ValueError(f"{self._name} expects input (B, L, {self.d_input}), got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self._name} expects real floating point input, got {x.dtype}")
        B, L = x.shape[:2]
        lengths = per_row(lengths, B, L)
        x = jnp.where(valid_steps(lengths, B, L)[..., None], x, 0)
        dtype = self.dtype or x.dtype
        h = self.encoder(x.astype(dtype))
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            z = layer(norm(h) if self.prenorm else h, lengths, rngs=rngs)[0]
            h = h + apply_dropout(self._name, self.dropout, z, rngs)
            if not self.prenorm:
                h = norm(h)
        return self.decoder(self.pooling(h, lengths)[0]).astype(dtype)
