"""What a subject is, and how one is made from a class of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from compat_torch import decode
from compat_torch.errors import ReferenceDefectWarning

Params = Mapping[str, Array]


@dataclass(frozen=True)
class Subject:
    """One of our classes under test.

    Attributes:
        name: shown in the report.
        forward: `(kwargs, params, x, **inputs) -> y` in the reference's layout.
        steps: the same, one step at a time.
    """

    name: str
    forward: Callable[..., Array]
    steps: Callable[..., Array]


def build(cls: type[nnx.Module], kwargs: dict[str, Any], params: Params) -> Any:
    """A module of ours with the reference's parameters, never initialised; differentiable in `params`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceDefectWarning)
        module: Any = nnx.eval_shape(lambda: cls(**kwargs))
    module.load_state_dict(params)
    module.eval()
    return module


def compat(cls: type[nnx.Module]) -> Subject:
    """A class of compat_torch: called, and decoded step by step."""

    def forward(kwargs: dict[str, Any], params: Params, x: Float[Array, "B L H"], **inputs: Array) -> Array:
        result = build(cls, kwargs, params)(x, **inputs)
        return result[0] if isinstance(result, tuple) else result

    def steps(kwargs: dict[str, Any], params: Params, x: Float[Array, "B L H"], **inputs: Array) -> Array:
        module = build(cls, kwargs, params)
        return decode(module, x, module.allocate_inference_cache(x.shape[0]), **inputs)[0]

    return Subject(f"{cls.__module__.split('.')[0]}.{cls.__name__}", forward, steps)


def scan_steps(step: Callable, state: Any, x: Float[Array, "B L H"]) -> Float[Array, "B L H"]:
    """Outputs of `step(x_t, state) -> (y_t, state)` over the time axis."""

    def body(state, x_t):
        y_t, state = step(x_t, state)
        return state, y_t

    return jnp.swapaxes(jax.lax.scan(body, state, jnp.swapaxes(x, 0, 1))[1], 0, 1)
