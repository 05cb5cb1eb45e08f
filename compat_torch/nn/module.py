"""The adapter: an NNX module as a torch.nn.Module."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from spyx.ops.dtypes import x64_enabled

from .. import interop
from ..core.base import LRNN
from ..errors import CheckpointError
from ..state import Entry
from ._arguments import (
    as_tensor,
    autocast,
    draw_key,
    draw_seed,
    in_place,
    jax_arguments,
    signature_of,
    static,
    take_device,
)
from ._call import TENSOR, Plan, reseed, run
from ._layout import Layout, Path, abstract, entry_of, in_order_of, list_length, members, modes, slots

_CACHE_ARGUMENTS = ("inference_cache", "caches", "cache")
_ON_HOST = frozenset({"save_pretrained"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HINTS = ("optim", "no_weight_decay", "no_reinit")


class JaxModule(torch.nn.Module):
    """A torch module whose parameters are torch's and whose methods are computed by JAX.

    Each class of compat_torch has a twin of this type under `compat_torch.nn`, with the same constructor; `wrap` makes
    one of any NNX module. Parameters, buffers and submodules have the reference's names. The public methods of the JAX
    class (`forward`, `step`, `allocate_inference_cache`, `discretize`, ...) take torch tensors and give torch tensors;
    gradients flow to every tensor that requires them. A cache that is passed in is updated in place and comes back.
    Attributes such as `d_model` are those of the JAX module.

    Constructor arguments are those of the JAX class; `dtype` may be a torch dtype, `device` is where the parameters
    go, and initial values are drawn from torch's generator.

    A call is one call to JAX for the whole module. Its submodules hold parameters and the training flag, and can be
    called by themselves, but what is hooked on them or put in their place would have no effect, and raises. Methods are
    compiled once for each shape and dtype of their tensors, each set of tensors that require grad, and each value of
    their other arguments.

    Raises:
        ValueError, TypeError: what the JAX class raises; parameters whose shape or kind of dtype was changed.
    """

    jax_class: ClassVar[Any] = nnx.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        cls = type(self).jax_class
        args, kwargs = jax_arguments((args, kwargs))
        device = take_device(kwargs)
        if kwargs.get("rngs") is None and "rngs" in signature_of(cls, "__init__").parameters:
            kwargs["rngs"] = nnx.Rngs(draw_key())
        self._take_over(cls(*args, **kwargs))
        if device is not None:
            self.to(device)

    def _take_over(self, module: nnx.Module) -> None:
        """Values, names and mode of an NNX module."""
        made: dict[int, torch.nn.Module] = {id(module): self}
        self._adopt(module, abstract(module), {}, made)
        said = modes(module)
        self.train(not said or any(training for _, training in said))
        for node, training in said:
            made[id(node)].training = training

    def _adopt(self, module: nnx.Module, template: nnx.Module, tensors: dict, made: dict) -> None:
        for name, value in members(module):
            if isinstance(value, nnx.Variable):
                entry = entry_of(module, (name,), value)
                if id(value) not in tensors:
                    tensors[id(value)] = _tensor(entry)
                tensor = tensors[id(value)]
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                (self.register_parameter if is_parameter else self.register_buffer)(entry.name, tensor)
            else:
                self.add_module(name, _made(value, vars(template)[name], tensors, made))
        vars(self)["_template"] = template
        if any(len(slot.paths) > 1 for slot in self._layout.slots):
            self.register_load_state_dict_post_hook(_tie)

    @property
    def _layout(self) -> Layout:
        if "_cached_layout" not in vars(self):
            vars(self)["_cached_layout"] = Layout(vars(self)["_template"])
        return vars(self)["_cached_layout"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the JAX class's `__call__`, on torch tensors."""
        return self._invoke("__call__", *args, **kwargs)  # type: ignore[call-arg]

    @torch.compiler.disable
    def _invoke(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        layout, signature = self._layout, signature_of(type(self).jax_class, method)
        bound = signature.bind(None, *args, **kwargs)
        if bound.arguments.get("rngs") is not None:
            raise TypeError(
                f"{type(self).__name__}: rngs cannot be passed: dropout draws from torch's generator "
                "(torch.manual_seed), which is saved and restored as in any torch model"
            )
        found = self._submodules()
        variables = self._variables(found)
        structure, has_dropout = layout.in_mode(tuple(module.training for module in found.values()))
        leaves, treedef = jax.tree.flatten(jax_arguments((autocast(bound.args[1:]), bound.kwargs)))
        leaves = [as_tensor(leaf) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        cache = next((c for name in _CACHE_ARGUMENTS if (c := bound.arguments.get(name)) is not None), None)
        if cache is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (*variables, *tensors)):
            held = set(map(id, jax.tree.leaves(cache)))  # its old values may be needed after it was overwritten
            tensors = [leaf.clone() if id(leaf) in held else leaf for leaf in tensors]
        takes_rngs = has_dropout and "rngs" in signature.parameters
        constants = tuple(TENSOR if isinstance(leaf, torch.Tensor) else static(method, leaf) for leaf in leaves)
        seed = draw_seed() if takes_rngs or layout.has_streams else None

        def update(index: int, value: torch.Tensor) -> None:
            with torch.no_grad():
                variables[index].copy_(value)

        plan = Plan(structure, method, treedef, constants, takes_rngs)
        result = run(plan, [*variables, *tensors], seed, update)
        return result if cache is None else in_place(cache, result)

    def _submodules(self) -> dict[Path, torch.nn.Module]:
        """The module and all below it, by path; each must still be what it was made as."""
        found: dict[Path, torch.nn.Module] = {(): self}
        for path, node in self._layout.nodes[1:]:
            child = found[path[:-1]]._modules.get(path[-1])
            if child is None or not _is_twin(child, node, self._layout.lists.get(path)):
                raise TypeError(
                    f"{type(self).__name__}: the submodule {'.'.join(path)} was replaced by {type(child).__name__}: "
                    "the whole module is computed by JAX, so that it would have no effect. Change the JAX module "
                    "(compat_torch.from_torch) and compat_torch.wrap it"
                )
            if any(vars(child).get(hooks) for hooks in _HOOKS):
                raise TypeError(
                    f"{type(self).__name__}: the submodule {'.'.join(path)} has hooks, which would never run: the "
                    "whole module is one call to JAX; hook this module itself, or remove them"
                )
            found[path] = child
        return found

    def _variables(self, found: dict[Path, torch.nn.Module]) -> list[torch.Tensor]:
        """The tensors of the variables, in the order of the layout."""
        tensors = []
        for slot in self._layout.slots:
            first, *others = (getattr(found[path[:-1]], path[-1]) for path in slot.paths)
            names = [".".join(path) for path in slot.paths]
            if any(other is not first for other in others):
                raise ValueError(
                    f"{type(self).__name__}: {' and '.join(names)} are one tensor and must stay so; "
                    "assign the same one to all these names, or copy_ into it"
                )
            kind = (first.is_floating_point(), first.is_complex())
            expected = slot.expected
            wanted = (jnp.issubdtype(expected.dtype, jnp.floating), jnp.issubdtype(expected.dtype, jnp.complexfloating))
            if tuple(first.shape) != expected.shape or kind != wanted:
                raise ValueError(
                    f"{type(self).__name__}: {names[0]} must have shape {expected.shape} and a dtype like "
                    f"{expected.dtype}, got {tuple(first.shape)} and {first.dtype}"
                )
            tensors.append(first)
        return tensors

    def to_jax(self) -> Any:
        """A JAX module with copies of the values, in the same mode."""
        found = self._submodules()
        structure, _ = self._layout.in_mode(tuple(module.training for module in found.values()))
        module = in_order_of(self._layout.template, structure.build())
        for entry, tensor in zip(slots(module)[1], self._variables(found), strict=True):
            entry.write(jnp.array(interop.to_jax(tensor.detach()), copy=True), None)
        if self._layout.has_streams:
            reseed(module, draw_key())
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_template" not in vars(self) or name.startswith("_") or hasattr(nnx.Module, name):
                raise
        value = getattr(vars(self)["_template"], name)
        if isinstance(value, nnx.Variable | nnx.Module):  # torch has taken it out, as parametrizations do
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not inspect.ismethod(value):
            return value
        return getattr(self.to_jax(), name) if name in _ON_HOST else functools.partial(self._invoke, name)

    def __dir__(self) -> list[str]:
        public = (
            name for name in dir(type(self).jax_class) if not name.startswith("_") and not hasattr(nnx.Module, name)
        )
        return sorted({*super().__dir__(), *public})

    def __reduce__(self) -> Any:
        return _blank, (type(self).jax_class,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_cached_layout"}

    def __deepcopy__(self, memo: dict[int, Any]) -> JaxModule:
        """A copy with the attributes of its parameters (`_optim`, ...), which torch would drop."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(JaxModule.__getstate__(self), memo))
        for name, parameter in self._parameters.items():
            if parameter is not None:
                vars(twin._parameters[name]).update(copy.deepcopy(vars(parameter), memo))
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        _tie(self)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self._complete(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _complete(self, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Of a tensor with several names one is enough, and unequal ones are an error; the JAX class adds the rest."""
        names = [[prefix + ".".join(path) for path in slot.paths] for slot in self._layout.slots]
        for group in names:
            given = [name for name in group if name in state_dict]
            for name in given[1:]:
                if not _equal(state_dict[given[0]], state_dict[name]):
                    errors.append(f"{given[0]} and {name} are one tensor, but their values differ")
            if given:
                state_dict.update({name: state_dict[given[0]] for name in group if name not in state_dict})
        loader = getattr(type(self).jax_class, "load_state_dict", None)
        absent = {group[0] for group in names} - state_dict.keys()
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if not absent or not own or loader in (None, LRNN.load_state_dict):
            return
        module = self._layout.in_mode(tuple([False] * len(self._layout.nodes)))[0].build()
        try:
            loader(module, own, strict=False, dtype=None if x64_enabled() else jnp.float32)
        except CheckpointError:
            return  # torch reports it
        for entry, group in zip(slots(module)[1], names, strict=True):
            if group[0] in absent and isinstance(entry.variable.get_value(), jax.Array):
                state_dict.update(dict.fromkeys(group, interop.to_torch(entry.read())))

    def extra_repr(self) -> str:
        """Which JAX class computes it."""
        cls = type(self).jax_class
        return f"computed by {cls.__module__}.{cls.__qualname__}"


@functools.cache
def twin_of(cls: type[nnx.Module]) -> type[JaxModule]:
    """The torch class of an NNX class; base classes are mirrored, so that `isinstance` answers alike."""
    bases = tuple(twin_of(base) for base in cls.__bases__ if issubclass(base, nnx.Module) and base is not nnx.Module)
    body: dict[str, Any] = {"jax_class": cls, "__module__": _torch_home(cls.__module__), "__doc__": cls.__doc__}
    for name, member in vars(cls).items():
        if isinstance(member, classmethod) and not name.startswith("_"):
            body[name] = classmethod(functools.partial(_class_method, name))
    twin = type(cls.__name__, bases or (JaxModule,), body)
    signature = signature_of(cls, "__init__")
    parameters = list(signature.parameters.values())[1:]
    twin.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return twin


def wrap(module: nnx.Module) -> JaxModule:
    """A torch module with copies of the values of an NNX module, computed by it.

    Args:
        module: any NNX module with values. Its `nnx.Param` become parameters (Flax's names for the weights of its own
            layers become torch's), its other variables buffers, which a call may update; its random streams are
            replaced by draws from torch's generator.

    Returns:
        The twin, in the mode of `module`.

    Raises:
        TypeError: `module` is no NNX module, or keeps variables outside of modules. ValueError: it has no values (from
            `nnx.eval_shape`), or contains itself.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"wrap expects an nnx.Module, got {type(module).__name__}")
    twin = _blank(type(module))
    torch.nn.Module.__init__(twin)
    twin._take_over(module)
    return twin


def _blank(cls: type[nnx.Module]) -> JaxModule:
    twin = twin_of(cls)
    return twin.__new__(twin)


def _made(node: nnx.Module, template: nnx.Module, tensors: dict, made: dict) -> torch.nn.Module:
    if id(node) in made:
        return made[id(node)]
    if list_length(node) is not None:
        made[id(node)] = torch.nn.ModuleList(
            _made(value, vars(template)[name], tensors, made)
            for name, value in members(node)
            if isinstance(value, nnx.Module)
        )
        return made[id(node)]
    twin = made[id(node)] = _blank(type(node))
    torch.nn.Module.__init__(twin)
    twin._adopt(node, template, tensors, made)
    return twin


def _is_twin(child: Any, node: nnx.Module, length: int | None) -> bool:
    if length is not None:
        return isinstance(child, torch.nn.ModuleList) and len(child) == length
    if not isinstance(child, twin_of(type(node))):
        return False
    template = vars(child)["_template"]
    return template is node or nnx.graphdef(template) == nnx.graphdef(node)


def _tensor(entry: Entry) -> torch.Tensor:
    """A parameter or buffer with a copy of the value and the hints of the reference."""
    variable = entry.variable
    if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
        raise ValueError(f"the module has shapes but no values: load them first; got {variable}")
    tensor = interop.to_torch(entry.read()).clone()
    if not isinstance(variable, nnx.Param):
        return tensor
    parameter = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
    hints = variable.get_metadata()
    for name in _HINTS:
        if value := hints.get(name):
            setattr(parameter, f"_{name}", dict(value) if name == "optim" else value)
    return parameter


def _tie(module: JaxModule, _: Any = None) -> None:
    """Make the names of one tensor one tensor again, where torch has made several of it."""
    for slot in module._layout.slots:
        for path in slot.paths[1:]:
            owner, first = (module.get_submodule(".".join(p[:-1])) for p in (path, slot.paths[0]))
            for kind in ("_parameters", "_buffers"):
                if path[-1] in vars(owner)[kind]:
                    vars(owner)[kind][path[-1]] = vars(first)[kind][slot.paths[0][-1]]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all()))


def _torch_home(module: str) -> str:
    for prefix in ("compat_torch.models.", "compat_torch."):
        if module.startswith(prefix):
            return f"compat_torch.nn.{module.removeprefix(prefix)}"
    return module


def _class_method(name: str, twin: type[JaxModule], *args: Any, **kwargs: Any) -> Any:
    result = getattr(twin.jax_class, name)(*jax_arguments(args), **jax_arguments(kwargs))
    return wrap(result).eval() if isinstance(result, nnx.Module) else result
