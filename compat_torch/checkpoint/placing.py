"""`place`: from views of a mapped file to arrays on JAX's device, several at a time."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from spyx.ops.dtypes import x64_enabled

from .. import state
from ..arrays import all_finite, release, to_device

WORKERS = min(4, os.cpu_count() or 1)


View = tuple[int, int]
"""Address and bytes of an array that is a view of a file."""


def view_of(array: np.ndarray) -> View:
    """Where the memory of an array is."""
    return array.__array_interface__["data"][0], array.nbytes


def place(module: nnx.Module) -> dict[View, bool]:
    """Give the variables of a module that hold views of a file, as loading inside `as_views` leaves them, JAX arrays.

    The pages of each view are given back once it is copied; afterwards nothing depends on the file.

    Args:
        module: its other variables stay as they are.

    Returns:
        for each view whether all of its values are finite.
    """
    config: Any = jax.config
    device, wide = config.jax_default_device, x64_enabled()

    def copied(variable: nnx.Variable) -> tuple[Any, bool]:
        view: Any = variable.get_value()
        with jax.default_device(device), jax.enable_x64(wide):
            # JAX would keep the memory of a contiguous array; any other it copies, and transposes faster than NumPy.
            array = to_device(view) if view.flags.c_contiguous else jax.block_until_ready(jax.device_put(view))
        finite = all_finite(view)
        release(view)
        return array, finite

    variables = {id(entry.variable): entry.variable for entry in state.entries(module)}.values()
    waiting = [variable for variable in variables if isinstance(variable.get_value(), np.ndarray)]
    finite: dict[View, bool] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for variable, (array, sound) in zip(waiting, pool.map(copied, waiting), strict=True):
            finite[view_of(variable.get_value())] = sound
            variable.set_value(array)
    return finite
