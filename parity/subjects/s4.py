"""Our answers to the classes of state-spaces/s4."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from compat_torch import decode
from compat_torch.architectures.original import S4Model
from compat_torch.models.original import S4D, S4Block
from compat_torch.state import entries

from .base import Params, Subject, build, compat


def _block() -> Subject:
    """S4Block, whose step mode a case has as "step_mode" beside the arguments."""
    plain = compat(S4Block)

    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        return plain.forward(_without(kwargs, "step_mode"), params, x, **inputs)

    def steps(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        block = build(S4Block, _without(kwargs, "step_mode"), params)
        batch = x.shape[0]
        return decode(block, x, block.allocate_inference_cache(batch, mode=kwargs.get("step_mode")), **inputs)[0]

    return Subject("original.S4Block", forward, steps)


def _standalone() -> Subject:
    """S4D, whose parameters with a learning rate of 0 are buffers: no gradient goes to them."""
    plain = compat(S4D)

    def forward(kwargs: dict[str, Any], params: Params, x: Array, **inputs: Array) -> Array:
        layer = nnx.eval_shape(lambda: S4D(**kwargs))
        trained = {entry.name for entry in entries(layer) if isinstance(entry.variable, nnx.Param)}
        params = {name: value if name in trained else jax.lax.stop_gradient(value) for name, value in params.items()}
        return plain.forward(kwargs, params, x, **inputs)

    return Subject("original.S4D", forward, plain.steps)


def _model() -> Subject:
    """S4Model; a case has the seed of its training among the arguments."""
    plain = compat(S4Model)

    def forward(kwargs: dict[str, Any], params: Params, x: Float[Array, "B L I"], **inputs: Array) -> Array:
        return plain.forward(_without(kwargs, "seed"), params, x, **inputs)

    return Subject("original.S4Model", forward, plain.steps)


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


SUBJECTS: dict[str, list[Subject]] = {
    "models.s4.s4:S4Block": [_block()],
    "models.s4.s4d:S4D": [_standalone()],
    "backbone of example.py rebuilt around models.s4.s4d:S4D": [_model()],
}
