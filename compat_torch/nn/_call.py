"""A method of an NNX module as a differentiable function of torch tensors.

Every call is one compiled function of the module's tensors and of the tensors among the arguments. For gradients the
forward pass is linearised in the same function; what the backward pass needs is kept by torch (`save_for_backward`),
so that torch frees it, offloads it, recomputes it or complains about in-place edits as it does for its own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from spyx.ops.dtypes import x64_enabled

from .. import interop
from ._layout import Structure, random_streams, slots

Origin = tuple[Literal["output", "input", "static"], Any]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Answer:
    """How the result is put together.

    Attributes:
        treedef: of the result.
        origins: of its leaves: ("output", index), ("input", index) for an argument handed back as it is, or
            ("static", value).
        updated: the variables that the call changed; their new values follow the outputs.
    """

    treedef: Any
    origins: tuple[Origin, ...]
    updated: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is static in a call.

    Attributes:
        structure: of the module.
        method: name of the method.
        treedef: of `(args, kwargs)`.
        static: type and value of the leaves; of a tensor `TENSOR` alone.
        takes_rngs: the method wants random streams for dropout.
    """

    structure: Structure
    method: str
    treedef: Any
    static: tuple[Any, ...]
    takes_rngs: bool

    def arguments(self, arrays: Sequence[jax.Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with the arrays put in."""
        left = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(left) if leaf is TENSOR else leaf[1] for leaf in self.static])


TENSOR = "tensor"
_WIDE = (torch.float64, torch.complex128)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Pullback:
    """How the backward pass is put together.

    Attributes:
        plan: of the call.
        needed: for each tensor that went in, whether its gradient is wanted.
        treedef: of the function that gives the gradients.
        sources: of its leaves: the index of a tensor that went in, or None for a residual.
        inexact: the outputs that have a gradient.
    """

    plan: Plan
    needed: tuple[bool, ...]
    treedef: Any
    sources: tuple[int | None, ...]
    inexact: tuple[int, ...]


def run(plan: Plan, tensors: Sequence[torch.Tensor], seed: Any, update: Callable[[int, torch.Tensor], None]) -> Any:
    """Run the method.

    Args:
        plan: what to run.
        tensors: of the module's variables, then of the arguments.
        seed: (2,) uint32 for random streams, or None.
        update: called with the index of a variable that the call changed, and its new value.

    Returns:
        The method's result, with torch tensors.
    """
    call = _Call(plan, seed)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        outputs = _Differentiable.apply(call, *tensors)
    else:
        outputs = call.plain(tensors)
    answer = call.answer
    count = len(outputs) - len(answer.updated)
    for index, value in zip(answer.updated, outputs[count:], strict=True):
        update(index, value.detach())
    kinds = {"output": outputs, "input": tensors}
    leaves = [value if kind == "static" else kinds[kind][value] for kind, value in answer.origins]
    return jax.tree.unflatten(answer.treedef, leaves)


@dataclass
class _Call:
    """One call: what goes in besides the tensors, and what is known after it."""

    plan: Plan
    seed: Any
    answer: Answer = field(init=False)

    def plain(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        arrays = list(map(_argument, tensors))
        outputs, self.answer = jax.block_until_ready(_plain(self.plan, arrays, self.seed))
        return _owned(outputs, arrays)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, *tensors: torch.Tensor):  # type: ignore[override]
        arrays = list(map(_argument, tensors))
        needed = tuple(ctx.needs_input_grad[1:])
        linearised = jax.block_until_ready(_linearised(call.plan, needed, arrays, call.seed))
        outputs, call.answer, residuals, pullback = linearised
        used = [tensors[source] for source in pullback.sources if source is not None]
        ctx.save_for_backward(*used, *_owned(residuals, []))
        ctx.pullback = pullback
        results = _owned(outputs, [*arrays, *residuals])
        ctx.mark_non_differentiable(*(result for i, result in enumerate(results) if i not in pullback.inexact))
        return results

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *_pulled(ctx.pullback, saved, gradients)
        return None, *_Once.apply(ctx.pullback, len(saved), *saved, *gradients)


class _Once(torch.autograd.Function):
    """The backward pass when a graph of it is asked for, which cannot be used."""

    @staticmethod
    def forward(ctx, pullback: Pullback, count: int, *tensors: torch.Tensor):  # type: ignore[override]
        return _pulled(pullback, tensors[:count], tensors[count:])

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):  # type: ignore[override]
        raise NotImplementedError(
            "double backward through a layer computed by JAX is not supported: move the model to JAX with "
            "compat_torch.from_torch(model) and nest jax.grad there"
        )


def _pulled(
    pullback: Pullback, saved: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the tensors that went in; None where they are not needed."""
    leaves = list(map(_argument, saved))
    cotangents = [_argument(gradients[i]) for i in pullback.inexact]
    pulled = jax.block_until_ready(_pull(pullback, leaves, cotangents))
    found = iter(_owned(pulled, [*leaves, *cotangents]))
    return tuple(next(found) if need else None for need in pullback.needed)


@partial(jax.jit, static_argnums=0)
def _plain(plan: Plan, arrays: list[Any], seed: Any):
    return _evaluate(plan, _native(plan, dict(enumerate(arrays))), seed)


@partial(jax.jit, static_argnums=(0, 1))
def _linearised(plan: Plan, needed: tuple[bool, ...], arrays: list[Any], seed: Any):
    native = _native(plan, dict(enumerate(arrays)))
    chosen = {i: native[i] for i, need in enumerate(needed) if need}

    def function(chosen: dict[int, jax.Array]):
        outputs, answer = _evaluate(plan, {**native, **chosen}, seed)
        inexact = [i for i in range(len(outputs) - len(answer.updated)) if _is_inexact(outputs[i])]
        rest = [output for i, output in enumerate(outputs) if i not in inexact]
        return [outputs[i] for i in inexact], (rest, answer, _Indices(tuple(inexact)))

    first, pull, (rest, answer, inexact) = jax.vjp(function, chosen, has_aux=True)
    leaves, treedef = jax.tree.flatten(pull)
    place = {id(array): i for i, array in native.items()}
    sources = tuple(place.get(id(leaf)) for leaf in leaves)
    residuals = [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]
    firsts, others = iter(first), iter(rest)
    outputs = [next(firsts if i in inexact.indices else others) for i in range(len(first) + len(rest))]
    return outputs, answer, residuals, Pullback(plan, needed, treedef, sources, inexact.indices)


@partial(jax.jit, static_argnums=0)
def _pull(pullback: Pullback, saved: list[Any], cotangents: list[Any]) -> list[jax.Array]:
    """torch's gradient of a complex number is dL/dRe + i dL/dIm, JAX's is its conjugate."""
    given = [source for source in pullback.sources if source is not None]
    native = _native(pullback.plan, dict(zip(given, saved, strict=False)))
    kept = iter(saved[len(given) :])
    leaves = [next(kept) if source is None else native[source] for source in pullback.sources]
    pull = jax.tree.unflatten(pullback.treedef, leaves)
    (gradients,) = pull([jnp.conj(cotangent) for cotangent in cotangents])
    entries = slots(pullback.plan.structure.build())[1]
    result = []
    for i, gradient in sorted(gradients.items()):
        if i < len(entries):
            entries[i].variable.set_value(gradient)
            result.append(entries[i].read())
        else:
            result.append(jnp.conj(gradient))
    return result


def _native(plan: Plan, arrays: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """The arrays as the JAX module holds them; weights that torch transposes need not be kept a second time."""
    entries = slots(plan.structure.build())[1]
    native = dict(arrays)
    for i in arrays.keys() & range(len(entries)):
        entries[i].write(arrays[i], None)
        native[i] = entries[i].variable.get_value()
    return native


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Indices:
    indices: tuple[int, ...]


def _evaluate(plan: Plan, native: dict[int, jax.Array], seed: Any) -> tuple[list[jax.Array], Answer]:
    """Traced: the module with these values, its method, and what became of both."""
    module = plan.structure.build()
    places, entries = slots(module)
    count = len(entries)
    for i, entry in enumerate(entries):
        entry.variable.set_value(native[i])
    given = [native[i] for i in range(count, len(native))]
    args, kwargs = plan.arguments(given)
    if seed is not None:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        reseed(module, key)
        if plan.takes_rngs:
            kwargs["rngs"] = nnx.Rngs(dropout=jax.random.fold_in(key, 0))
    result = getattr(module, plan.method)(*args, **kwargs)

    updated = [i for i, entry in enumerate(entries) if entry.variable.get_value() is not native[i]]
    _, after = slots(module)
    changed = [".".join(places[i].paths[0]) for i in updated if places[i].trained]
    if changed or [id(e.variable) for e in after] != [id(e.variable) for e in entries]:
        raise TypeError(
            f"{type(module).__name__}.{plan.method} changes {', '.join(changed) or 'the variables of the module'}: "
            "a torch module computed by JAX keeps its parameters; do it on the JAX module (compat_torch.from_torch), "
            "then compat_torch.wrap the result"
        )
    leaves, treedef = jax.tree.flatten(result)
    inputs = {id(array): i for i, array in enumerate(given, count)}
    outputs: list[jax.Array] = []
    origins: list[Origin] = []
    for leaf in leaves:
        if id(leaf) in inputs:
            origins.append(("input", inputs[id(leaf)]))
        elif isinstance(leaf, jax.Array | np.ndarray):
            origins.append(("output", len(outputs)))
            outputs.append(jnp.asarray(leaf))
        else:
            origins.append(("static", leaf))
    outputs += [entries[i].read() for i in updated]
    return outputs, Answer(treedef, tuple(origins), tuple(updated))


def reseed(module: nnx.Module, key: jax.Array) -> None:
    """Give every random stream that the module holds a key of its own, drawn from `key`."""
    for index, stream in enumerate(random_streams(module)):
        shape = stream.get_value().shape
        if isinstance(stream, nnx.RngKey):
            fresh = jax.random.fold_in(key, 1 + index)
            stream.set_value(jax.random.split(fresh, shape) if shape else fresh)
        else:
            stream.set_value(jnp.zeros(shape, jnp.uint32))


def _is_inexact(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _argument(tensor: torch.Tensor) -> jax.Array | np.ndarray:
    """The tensor for a compiled function that ends before anything else is done with its memory.

    JAX takes the memory of a NumPy array without a copy, as through DLPack, in a tenth of the time.
    """
    floating = tensor.is_floating_point() or tensor.is_complex()
    if tensor.device.type != "cpu" or not floating or (tensor.dtype in _WIDE and not x64_enabled()):
        return interop.to_jax(tensor.detach())
    return interop.to_numpy(tensor)


def _owned(arrays: Sequence[jax.Array], others: Sequence[jax.Array | np.ndarray]) -> tuple[torch.Tensor, ...]:
    """The arrays as tensors that share memory neither with `others` nor with each other."""
    taken = {pointer for array in others if (pointer := _pointer(array)) is not None}
    tensors = []
    for array in arrays:
        tensor, pointer = interop.to_torch(array), _pointer(array)
        tensors.append(tensor.clone() if pointer in taken else tensor)
        if pointer is not None:
            taken.add(pointer)
    return tuple(tensors)


def _pointer(array: jax.Array | np.ndarray) -> int | None:
    if not array.size:
        return None
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()
