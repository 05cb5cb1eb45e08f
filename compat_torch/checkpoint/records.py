"""What a restricted read leaves in place of the classes and functions a pickle names."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import CorruptCheckpointError

_MAX_DEPTH = 100


@dataclass(frozen=True, eq=False)
class Global:
    """The dotted name of a class or function; nothing was imported."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of a class that is not rebuilt: the name of what would have been called, and raw fields.

    Attributes:
        name: dotted name of the class or function.
        args: the arguments it would have been called with.
        state: what `__setstate__` or `__dict__` would have received.
        items: elements appended to it (subclasses of list, set, deque).
        mapping: items assigned to it (subclasses of dict).
    """

    name: str
    args: tuple = ()
    state: object = None
    items: list = field(default_factory=list)
    mapping: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.name!r})"


def as_plain(value: object) -> object:
    """Replace OmegaConf nodes, `argparse.Namespace` and dict subclasses inside `value` by plain containers.

    Containers are copied, shared and cyclic ones once; other records and leaves stay as they are.

    Raises:
        CorruptCheckpointError: nested deeper than 100 levels.
    """
    return _plain(value, {}, 0)


def _plain(value: object, seen: dict[int, object], depth: int) -> object:
    if depth > _MAX_DEPTH:
        raise CorruptCheckpointError(f"objects are nested more than {_MAX_DEPTH} levels deep")
    if id(value) in seen:
        return seen[id(value)]
    content = _content(value) if isinstance(value, Record) else value
    if isinstance(content, dict):
        result: object = {}
        seen[id(value)] = result
        result.update((key, _plain(item, seen, depth + 1)) for key, item in content.items())
    elif isinstance(content, list):
        result = []
        seen[id(value)] = result
        result.extend(_plain(item, seen, depth + 1) for item in content)
    elif isinstance(content, tuple):
        result = tuple(_plain(item, seen, depth + 1) for item in content)
        seen[id(value)] = result
    elif content is not value:
        result = _plain(content, seen, depth + 1)
        seen[id(value)] = result
    else:
        result = value
    return result


def _content(record: Record) -> object:
    state = record.state
    if record.name.startswith("omegaconf.") and isinstance(state, dict):
        for key in ("_content", "_val"):
            if key in state:
                return state[key]
    if record.name == "argparse.Namespace" and isinstance(state, dict):
        return state
    if record.mapping and not record.args and state is None:
        return record.mapping
    return record
