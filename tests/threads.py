"""Calls of one function from many threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np


def check_calls_at_once(run: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Calls that compete for XLA's pool all end, each with the result, to the last bit, that it has alone."""
    alone = [jax.device_get(run(*args)) for args in arguments]

    def calls(args):
        return [jax.device_get(run(*args)) for _ in range(40)]

    with ThreadPoolExecutor(len(arguments)) as pool:
        for results, expected in zip(pool.map(calls, arguments), alone, strict=True):
            for result in results:
                jax.tree.map(np.testing.assert_array_equal, result, expected)
