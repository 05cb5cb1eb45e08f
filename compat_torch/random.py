"""Random streams of constructors: the process-wide one, and one that draws nothing of worth."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)

_lock = threading.Lock()
_seed = 0
_draws = itertools.count()


def manual_seed(seed: int) -> None:
    """Restart the stream from which constructors without `rngs=` draw, as `torch.manual_seed` does.

    Args:
        seed: any Python integer that `jax.random.key` takes. The stream starts at seed 0.
    """
    global _seed, _draws
    with _lock:
        _seed, _draws = seed, itertools.count()


def default_rngs(rngs: nnx.Rngs | None) -> nnx.Rngs:
    """`rngs`, or the next streams of the process-wide sequence: never the same twice.

    Raises:
        TypeError: a key or a seed in place of streams.
    """
    if rngs is not None:
        if not callable(rngs):
            raise TypeError(f"rngs must be flax.nnx.Rngs, as nnx.Rngs(0) makes them, got {type(rngs).__name__}")
        return rngs
    with _lock:
        return nnx.Rngs(jax.random.fold_in(jax.random.key(_seed), next(_draws)))


class OneKey:
    """Random streams that all give the same key, for parameters that are about to be replaced.

    `nnx.Rngs` counts its draws in a variable, which while tracing takes time quadratic in the number of draws.
    """

    def __init__(self, key: Any):
        self._key = key

    def __call__(self) -> Any:
        return self._key

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def alike(count: int, make: Callable[[], M], rngs: nnx.Rngs | OneKey) -> list[M]:
    """`count` results of `make`, which draws from `rngs` and nothing else; from `OneKey` it is called once.

    Args:
        count: at least 0.
        make: gives a new module each time; one as the other but for what is drawn.
        rngs: what it draws from.
    """
    if not isinstance(rngs, OneKey) or count < 2:
        return [make() for _ in range(count)]
    first = make()
    return [first, *(nnx.clone(first) for _ in range(count - 1))]
