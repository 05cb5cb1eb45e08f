"""The base of every compat layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import state
from .discretization import Reference


class LRNN(nnx.Module):
    """A linear recurrent layer with lrnnx's API: batch-first, torch's names for its methods.

    Args:
        reference: "lrnnx" reproduces lrnnx 1.0.0 to the letter, "paper" the published method.
        precision: of every matrix product, as in `jax.lax.dot`; independent of jax_default_matmul_precision.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.

    Raises:
        ValueError: unknown `reference`. TypeError: `dtype` or `param_dtype` is not real floating point.
    """

    reference: Reference
    d_model: int
    _time_axis: int = 1
    _cache_advice: ClassVar[str] = "make one with allocate_inference_cache(batch_size)"

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
        self.param_dtype = parameter_dtype(self._name, dtype, param_dtype)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_sizes(self, least: int = 1, **sizes: Any) -> None:
        check_sizes(self._name, least, **sizes)

    def _check_choice(self, name: str, value: Any, choices: Sequence[Any]) -> None:
        if value not in choices:
            raise ValueError(f"{self._name}: {name} must be one of {tuple(choices)}, got {value!r}")

    def _check_device(self, device: Any) -> None:
        check_device(self._name, device)

    def _check_entries(
        self, cache: Any, shapes: Mapping[str, Sequence[tuple[int, ...]]], exactly: bool = False
    ) -> None:
        """Raise unless the cache has entries with these names, and others only if not `exactly`, and one of the shapes
        of each, the first being the usual one."""
        fits = isinstance(cache, dict) and (cache.keys() == shapes.keys() if exactly else shapes.keys() <= cache.keys())
        if not fits:
            found = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
            raise ValueError(
                f"{self._name}: inference_cache must have the keys {sorted(shapes)}, got {found}; {self._cache_advice}"
            )
        for name, allowed in shapes.items():
            self._check_leaf(cache[name], name, allowed)

    def _check_leaf(self, leaf: Any, name: str, shapes: Sequence[tuple[int, ...]]) -> None:
        advice = self._cache_advice
        if (shape := getattr(leaf, "shape", None)) not in shapes:
            raise ValueError(f"{self._name}: {name} must have shape {shapes[0]} for this input, got {shape}; {advice}")
        counts = name == "seqlen_offset"
        if not jnp.issubdtype(leaf.dtype, jnp.integer if counts else jnp.inexact):
            kind = "integer" if counts else "floating point or complex"
            raise TypeError(f"{self._name}: {name} must be {kind}, got {leaf.dtype}; {advice}")

    def _input(self, x, layout: str) -> Float[Array, "..."]:
        x = jnp.asarray(x)
        if x.ndim != layout.count(",") + 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"{self._name} expects input {layout} with H = {self.d_model}, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self._name} expects real floating point input {layout}, got {x.dtype}")
        return x if self.dtype is None else x.astype(self.dtype)

    def _param(self, value) -> nnx.Param:
        return nnx.Param(jnp.asarray(value, self.param_dtype))

    def forward(self, *args, **kwargs):
        """The same as calling the layer."""
        return self(*args, **kwargs)

    def _advance(self, x: Float[Array, "B H"], cache: Any, timesteps: Array | None = None) -> tuple[Array, Any]:
        """`step` on one column of the sequence."""
        if timesteps is not None:
            raise ValueError(f"{self._name} is time-invariant and cannot use integration_timesteps; pass None")
        return self.step(x, cache)

    def _compact(self, cache: Any) -> Any:
        """The cache as a loop over steps carries it, if `step` takes a smaller form too."""
        return cache

    def _restored(self, cache: Any) -> Any:
        """The inverse of `_compact`."""
        return cache

    def step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """One step: `(y, cache)`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, jax.Array]:
        """Parameters under the reference's names and shapes; see `compat_torch.state_dict`."""
        return state.state_dict(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, dtype: DTypeLike | None = None
    ) -> state.IncompatibleKeys:
        """Load the reference's state_dict, all or nothing; see `compat_torch.load_state_dict`."""
        return state.load_state_dict(self, state_dict, strict, dtype=dtype)


def check_device(name: str, device: Any) -> None:
    """Raise ValueError unless `device`, an argument of the class `name`, is None or the CPU."""
    if device is not None and str(device) != "cpu":
        raise ValueError(
            f"{name}: device must be None or 'cpu', got {device!r}: JAX places arrays by jax.default_device, "
            "jax.device_put or shardings"
        )


def check_sizes(name: str, least: int = 1, **sizes: Any) -> None:
    """Raise ValueError unless the `sizes`, arguments of the class `name`, are Python integers of at least `least`."""
    expected = "a positive integer" if least == 1 else f"an integer, at least {least}"
    for size, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            advice = f"; pass int({size})" if isinstance(value, np.integer) else ""
            raise ValueError(f"{name}: {size} must be {expected}, got {value!r}{advice}")


def parameter_dtype(name: str, dtype: DTypeLike | None, param_dtype: DTypeLike | None) -> DTypeLike:
    """The dtype of the parameters of the class `name`: `param_dtype`, or else `dtype`, or else float32.

    Raises:
        TypeError: one of them is given and is not a real floating point dtype.
    """
    for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None and not _is_floating(value):
            raise TypeError(
                f"{name}: {argument} must be a real floating point dtype, such as jnp.float32 or jnp.bfloat16, "
                f"got {value!r}"
            )
    return param_dtype or dtype or jnp.float32


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False
