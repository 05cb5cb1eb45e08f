"""The base of every compat layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .. import state
from .discretization import Reference


class LRNN(nnx.Module):
    """A linear recurrent layer with lrnnx's API: batch-first, torch's names for its methods.

    Args:
        reference: "lrnnx" reproduces lrnnx 1.0.0 to the letter, "paper" the published method.
        precision: of every matrix product, as in `jax.lax.dot`; independent of jax_default_matmul_precision.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
    """

    reference: Reference

    def __init__(
        self,
        *,
        reference: Reference,
        precision: jax.lax.PrecisionLike,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike | None,
    ):
        if reference not in get_args(Reference):
            raise ValueError(f"{self._name}: reference must be one of {get_args(Reference)}, got {reference!r}")
        self.reference = reference
        self.precision = precision
        self.dtype = dtype
        self.param_dtype = param_dtype or dtype or jnp.float32

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_sizes(self, **sizes: Any) -> None:
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self._name}: {name} must be a positive integer, got {value!r}")

    def _param(self, value) -> nnx.Param:
        return nnx.Param(jnp.asarray(value, self.param_dtype))

    def forward(self, *args, **kwargs):
        """The same as calling the layer."""
        return self(*args, **kwargs)

    def state_dict(self) -> dict[str, jax.Array]:
        """Parameters under the reference's names and shapes; see `compat_torch.state_dict`."""
        return state.state_dict(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, dtype: DTypeLike | None = None
    ) -> state.IncompatibleKeys:
        """Load the reference's state_dict, all or nothing; see `compat_torch.load_state_dict`."""
        return state.load_state_dict(self, state_dict, strict, dtype=dtype)
