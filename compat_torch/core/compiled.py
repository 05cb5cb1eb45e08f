"""Methods that run as one compiled function when they are called eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
P = ParamSpec("P")
R = TypeVar("R")


class _Traced:
    """Stands for an array among static arguments."""


def compiled(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Compile a method, or a function of a module, once for all modules of one structure.

    Without it an eager call dispatches every operation by itself, and compiles the body of every loop and condition
    anew, as JAX knows functions by identity. Inside `jax.jit` nothing changes.

    Args:
        method: reads the module and does not change it. Arrays anywhere in its arguments are traced, other leaves are
            hashable constants; a call with a function among them runs as it is.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def run(graphdef, treedef, constants, variables, arrays):
        left = iter(arrays)
        leaves = [next(left) if leaf is _Traced else leaf for leaf in constants]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        function: Callable[..., R] = method
        return function(nnx.merge(graphdef, variables), *args, **kwargs)

    @functools.wraps(method)
    def call(module: M, *args: P.args, **kwargs: P.kwargs) -> R:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        if any(map(callable, leaves)):
            return method(module, *args, **kwargs)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        constants = tuple(_Traced if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves)
        graphdef, variables = nnx.split(module)
        return run(graphdef, treedef, constants, variables, arrays)

    return call
