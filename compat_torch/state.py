"""The parameter tree as a state_dict: the reference's names and shapes, for any module of compat_torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from spyx.ops.dtypes import x64_enabled

from . import interop
from .errors import CheckpointError, StateDictMismatchError


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` left out, as `torch.nn.Module.load_state_dict` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def named_variables(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Variable]]:
    """Every parameter of the module under each of its dotted names, in order of definition."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nnx.Variable):
            yield prefix + name, value
        elif isinstance(value, nnx.Module):
            yield from named_variables(value, f"{prefix}{name}.")


def state_dict(module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters by name, as they are: of a gradient tree (as `nnx.grad` returns for the module) too.

    Args:
        module: a module of compat_torch, or an `nnx.State` with the same paths.

    Returns:
        Names and shapes of the reference's `state_dict()`; arrays, not copies.
    """
    if isinstance(module, nnx.State):
        flat = nnx.to_flat_state(module)
        return {".".join(map(str, path)): variable[...] for path, variable in flat}
    return {name: variable[...] for name, variable in named_variables(module)}


def load_state_dict(
    module: nnx.Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    *,
    dtype: DTypeLike | None = None,
) -> IncompatibleKeys:
    """Put the arrays of `state_dict` into the module; either all of them or, on an error, none.

    Args:
        module: a module of compat_torch; its parameters may be abstract (from `nnx.eval_shape`).
        state_dict: name -> array (JAX, NumPy or torch), names and shapes as in the reference.
        strict: raise for missing and unexpected names; otherwise they are left as they are and returned.
        dtype: of the parameters; None adopts the dtype of each array.

    Returns:
        The missing and unexpected names (both empty when strict).

    Raises:
        StateDictMismatchError: names (when strict), shapes or kinds of dtype differ; it lists all of them.
        CheckpointError: float64 values while jax_enable_x64 is off, and no `dtype` that says otherwise.
    """
    variables = dict(named_variables(module))
    missing = [name for name in variables if name not in state_dict]
    unexpected = [name for name in state_dict if name not in variables]
    arrays = {name: _as_array(name, state_dict[name], dtype) for name in variables if name in state_dict}
    mismatched = [
        f"{name}: expected {_describe(variables[name].get_value())}, got {_describe(array)}"
        for name, array in arrays.items()
        if array.shape != variables[name].shape or not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if mismatched or (strict and (missing or unexpected)):
        shown = (missing, unexpected) if strict else ((), ())
        raise StateDictMismatchError(type(module).__name__, *shown, mismatched, known=list(variables))
    for name, array in arrays.items():
        variables[name].set_value(jnp.array(array, dtype=dtype, copy=not isinstance(array, jax.Array)))
    return IncompatibleKeys(missing, unexpected)


def _as_array(name: str, value: Any, dtype: DTypeLike | None) -> np.ndarray | jax.Array:
    if interop.is_torch(value):
        value = interop.to_numpy(value)
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
    wide = value.dtype in (np.float64, np.complex128)
    if wide and dtype is None and not x64_enabled():
        raise CheckpointError(
            f"{name} is {value.dtype}, but 64-bit values are off in JAX: call "
            'jax.config.update("jax_enable_x64", True) first, or pass dtype=jnp.float32 to round them'
        )
    return value


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
