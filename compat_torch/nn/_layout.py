"""What of an NNX module becomes torch parameters, buffers and submodules, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from ..state import Entry

Path = tuple[str, ...]


def members(node: nnx.Module) -> Iterator[tuple[str, nnx.Variable | nnx.Module]]:
    """The variables (but random streams) and modules that are attributes of the module, in order of definition.

    Raises:
        TypeError: a variable of it is neither of these, but inside another object.
    """
    held: set[int] = set()
    for name, value in vars(node).items():
        if isinstance(value, nnx.Variable) and not isinstance(value, nnx.RngState):
            held.add(id(value))
            yield name, value
        elif isinstance(value, nnx.Module):
            held.update(map(id, _variables(value)))
            yield name, value
    if stray := [variable for variable in _variables(node) if id(variable) not in held]:
        raise TypeError(
            f"{type(node).__name__} holds {len(stray)} variables (the first is {stray[0]}) outside of modules; keep "
            "them as attributes of an nnx.Module, nnx.List or nnx.Dict"
        )


def entry_of(owner: nnx.Module, path: Path, variable: nnx.Variable) -> Entry:
    """A variable under torch's name, if its module is a layer of Flax or of compat_torch, or else under its own."""
    if any(base.__module__.startswith(("flax.nnx.nn", "compat_torch.")) for base in type(owner).__mro__):
        return Entry.at(path, variable)
    return Entry(".".join(path), variable, reversed_axes=False)


def list_length(node: nnx.Module) -> int | None:
    """How many modules a list of nothing but modules has; None for anything else."""
    if not isinstance(node, nnx.List):
        return None
    inside = [value for _, value in members(node)]
    return len(inside) if all(isinstance(value, nnx.Module) for value in inside) else None


def random_streams(node: nnx.Module) -> list[nnx.Variable]:
    """The keys and counts of random streams that the module holds."""
    return [leaf for _, leaf in nnx.iter_graph(node) if isinstance(leaf, nnx.RngState)]


def _variables(node: nnx.Module) -> list[nnx.Variable]:
    leaves = (leaf for _, leaf in nnx.iter_graph(node))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.RngState)]


def nodes(module: nnx.Module, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, nnx.Module]]:
    """The module and all modules below it, parents first, each under all its paths.

    Raises:
        ValueError: a module contains itself.
    """
    if id(module) in above:
        raise ValueError(f"{'.'.join(path)} of type {type(module).__name__} contains itself: a torch module cannot")
    yield path, module
    for name, value in members(module):
        if isinstance(value, nnx.Module):
            yield from nodes(value, (*path, name), (*above, id(module)))


@dataclass(frozen=True)
class Slot:
    """One variable under all its names.

    Attributes:
        paths: of the torch tensor, sorted: (submodule, ..., name).
        expected: shape and dtype as torch stores it.
        trained: it is a parameter, not a buffer.
    """

    paths: tuple[Path, ...]
    expected: jax.ShapeDtypeStruct
    trained: bool


def slots(module: nnx.Module) -> tuple[list[Slot], list[Entry]]:
    """The variables of the module, each once, by name, and where their values are read and written."""
    found: dict[int, tuple[list[Path], Entry]] = {}
    for path, node in nodes(module):
        for name, value in members(node):
            if isinstance(value, nnx.Variable):
                entry = entry_of(node, (*path, name), value)
                paths = found.setdefault(id(value), ([], entry))[0]
                paths.append((*path, entry.name.removeprefix(".".join((*path, "")))))
    places = []
    for paths, entry in sorted(((sorted(paths), entry) for paths, entry in found.values()), key=lambda pair: pair[0]):
        trained = isinstance(entry.variable, nnx.Param)
        places.append((Slot(tuple(paths), entry.expected, trained), entry))
    return [slot for slot, _ in places], [entry for _, entry in places]


def abstract(module: nnx.Module) -> nnx.Module:
    """A copy of the module that has shapes and dtypes instead of values."""
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return in_order_of(module, nnx.merge(graphdef, state))


def _pairs(module: nnx.Module, copy: nnx.Module) -> list[tuple[nnx.Module, nnx.Module]]:
    """The modules below two equal modules, with each other."""
    others = dict(nodes(copy))
    return [(node, others[path]) for path, node in nodes(module)]


def in_order_of(module: nnx.Module, copy: nnx.Module) -> nnx.Module:
    """`copy`, its attributes in the order of definition that `module` has; Flax sorts those of what it merges.

    It is the order of a torch module's parameters, by which the state of optimizers is stored.
    """
    for original, node in _pairs(module, copy):
        held = dict(vars(node))
        vars(node).clear()
        vars(node).update({name: held[name] for name in vars(original)})
    return copy


@dataclass(frozen=True, eq=False)
class Structure:
    """The static half of an NNX module, one object for all modules that are equal in it; see `structure_of`.

    Attributes:
        graphdef: of the module.
        state: its state, with shapes and dtypes instead of values.
    """

    graphdef: Any
    state: Any

    def build(self) -> nnx.Module:
        """A module without values, whose variables belong to the trace in which this is called."""
        return nnx.merge(self.graphdef, jax.tree.map(lambda leaf: leaf, self.state))


_structures: dict[Any, Structure] = {}


def structure_of(module: nnx.Module) -> Structure:
    """The structure of an abstract module: modules that share it share their compiled functions."""
    graphdef, state = nnx.split(module)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
    return _structures.setdefault((graphdef, shapes), Structure(graphdef, state))


class Layout:
    """The places of a module's tensors and submodules, and its structure in each mode.

    Attributes:
        template: the module without values.
        nodes: it and all modules below it, parents first, each under all its paths.
        lists: of those among them that are lists of modules, and nothing else, the length by path.
        slots: its variables.
        has_streams: it holds random streams of its own.
    """

    def __init__(self, template: nnx.Module):
        self.template = template
        self.nodes = list(nodes(template))
        self.lists = {path: length for path, node in self.nodes if (length := list_length(node)) is not None}
        self.slots = slots(template)[0]
        self.has_streams = bool(random_streams(template))
        self._modes: dict[tuple[bool, ...], tuple[Structure, bool]] = {}

    def in_mode(self, training: tuple[bool, ...]) -> tuple[Structure, bool]:
        """The structure with each node in training mode or not, and whether there is dropout to be drawn then."""
        if training not in self._modes:
            for (_, node), mode in zip(self.nodes, training, strict=True):
                node.train() if mode else node.eval()
            drops = (node for _, node in self.nodes if isinstance(node, nnx.Dropout))
            active = any(0 < node.rate < 1 and not node.deterministic for node in drops)
            self._modes[training] = structure_of(self.template), active
        return self._modes[training]


def modes(module: nnx.Module) -> list[tuple[nnx.Module, bool]]:
    """The modules that say in which mode they are, and whether that is training."""
    names = ("deterministic", "use_running_average")
    said = ((node, getattr(node, name, None)) for _, node in nodes(module) for name in names)
    return [(node, not value) for node, value in said if isinstance(value, bool)]
