"""The reference's parameter groups for optax."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

if TYPE_CHECKING:
    import optax

DEFAULT = "default"


def groups(model: nnx.Module | nnx.State) -> dict[str, dict[str, float]]:
    """What the parameters ask of the optimizer, by label.

    Args:
        model: a module, or its `nnx.state(model, nnx.Param)`.

    Returns:
        label -> some of {"lr": ..., "weight_decay": ...}: torch's `_optim` of the parameter, with a weight decay
        of 0 where the reference says `_no_weight_decay`. "default" asks for nothing. The label spells the values
        out: "lr=0.001 weight_decay=0.0".
    """
    wishes = [_wish(variable) for variable in _variables(model)]
    return {_label(wish): wish for wish in wishes}


def labels(model: nnx.Module | nnx.State) -> nnx.State:
    """The label of every trained parameter, as the label tree of `optax.multi_transform`.

    Args:
        model: a module, or its `nnx.state(model, nnx.Param)`.

    Returns:
        A tree like `nnx.state(model, nnx.Param)` with a key of `groups(model)` at every parameter. Buffers (a
        learning rate of 0 in the reference) are not in it.
    """
    return jax.tree.map(lambda variable: _label(_wish(variable)), _params(model), is_leaf=_is_variable)


def grouped(
    optimizer: Callable[..., optax.GradientTransformation],
    model: nnx.Module,
    learning_rate: Any,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """An optax optimizer that gives each parameter of `model` the learning rate and decay it asks for.

    Args:
        optimizer: called as `optimizer(learning_rate, weight_decay=..., **kwargs)` once per group: `optax.adamw`,
            `optax.lion`, ...
        model: a module; its parameters' hints choose the groups.
        learning_rate: of the parameters without their own: a number or an optax schedule.
        weight_decay: of the parameters without their own.
        **kwargs: further arguments of `optimizer`.

    Returns:
        A transformation for `nnx.Optimizer(model, tx, wrt=nnx.Param)`.

    Raises:
        ImportError: optax is not installed.
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError("compat_torch.optim.grouped needs optax: pip install 'spyx-torch[train]'") from error
    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: optimizer(wish.get("lr", learning_rate), weight_decay=wish.get("weight_decay", weight_decay), **kwargs)
        for label, wish in groups(model).items()
    }
    return optax.multi_transform(transforms, labels(model))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _params(model: nnx.Module | nnx.State) -> nnx.State:
    return model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)


def _variables(model: nnx.Module | nnx.State) -> list[nnx.Variable]:
    return jax.tree.leaves(_params(model), is_leaf=_is_variable)


def _wish(variable: nnx.Variable) -> dict[str, float]:
    hints = variable.get_metadata()
    return {**hints.get("optim", {}), **({"weight_decay": 0.0} if hints.get("no_weight_decay") else {})}


def _label(wish: dict[str, float]) -> str:
    return " ".join(f"{name}={wish[name]}" for name in sorted(wish)) or DEFAULT
