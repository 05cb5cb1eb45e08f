"""Layers as a caller names them: a class, a string, a functools.partial."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import nnx

from .backbone import MIXERS

LayerLike = str | Callable[..., Any]

_ANY = "**"
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_PREFIXES = (["compat_torch", "models"], ["lrnnx", "models"])


def layer_class(name: str) -> Any:
    """The layer of a name.

    Args:
        name: one of LRU, S4, S4D, S5 (the time-invariant one), Centaurus, Mamba, RGLRU, S7, or a dotted name in
            `compat_torch.models`: "ltv.S5", "compat_torch.models.ltv.S5", also as lrnnx has it: "lrnnx.models.ltv.S5",
            "lrnnx.models.ltv.s5:S5".

    Raises:
        ValueError: no layer has this name.
    """
    *path, cls = name.replace(":", ".").split(".")
    if path[:2] in _PREFIXES:
        path = path[2:]
    family = path[0] if path else MIXERS.get(cls)
    if family in ("lti", "ltv") and len(path) <= 2:
        package = importlib.import_module(f"compat_torch.models.{family}")
        found = getattr(package, cls) if cls in package.__all__ else None
        if found is not None and (len(path) < 2 or found.__module__ == f"{package.__name__}.{path[1]}"):
            return found
    raise ValueError(
        f"unknown layer {name!r}: expected one of {tuple(MIXERS)}, or a dotted name such as 'ltv.S5' or "
        "'compat_torch.models.lti.CentaurusDWS'"
    )


def layer_factory(layer: LayerLike, params: Mapping[str, Any], fill: Mapping[str, Any]) -> partial[Any]:
    """What makes the layer when it is called without arguments.

    Args:
        layer: a name, see `layer_class`, a class or function, or a partial of one.
        params: further arguments.
        fill: more of them, for a layer that takes them (or any keyword) and does not have them from elsewhere.

    Raises:
        TypeError: `layer` is nothing of that kind. ValueError: unknown name; transposed=True.
    """
    if isinstance(layer, str):
        layer = layer_class(layer)
    if not callable(layer) or isinstance(layer, nnx.Module):
        found = f"an instance of {type(layer).__name__}" if callable(layer) else repr(layer)
        raise TypeError(f"a layer must be a class, a name or a functools.partial, got {found}")
    factory = partial(layer, **params)
    takes = _takes(factory)
    if "transposed" in takes:
        if factory.keywords.get("transposed"):
            raise ValueError(f"{layer!r} works on (B, L, H) here: transposed=True is not supported")
        factory = partial(factory, transposed=False)
    others = {name: value for name, value in fill.items() if name not in factory.keywords}
    return partial(factory, **{name: value for name, value in others.items() if takes.get(name, takes[_ANY])})


def _takes(factory: partial[Any]) -> Mapping[str, bool]:
    """Whether an argument can be given by name: False where a positional one fills it; _ANY stands for all others."""
    target: Any = factory.func
    bound = len(factory.args)
    if isinstance(target, type):
        if target.__init__ is not object.__init__:
            target = target.__init__
        elif target.__new__ is not object.__new__:
            target = target.__new__
        else:
            return {_ANY: False}
        bound += 1
    parameters = list(inspect.signature(target).parameters.values())
    by_name = {p.name: i >= bound for i, p in enumerate(parameters) if p.kind in _BY_NAME}
    return {**by_name, _ANY: any(p.kind is p.VAR_KEYWORD for p in parameters)}
