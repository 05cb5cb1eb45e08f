"""The parameter tree as a state_dict: the reference's names and shapes, for any module of compat_torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from spyx.ops.dtypes import to_complex, x64_enabled

from . import arrays, interop
from .core.variables import Buffer
from .errors import CheckpointError, StateDictMismatchError

# Flax's name of a leaf: torch's name, and whether the axes are reversed
# (Linear (in, out) <-> (out, in), Conv (K, in / groups, out) <-> (out, in / groups, K)).
_FLAX_LEAVES = {"kernel": ("weight", True), "scale": ("weight", False), "embedding": ("weight", False)}


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` left out, as `torch.nn.Module.load_state_dict` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class Entry:
    """One name of a state_dict and the variable behind it.

    Attributes:
        name: dotted, the reference's.
        variable: holds the value, possibly abstract.
        reversed_axes: the reference stores it with all axes in reverse order.
    """

    name: str
    variable: nnx.Variable
    reversed_axes: bool

    @classmethod
    def at(cls, path: tuple[str, ...], variable: nnx.Variable) -> Entry:
        leaf, reversed_axes = _FLAX_LEAVES.get(path[-1], (path[-1], False))
        return cls(".".join((*path[:-1], leaf)), variable, reversed_axes)

    @property
    def is_complex(self) -> bool:
        """The reference's tensor is complex: here a trailing axis (re, im)."""
        return self.variable.get_metadata().get("is_complex", False)

    def read(self) -> jax.Array:
        """The value as the reference stores it."""
        value = self.variable[...]
        if self.is_complex:
            return to_complex(value[..., 0], value[..., 1])
        return value.T if self.reversed_axes else value

    def view(self) -> np.ndarray:
        """The value as the reference stores it, on the host; on the CPU it shares the variable's memory."""
        value = np.asarray(self.variable[...])
        if self.is_complex:
            wide = np.result_type(value.dtype, np.float32)
            return np.ascontiguousarray(value, wide).view(np.result_type(wide, np.complex64))[..., 0]
        return value.T if self.reversed_axes else value

    def write(self, array: np.ndarray | jax.Array, dtype: DTypeLike | None) -> None:
        """Take over a value as the reference stores it; a NumPy array is copied, once."""
        if self.is_complex:
            module: Any = np if isinstance(array, np.ndarray) else jnp
            array = module.stack([module.real(array), module.imag(array)], -1)
        elif self.reversed_axes:
            array = array.T
        if not jnp.issubdtype(array.dtype, jnp.floating):
            dtype = self.variable.get_value().dtype
        if isinstance(array, np.ndarray):
            self.variable.set_value(arrays.to_device(array, dtype))
        else:
            self.variable.set_value(jnp.asarray(array, dtype=dtype))

    @property
    def expected(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype as the reference stores it."""
        value = self.variable.get_value()
        if self.is_complex:
            return jax.ShapeDtypeStruct(value.shape[:-1], jnp.result_type(value.dtype, jnp.complex64))
        return jax.ShapeDtypeStruct(value.shape[::-1] if self.reversed_axes else value.shape, value.dtype)

    def misfit(self, array: Any) -> str | None:
        """Why `array` cannot be loaded, or None."""
        expected = self.expected
        kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
        same_kind = any(jnp.issubdtype(array.dtype, k) and jnp.issubdtype(expected.dtype, k) for k in kinds)
        if array.shape == expected.shape and same_kind:
            return None
        return f"{self.name}: expected {_describe(expected)}, got {_describe(array)}"


def entries(module: nnx.Module, path: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Every parameter and buffer of the module under each of its names, in order of definition.

    Raises:
        CheckpointError: a layer with rounded weights, which are no parameters.
    """
    quantization = getattr(module, "quantization", None)
    if quantization is not None and quantization.mode == "ptq":
        raise CheckpointError(
            f"{'.'.join(path) or type(module).__name__} holds rounded weights ({quantization.weight}), for which a "
            "state_dict has no names: save the float model, or nnx.state(model) (see spyx.quant.quantize)"
        )
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nnx.Param | Buffer):
            yield Entry.at((*path, name), value)
        elif isinstance(value, nnx.Module):
            yield from entries(value, (*path, name))


def state_dict(module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters and buffers by name, as they are: of a gradient tree (as `nnx.grad` returns) too.

    Args:
        module: a module of compat_torch, or an `nnx.State` with the same paths (in which a parameter
            that has several names is found under the first).

    Returns:
        Names, shapes and kinds of dtype of the reference's `state_dict()`; a tensor tied under several
        names is under each of them.
    """
    if isinstance(module, nnx.State):
        flat = nnx.to_flat_state(module)
        found = (Entry.at(tuple(map(str, path)), variable) for path, variable in flat)
    else:
        found = entries(module)
    return {entry.name: entry.read() for entry in found}


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
        state_dict: name -> array (JAX, NumPy or torch), names and shapes as in the reference. Of a parameter
            with several names one is enough.
        strict: raise for missing and unexpected names; otherwise they are left as they are and returned.
        dtype: of the floating point parameters; None adopts the dtype of each array.

    Returns:
        The missing and unexpected names (both empty when strict).

    Raises:
        StateDictMismatchError: names (when strict), shapes or kinds of dtype differ, or two names of one
            parameter have different values; it lists all of them.
        CheckpointError: float64 values while jax_enable_x64 is off, and no `dtype` that says otherwise.
    """
    known = list(entries(module))
    given = {id(entry.variable) for entry in known if entry.name in state_dict}
    missing = [entry.name for entry in known if id(entry.variable) not in given]
    names = {entry.name for entry in known}
    unexpected = [name for name in state_dict if name not in names]
    loads: dict[int, tuple[Entry, Any]] = {}
    mismatched = []
    for entry in known:
        if entry.name not in state_dict:
            continue
        array = as_array(entry.name, state_dict[entry.name], dtype)
        first, value = loads.setdefault(id(entry.variable), (entry, array))
        if problem := entry.misfit(array):
            mismatched.append(problem)
        elif not _equal(value, array):
            mismatched.append(f"{entry.name} and {first.name} are one parameter, but their values differ")
    if mismatched or (strict and (missing or unexpected)):
        shown = (missing, unexpected) if strict else ((), ())
        raise StateDictMismatchError(type(module).__name__, *shown, mismatched, known=list(names))
    for entry, array in loads.values():
        entry.write(array, dtype)
        if not arrays.keeps_views():
            arrays.release(array)
    return IncompatibleKeys(missing, unexpected)


def as_array(name: str, value: Any, dtype: DTypeLike | None) -> np.ndarray | jax.Array:
    """A tensor that is to be loaded, as an array of its own shape and dtype.

    Args:
        name: for the message.
        value: JAX, NumPy or torch.
        dtype: what it will be converted to; None: it keeps its own.

    Raises:
        CheckpointError: 64-bit values without a `dtype` while jax_enable_x64 is off.
    """
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


def _equal(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, Tracer) or isinstance(b, Tracer):
        return True
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=bool(jnp.issubdtype(b.dtype, jnp.inexact)))


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
