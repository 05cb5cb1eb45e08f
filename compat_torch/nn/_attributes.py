"""What a live torch module keeps beside its tensors: constructor arguments, dropout rates, hints of the optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from flax import nnx

from ..checkpoint.formats import Format
from ..core.variables import Buffer, hint
from ..state import entries

MISSING = object()

_OWNERS = ("", "layer", "layer.kernel", "seq", "s5.seq")
# The constructor argument -> where S4Block keeps the module that it made of it.
_ACTIVATIONS = {
    "activation": "layer.activation",
    "mult_act": "mult_activation",
    "gate_act": "input_gate.1",
    "final_act": "output_linear.1",
}
_ACTIVATION_NAMES = {
    "ELU": "elu", "GELU": "gelu", "GLU": "glu", "Identity": "id", "ReLU": "relu", "SiLU": "silu",
    "Sigmoid": "sigmoid", "Softplus": "softplus", "Tanh": "tanh",
}  # fmt: skip
_DROPOUTS = {
    "dropout": ("drop", "dropout"),
    "drop_kernel": ("layer.drop_kernel",),
    "attn_dropout": ("attn_dropout",),
    "ff_dropout": ("ff_dropout",),
}
_TIED_DROPOUT = "DropoutNd"


def read_arguments(module: torch.nn.Module, entry: Format, given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a layer that its tensors do not tell, other than those given.

    Raises:
        ValueError: the module does not keep them: they are named.
    """
    taken = inspect.signature(entry.load_class().__init__).parameters
    wanted = [name for name in dict.fromkeys((*entry.asks, *entry.assumes)) if name not in given]
    values = {name: _argument(module, name) for name in wanted if not _without_effect(module, name)}
    if missing := [name for name, value in values.items() if value is MISSING]:
        raise ValueError(
            f"from_torch: {type(module).__name__} does not keep {', '.join(missing)}: pass from_torch(module, "
            + ", ".join(f"{name}=..." for name in missing)
            + ")"
        )
    if isinstance(final := _part(module, _ACTIVATIONS["final_act"]), torch.nn.Module) and "final_act" in taken:
        values["final_act"] = _activation(final)
    for name, places in _DROPOUTS.items():
        found = next((part for place in places if isinstance(part := _part(module, place), torch.nn.Module)), None)
        if name in taken and found is not None:
            values[name] = float(getattr(found, "p", 0.0))
            if name == "dropout" and "tie_dropout" in taken:
                values["tie_dropout"] = type(found).__name__ == _TIED_DROPOUT
    return {name: value for name, value in values.items() if name not in given}


def take_hints(result: nnx.Module, module: torch.nn.Module) -> None:
    """Give the variables of `result` what the tensors of the same names carry.

    That is a learning rate and weight decay of their own (`_optim`), and being a buffer, which is not trained.
    """
    buffers, parameters = (
        dict(named(remove_duplicate=False)) for named in (module.named_buffers, module.named_parameters)
    )
    frozen: dict[int, Buffer] = {}
    for found in list(entries(result)):
        variable = found.variable
        if found.name in buffers and isinstance(variable, nnx.Param):
            *path, leaf = found.name.split(".")
            buffer = frozen.setdefault(id(variable), Buffer(variable.get_value(), **variable.get_metadata()))
            setattr(functools.reduce(getattr, path, result), leaf, buffer)
        elif found.name in parameters and (optim := getattr(parameters[found.name], "_optim", None)):
            hint(variable, lr=optim.get("lr"), weight_decay=optim.get("weight_decay"))


def _argument(module: torch.nn.Module, name: str) -> Any:
    for owner in _OWNERS:
        value = getattr(_part(module, owner), name, MISSING)
        if value is None or isinstance(value, bool | int | float | str):
            return value
    if name == "discretization":
        return getattr(getattr(module, "discretize_fn", None), "__name__", MISSING)
    kept = _part(module, _ACTIVATIONS[name]) if name in _ACTIVATIONS else None
    if kept is None:
        return MISSING
    own = getattr(module, "activation", None)
    if name != "mult_act" or not isinstance(own, torch.nn.Module) or isinstance(own, torch.nn.Identity):
        return _activation(kept)
    if isinstance(kept, torch.nn.Identity):
        return _activation(own)
    raise ValueError(
        f"from_torch: {type(module).__name__} has activation and mult_activation, one after the other: the JAX class "
        "has one of them"
    )


def _activation(module: torch.nn.Module) -> Any:
    return _ACTIVATION_NAMES.get(type(module).__name__, MISSING)


def _without_effect(module: torch.nn.Module, name: str) -> bool:
    """The module has no part that the argument is about, or only one value of it."""
    if name == "gate_act":
        return getattr(module, "gate", None) is None
    return name == "disc" and _part(module, "layer.kernel.P") is not None


def _part(module: Any, path: str) -> Any:
    """The part at a dotted path; None if there is none."""
    return functools.reduce(lambda part, name: getattr(part, name, None), filter(None, path.split(".")), module)
