"""Torch modules that look like those of another project: class path, names, attributes; they compute nothing."""

import functools
import itertools

import torch

ACTIVATIONS = {
    None: torch.nn.Identity, "id": torch.nn.Identity, "gelu": torch.nn.GELU, "glu": torch.nn.GLU, "relu": torch.nn.ReLU,
    "sigmoid": torch.nn.Sigmoid, "silu": torch.nn.SiLU, "tanh": torch.nn.Tanh,
}  # fmt: skip


def stand_in(path, base=torch.nn.Module):
    """A class that says it is the one at "module:Class"."""
    module, name = path.split(":")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def with_tensors(path, tensors, attributes=None, *, buffers=(), classes=None):
    """A module of that class with these tensors and attributes, as a live one has them.

    Args:
        path: "module:Class".
        tensors: arrays by dotted name; a level of nothing but numbers is a ModuleList.
        attributes: by dotted name.
        buffers: names of the tensors that are not parameters; integers never are.
        classes: "module:Class" of inner modules, by dotted name.
    """
    root = stand_in(path)()
    for name, value in tensors.items():
        tensor = torch.as_tensor(value)
        path_of_tensor = name.split(".")
        owner, leaf = root, path_of_tensor[-1]
        for parent, below in itertools.pairwise(path_of_tensor):
            if parent not in owner._modules:
                owner.add_module(parent, torch.nn.ModuleList() if below.isdigit() else torch.nn.Module())
            owner = owner._modules[parent]
        if name in buffers or not (tensor.is_floating_point() or tensor.is_complex()):
            owner.register_buffer(leaf, tensor)
        else:
            owner.register_parameter(leaf, torch.nn.Parameter(tensor))
    for name, cls in (classes or {}).items():
        root.get_submodule(name).__class__ = stand_in(cls)
    for name, value in (attributes or {}).items():
        *parents, leaf = name.split(".")
        owner = functools.reduce(_child, parents, root)
        if isinstance(value, torch.nn.Module):
            owner.add_module(leaf, value)
        else:
            setattr(owner, leaf, value)
    return root


def _child(owner, name):
    if name not in owner._modules:
        owner.add_module(name, torch.nn.Module())
    return owner._modules[name]
