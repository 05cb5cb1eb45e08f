"""Loops over time inside a kernel, and 32-bit indices for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

Carry = TypeVar("Carry")
Result = TypeVar("Result")


def unrolled_loop(count, step: Callable[..., Carry], carry: Carry, unroll: int) -> Carry:
    """`fori_loop(0, count, step, carry)` with `unroll` steps in each turn, whatever `count` is, traced too."""

    def turn(i, carry):
        for j in range(unroll):
            carry = step(i * unroll + j, carry)
        return carry

    static = isinstance(count, int)
    turns = np.int32(count // unroll) if static else jax.lax.div(count, np.int32(unroll))
    carry = jax.lax.fori_loop(np.int32(0), turns, turn, carry)
    if static and count % unroll == 0:
        return carry
    return jax.lax.fori_loop(turns * np.int32(unroll), np.int32(count) if static else count, step, carry)


def with_32_bit_indices(call: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel call traced as if x64 were off: Mosaic has no 64-bit integers, and Python ints become them."""

    def traced(*args):
        with jax.enable_x64(False):
            return call(*args)

    return traced
