"""The kinds of variables a layer holds, and the hints of the reference that travel with them."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from flax.typing import HashableMapping
from jaxtyping import Array


class Buffer(nnx.Variable):
    """A tensor of the state_dict that is not trained: torch's registered buffer."""


def hint(
    variable: nnx.Variable,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    no_weight_decay: bool = False,
    no_reinit: bool = False,
) -> nnx.Variable:
    """Attach to a variable what the reference attaches to its tensor; returns the variable.

    Args:
        variable: a `nnx.Param` or `Buffer`.
        lr: learning rate of this parameter alone (`_optim["lr"]`).
        weight_decay: weight decay of this parameter alone (`_optim["weight_decay"]`).
        no_weight_decay: never decay it (`_no_weight_decay`).
        no_reinit: a whole model's initialisation leaves it as it is (`_no_reinit`).
    """
    optim = {name: value for name, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    hints = {"optim": optim and HashableMapping(optim), "no_weight_decay": no_weight_decay, "no_reinit": no_reinit}
    variable.set_metadata(**{name: value for name, value in hints.items() if value})
    return variable


def register(
    value: Array | jax.ShapeDtypeStruct, lr: float | None = None, weight_decay: float | None = None
) -> nnx.Variable:
    """A variable with its own learning rate and weight decay; a learning rate of 0 makes it a `Buffer`.

    Args:
        value: the initial value, any shape.
        lr: learning rate; None follows the optimizer.
        weight_decay: weight decay; None follows the optimizer.
    """
    kind: Any = Buffer if lr == 0.0 else nnx.Param
    return hint(kind(value), lr=lr, weight_decay=weight_decay)
