"""What a torch user writes in arguments, as JAX methods take it, and results as he expects them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .. import interop

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def jax_arguments(value: Any) -> Any:
    """`value` with torch dtypes as JAX's, and classes of `compat_torch.nn` as the JAX classes behind them."""
    if isinstance(value, torch.dtype):
        return jnp.dtype(str(value).removeprefix("torch."))
    if isinstance(value, functools.partial):
        keywords = {name: jax_arguments(item) for name, item in value.keywords.items()}
        return functools.partial(jax_arguments(value.func), *map(jax_arguments, value.args), **keywords)
    if type(value) is dict:
        return {key: jax_arguments(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(jax_arguments, value))
    if inspect.isclass(value) or inspect.isfunction(value):
        return getattr(value, "jax_class", value)
    return value


def take_device(kwargs: dict[str, Any]) -> torch.device | None:
    """The argument `device`, in whose place None is put: JAX computes where the parameters are."""
    device = kwargs.get("device")
    if device is None:
        return None
    kwargs["device"] = None
    return torch.device(device)


@functools.cache
def signature_of(cls: type, method: str) -> inspect.Signature:
    """The signature of a method, `self` included."""
    return inspect.signature(getattr(cls, method))


def autocast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Under torch.autocast the input, the first argument, comes in its dtype; parameters and states stay as before."""
    if not args or not isinstance(args[0], torch.Tensor) or args[0].dtype not in _AUTOCAST:
        return args
    device = args[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return args
    return (args[0].to(torch.get_autocast_dtype(device)), *args[1:])


def as_tensor(leaf: Any) -> Any:
    """Arrays of NumPy and JAX as tensors, NumPy's scalars as Python's."""
    if isinstance(leaf, np.ndarray | jax.Array):
        return interop.to_torch(jnp.array(leaf))
    return leaf.item() if isinstance(leaf, np.generic) else leaf


def static(method: str, leaf: Any) -> tuple[type, Any]:
    """An argument that is no tensor, as a part of what the method is compiled for.

    Raises:
        TypeError: it has no hash.
    """
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(f"{method}: arguments must be tensors or hashable, got {type(leaf).__name__}") from None
    return type(leaf), leaf


def draw_seed() -> np.ndarray:
    """The data of a JAX key, (2,) uint32, drawn from torch's generator."""
    return torch.randint(2**32, (2,)).numpy().astype(np.uint32)


def draw_key() -> jax.Array:
    """A JAX key, drawn from torch's generator."""
    return jax.random.wrap_key_data(jnp.asarray(draw_seed()), impl="threefry2x32")


def in_place(cache: Any, result: Any) -> Any:
    """The result, of which the last part is the new cache, with the values of that in the cache that was given."""
    *first, new = result
    old_leaves, old_def = jax.tree.flatten(cache)
    new_leaves, new_def = jax.tree.flatten(new)
    if old_def != new_def or not all(isinstance(leaf, torch.Tensor) for leaf in old_leaves):
        return result
    for old, value in zip(old_leaves, new_leaves, strict=True):
        if old is not value:
            old.copy_(value)
    return (*first, cache)
