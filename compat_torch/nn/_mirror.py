"""Modules of `compat_torch.nn` as mirrors of the modules of JAX classes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from ._arguments import jax_arguments
from .module import twin_of, wrap


def mirror(name: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module that has the torch twins of the public names of the module `name`."""

    def get(attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return twin(getattr(importlib.import_module(name), attribute))

    def names() -> list[str]:
        return [public for public in dir(importlib.import_module(name)) if not public.startswith("_")]

    return get, names


@functools.cache
def twin(member: Any) -> Any:
    """The torch twin of an NNX class, or of what makes NNX modules; anything else as it is."""
    if inspect.isclass(member) and issubclass(member, nnx.Module):
        return twin_of(member)
    if not inspect.isfunction(member) and (not inspect.isclass(member) or "__new__" not in vars(member)):
        return member

    @functools.wraps(member, updated=())
    def factory(*args: Any, **kwargs: Any) -> Any:
        result = member(*jax_arguments(args), **jax_arguments(kwargs))
        return wrap(result) if isinstance(result, nnx.Module) else result

    factory.jax_class = member  # type: ignore[attr-defined]
    return factory
