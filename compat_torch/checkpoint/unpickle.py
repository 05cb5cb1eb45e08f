"""A pickle interpreter that imports nothing and calls nothing but the builders it is given.

Opcodes are decoded by `pickletools.genops`, which only parses. Every class or function a pickle names is
looked up in two tables; what is not there stays an inert `Global`, and "calling" it gives an inert `Record`.
Python's own unpickler is not involved: no `__setstate__`, no `__reduce__`, no extension registry.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from ..errors import CheckpointError, CorruptCheckpointError
from .records import Global, Record
from .source import MALFORMED

Charge = Callable[[int], None]
Builder = Callable[[tuple, Charge], object]

_PUSH_ARGUMENT = frozenset(
    (
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "BININT",
        "BININT1",
        "BININT2",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    )
)
_PUSH_CONSTANT: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_SCALAR_KEYS = (str, bytes, float, complex, bool, type(None), Global, Record)
_BYTES_PER_ELEMENT = 128


class RestrictedUnpickler:
    """Builds plain containers, what `builders` and `constants` name, and inert records for everything else.

    Args:
        builders: dotted name -> function(args, charge) that makes the object; it must validate `args`.
        constants: dotted name -> value that stands for the name itself.
        persistent: resolves a persistent id.
        allowance: bytes that builders may allocate by copying what is already there (a small pickle can ask
            for the same copy a million times).

    Attributes:
        replaced: dotted names that were left inert, in order of first appearance.
    """

    def __init__(
        self,
        builders: Mapping[str, Builder],
        constants: Mapping[str, object],
        persistent: Callable[[object], object],
        allowance: int,
    ):
        self._builders = {**CONTAINERS, **builders}
        self._constants = constants
        self._persistent = persistent
        self._allowance = allowance
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._replaced: dict[str, None] = {}

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(self._replaced)

    def load(self, file: IO[bytes] | Any) -> Any:
        """Interpret one pickle from `file` (read, readline, tell), leaving the position after it.

        Raises:
            CorruptCheckpointError: the pickle is cut off, malformed or asks for something impossible.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            if self._marks or len(self._stack) != 1:
                raise CorruptCheckpointError("the pickle ends with an unbalanced stack")
            return self._stack[0]
        except CheckpointError:
            raise
        except MALFORMED as err:
            raise CorruptCheckpointError(
                f"the pickle inside is malformed ({type(err).__name__}: {str(err)[:200]})"
            ) from err
        finally:
            self._stack, self._marks, self._memo = [], [], {}

    def charge(self, nbytes: int) -> None:
        """Count `nbytes` against the allowance."""
        self._allowance -= nbytes
        if self._allowance < 0:
            raise CorruptCheckpointError("the pickle asks for far more memory than the file holds")

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self._stack.append(argument)
        elif name in _PUSH_CONSTANT:
            self._stack.append(_PUSH_CONSTANT[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise CorruptCheckpointError(f"opcode {name} has no place in a checkpoint")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _collect(self, container: Callable[[list[Any]], object]) -> None:
        items = self._pop_mark()
        self._stack.append(container(items))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise CorruptCheckpointError("the pickle's stack underflows")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        else:
            raise CorruptCheckpointError(f"the pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Record):
            target = target.mapping
        if not isinstance(target, dict) or len(items) % 2:
            raise CorruptCheckpointError(f"the pickle assigns items to a {type(target).__name__}")
        for index in range(0, len(items), 2):
            target[_key(items[index])] = items[index + 1]

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise CorruptCheckpointError("the pickle names a class by something that is not text")
        dotted = f"{module}.{name}"
        if dotted in self._constants:
            self._stack.append(self._constants[dotted])
            return
        if dotted not in self._builders:
            self._replaced[dotted] = None
        self._stack.append(Global(dotted))

    def _named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._global(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _extension(self, code: int) -> None:
        self._global("copyreg", f"extension_{code}")

    def _call(self, callee: Any, args: Any, kwargs: Any = None) -> None:
        if not isinstance(args, tuple):
            raise CorruptCheckpointError("the pickle calls with arguments that are not a tuple")
        if isinstance(callee, Global) and callee.name in self._builders:
            if kwargs:
                raise CorruptCheckpointError(f"the pickle calls {callee.name[:80]} with keyword arguments")
            self._stack.append(self._builders[callee.name](args, self.charge))
        elif isinstance(callee, Global | Record):
            self._stack.append(Record(callee.name, (*args, kwargs) if kwargs else args))
        else:
            raise CorruptCheckpointError(f"the pickle calls a {type(callee).__name__}")

    def _reduce(self, _: Any) -> None:
        args, callee = self._stack.pop(), self._stack.pop()
        self._call(callee, args)

    def _new_object_ex(self, _: Any) -> None:
        kwargs, args, callee = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._call(callee, args, kwargs)

    def _instance(self, argument: str) -> None:
        args = tuple(self._pop_mark())
        self._named(argument)
        self._call(self._stack.pop(), args)

    def _object(self, _: Any) -> None:
        callee, *args = self._pop_mark()
        self._call(callee, tuple(args))

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not (isinstance(target, dict) and isinstance(state, dict)):
            raise CorruptCheckpointError(f"the pickle sets the state of a {type(target).__name__}")

    def _resolve(self, pid: Any) -> None:
        self._stack.append(self._persistent(pid))


def _key(key: Any) -> Any:
    """`key` if hashing it is cheap: a scalar or a short flat tuple of scalars, not a nested one."""
    for part in key if isinstance(key, tuple) and len(key) <= 64 else (key,):
        if isinstance(part, int) and part.bit_length() <= 64:
            continue
        if not isinstance(part, _SCALAR_KEYS):
            raise CorruptCheckpointError(f"a {type(key).__name__} is used as the key of a dict or in a set")
    return key


_Machine = RestrictedUnpickler
_OPERATIONS: dict[str, Callable[[RestrictedUnpickler, Any], object]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": lambda m, _: m._pop_mark(),
    "DUP": lambda m, _: m._stack.append(m._stack[-1]),
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": lambda m, _: m._put(len(m._memo)),
    "GET": lambda m, index: m._stack.append(m._memo[index]),
    "BINGET": lambda m, index: m._stack.append(m._memo[index]),
    "LONG_BINGET": lambda m, index: m._stack.append(m._memo[index]),
    "LIST": lambda m, _: m._collect(list),
    "TUPLE": lambda m, _: m._collect(tuple),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "DICT": _Machine._dict,
    "FROZENSET": lambda m, _: m._collect(lambda items: frozenset(map(_key, items))),
    "APPEND": lambda m, _: m._append([m._stack.pop()]),
    "APPENDS": lambda m, _: m._append(m._pop_mark()),
    "ADDITEMS": lambda m, _: m._append(m._pop_mark()),
    "SETITEM": _Machine._set_item,
    "SETITEMS": lambda m, _: m._set_items(m._pop_mark()),
    "GLOBAL": _Machine._named,
    "STACK_GLOBAL": _Machine._stack_global,
    "EXT1": _Machine._extension,
    "EXT2": _Machine._extension,
    "EXT4": _Machine._extension,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "NEWOBJ_EX": _Machine._new_object_ex,
    "INST": _Machine._instance,
    "OBJ": _Machine._object,
    "BUILD": _Machine._build,
    "PERSID": _Machine._resolve,
    "BINPERSID": lambda m, _: m._resolve(m._stack.pop()),
}


def _elements(args: tuple, charge: Charge) -> list:
    if len(args) > 1 or not all(isinstance(arg, list | tuple | set | frozenset | dict) for arg in args):
        raise CorruptCheckpointError("a container is built from something that is not a container")
    if not args:
        return []
    charge(_BYTES_PER_ELEMENT * len(args[0]))
    return list(args[0].items() if isinstance(args[0], dict) else args[0])


def _build_dict(args: tuple, charge: Charge) -> dict:
    pairs = _elements(args, charge)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise CorruptCheckpointError("a dict is built from something that is not a list of pairs")
    return {_key(key): value for key, value in pairs}


def _build_default_dict(args: tuple, charge: Charge) -> dict:
    return _build_dict(args[1:], charge)


def _build_list(args: tuple, charge: Charge) -> list:
    return _elements(args, charge)


def _build_set(args: tuple, charge: Charge) -> set:
    return {_key(item) for item in _elements(args, charge)}


def _build_bytes(args: tuple, charge: Charge) -> bytes:
    match args:
        case ():
            return b""
        case (bytes() as data,):
            return data
        case (str() as text, "latin1" | "latin-1"):
            charge(len(text))
            return text.encode("latin-1")
    raise CorruptCheckpointError("bytes are built from something that is neither bytes nor latin-1 text")


def _build_complex(args: tuple, _: Charge) -> complex:
    if len(args) != 2 or not all(isinstance(arg, int | float) for arg in args):
        raise CorruptCheckpointError("a complex number is built from something that is not two numbers")
    return complex(*args)


CONTAINERS: dict[str, Builder] = {
    "collections.OrderedDict": _build_dict,
    "collections.Counter": _build_dict,
    "collections.defaultdict": _build_default_dict,
    "_codecs.encode": _build_bytes,
    **{
        f"{module}.{name}": builder
        for module in ("builtins", "__builtin__")
        for name, builder in (
            ("dict", _build_dict),
            ("list", _build_list),
            ("set", _build_set),
            ("frozenset", _build_set),
            ("bytes", _build_bytes),
            ("bytearray", _build_bytes),
            ("complex", _build_complex),
        )
    },
}
"""Names that build the plain container or number they are; subclasses of dict lose their class."""
