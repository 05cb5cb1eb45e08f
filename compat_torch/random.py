"""The process-wide random stream of constructors called without `rngs`."""

from __future__ import annotations

import itertools
import threading

import jax
from flax import nnx

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
