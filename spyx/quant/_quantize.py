"""Apply rules to a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ..ssm._diagonal import DiagonalSSM
from ._rounding import Grid, Mode, RoundedInput, RoundedParam, round_weight, storing_provider, training_provider
from ._rules import PROJECTION, check_rule, linear_only_rules, require_qwix

Path = tuple[Any, ...]

_OPS = {
    nnx.Linear: "dot_general",
    nnx.LinearGeneral: "dot_general",
    nnx.Conv: "conv_general_dilated",
    nnx.Einsum: "einsum",
    DiagonalSSM: PROJECTION,
}


def quantize(
    model: nnx.Module,
    *example_inputs: Any,
    rules: Iterable[Any] | None = None,
    mode: Mode = "qat",
    methods: Sequence[str] = ("__call__",),
    **example_kwargs: Any,
) -> Any:
    """A quantised copy of a model.

    The model is traced once, to learn which layers are called; nothing is computed. A layer quantised before, by "qat",
    is quantised anew.

    Save `nnx.state` of the result, with Orbax for instance, and put it back by `nnx.update` into a model quantised by
    the same rules, which may be abstract: `nnx.eval_shape(lambda: quantize(Model(...), x, mode="ptq"))`. Pickle does
    not take it: qwix makes the classes of quantised layers as it goes.

    Args:
        model: any Flax NNX module.
        example_inputs, example_kwargs: what to trace it with.
        rules: of this module or `qwix.QuantizationRule`s; None is `linear_only_rules()`. A rule with
            `weight_qtype=None` keeps the layers it matches from the rules after it.
        mode: "qat" rounds weights and inputs at each use and passes gradients straight through: train it with any
            optimizer. "ptq" stores the weights rounded: less memory, integer products, no training.
        methods: names of the methods to trace with the example inputs.

    Returns:
        A model of the same class and call, in "qat" with the same parameters.

    Raises:
        ImportError: without qwix.
        ValueError: a rule that matches nothing (the message lists what it could match), a layer too narrow for the
            tiles of its format, unknown mode, a model whose weights are already rounded; "ptq" of a model without
            weights (from `nnx.eval_shape`).
        TypeError: a model that is no module, rules or methods of another type, rules among the example inputs.
    """
    kind = require_qwix().QuantizationRule
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    if mode not in ("qat", "ptq"):
        raise ValueError(f"mode must be 'qat' or 'ptq', got {mode!r}")
    _check_methods(model, methods)
    if any(isinstance(leaf, kind) for leaf in jax.tree.leaves(example_inputs)):
        raise TypeError("example_inputs hold a QuantizationRule: rules are given by name, rules=...")
    rules = linear_only_rules() if rules is None else _checked(rules, kind)
    model = nnx.clone(model)
    layers = list(_layers(model))
    for path, layer, _ in layers:
        _restore(path, layer)
    inputs = _called(model, methods, example_inputs, example_kwargs)
    reached = [entry for entry in layers if entry[2] == PROJECTION or entry[0] in inputs]
    chosen = [(_first(rules, path, op), path, layer, op) for path, layer, op in reached]
    _check_matches(type(model).__name__, rules, chosen, layers)
    for index, path, layer, op in chosen:
        rule = None if index is None else rules[index]
        if rule is None or rule.weight_qtype is None:
            continue
        _check_tile(rule, path, layer, op)
        if mode == "ptq":
            _check_weights(path, layer, inputs.get(path))
        if op == PROJECTION:
            if rule.act_qtype is not None:
                raise ValueError(f"{_name(path, layer)}: only the weights of a projection are quantised, not its input")
            for name in ("B_re", "B_im", "C_re", "C_im"):
                round_weight(layer, name, Grid.of(rule, 0, 1), mode)
        elif op == "conv_general_dilated" and (mode == "qat" or rule.act_qtype != rule.weight_qtype):
            _convolve_rounded(layer, rule, mode, path)
        else:
            _intercept(layer, rule, mode, inputs[path], path)
        layer.quantization = Quantization(mode, rule.weight_qtype, rule.act_qtype)  # pyright: ignore
    return model


class Quantization(NamedTuple):
    """What a quantised layer carries as `quantization`."""

    mode: Mode
    weight: DTypeLike
    act: DTypeLike | None


def _check_methods(model: nnx.Module, methods: Sequence[str]) -> None:
    if isinstance(methods, str):
        raise TypeError(f"methods must be a sequence of names, got {methods!r}: write ({methods!r},)")
    if not methods:
        raise ValueError("methods must name at least one method to trace with the example inputs, got none")
    for name in methods:
        if not callable(getattr(model, name, None)):
            raise ValueError(f"methods: {type(model).__name__} has no method {name!r}")


def _checked(rules: Any, kind: type) -> list[Any]:
    found = list(rules) if isinstance(rules, Iterable) else [None]
    if not all(isinstance(rule, kind) for rule in found):
        raise TypeError(f"rules must be a list of qwix.QuantizationRule (see spyx.quant), got {rules!r}")
    for rule in found:
        check_rule(rule)
    return found


def _layers(model: nnx.Module) -> Iterator[tuple[Path, Any, str]]:
    """(path, layer, op name) of everything that a rule can match."""
    for path, layer in nnx.iter_modules(model):
        cls = float_class(layer)
        for base, op in _OPS.items():
            if issubclass(cls, base) and cls.__call__ is base.__call__:
                yield path, layer, op


def float_class(layer: nnx.Module) -> type:
    return getattr(type(layer), "_unquantized_type", type(layer))


def _name(path: Path, layer: nnx.Module) -> str:
    return f"{'/'.join(map(str, path))!r} ({float_class(layer).__name__})"


def _restore(path: Path, layer: Any) -> None:
    """Undo "qat" in place."""
    done = getattr(layer, "quantization", None)
    if done is None:
        return
    if done.mode == "ptq":
        raise ValueError(f"{_name(path, layer)} already holds {done.weight} weights: quantise the float or 'qat' model")
    layer.__class__ = float_class(layer)
    for name, value in list(vars(layer).items()):
        if isinstance(value, RoundedParam):
            setattr(layer, name, value.unrounded())
        elif isinstance(value, RoundedInput):
            setattr(layer, name, value.convolve)
    for name in ("quantization", "qwix_path"):
        if hasattr(layer, name):
            delattr(layer, name)


class Inputs(NamedTuple):
    """What a layer is called with, arrays as `jax.ShapeDtypeStruct`, and the shape of its kernel at the time."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, layer, args, kwargs) -> Inputs:
        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array | np.ndarray) else x

        return cls(jax.tree.map(abstract, args), jax.tree.map(abstract, kwargs), layer.kernel.shape)

    def zeros(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def zero(x):
            return jnp.zeros([max(n, 1) for n in x.shape], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

        return jax.tree.map(zero, (self.args, self.kwargs))


def _called(model, methods, args, kwargs) -> dict[Path, Inputs]:
    """The first inputs of every layer that is called; nothing is computed."""
    probe, seen = nnx.clone(model), {}
    for path, layer, op in list(_layers(probe)):
        if op != PROJECTION:
            layer.qwix_path = path
            layer.__class__ = _recording(type(layer), path, seen)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}

    def run(probe, arrays):
        args, kwargs = jax.tree.unflatten(treedef, [arrays.get(k, leaf) for k, leaf in enumerate(leaves)])
        for method in methods:
            getattr(probe, method)(*args, **kwargs)

    nnx.eval_shape(run, probe, arrays)
    return seen


def _recording(cls: type, path: Path, seen: dict) -> type:
    def call(self, *args, **kwargs):
        seen.setdefault(path, Inputs.of(self, args, kwargs))
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def _first(rules, path: Path, op: str) -> int | None:
    name = "/".join(map(str, path))
    for index, rule in enumerate(rules):
        named = op in rule.op_names or (not rule.op_names and op != PROJECTION)
        if named and re.fullmatch(rule.module_path, name):
            return index
    return None


def _check_matches(model: str, rules, chosen, layers) -> None:
    used = {index for index, *_ in chosen if index is not None}
    unused = [rule for index, rule in enumerate(rules) if index not in used]
    floating = all(rules[k].weight_qtype is None for k in used)
    if not unused and not floating:
        return
    reached = {path for _, path, *_ in chosen}
    could = [
        f"{_name(path, layer)} by {op!r}" + ("" if path in reached else ", were it called: no method traced does")
        for path, layer, op in layers
    ]
    named = "; ".join(f"module_path={r.module_path!r}, op_names={tuple(r.op_names)}" for r in unused)
    what = f"matched by no layer: {named}" if unused else "without a weight_qtype: nothing to quantise"
    raise ValueError(
        f"{model}: rules {what}. Layers that rules can match: {', '.join(could) or 'none'}. "
        "module_path is compared with the whole path; projections need quant.projection_rules()."
    )


def _check_tile(rule, path: Path, layer: Any, op: str) -> None:
    tile = rule.tile_size
    if tile is None:
        return
    name = _name(path, layer)
    if op == "conv_general_dilated":
        raise ValueError(
            f"{name}: a convolution has no tiles, so {rule.weight_qtype!r} with tile_size={tile} is for dense layers: "
            'leave it out with weights_only_rules(op_names=("dot_general",)) or by module_path'
        )
    widths = {"B": layer.d_model, "C": layer.d_state} if op == PROJECTION else {"in_features": _width(layer)}
    for axis, width in widths.items():
        if width is None:
            continue
        shared = tile if isinstance(tile, int) else round(width * tile)
        if not shared or width % shared:
            raise ValueError(
                f"{name}: {rule.weight_qtype!r} shares a scale among {shared} inputs, and {width} ({axis}) is no "
                "multiple of that: take another format for this layer, or leave it out by module_path, or by "
                f"rules=[qwix.QuantizationRule(module_path={'/'.join(map(str, path))!r}), ...] first"
            )


def _check_weights(path: Path, layer: Any, inputs: Inputs | None) -> None:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(layer))):
        raise ValueError(
            f"{_name(path, layer)} has shapes but no weights for 'ptq' to round: quantise the loaded model, or call "
            'quantize inside, nnx.eval_shape(lambda: quantize(Model(...), x, mode="ptq")), and put rounded weights in'
        )
    if inputs is not None and inputs.kernel != layer.kernel.shape:
        raise ValueError(
            f"{_name(path, layer)} holds weights {layer.kernel.shape} and is called with {inputs.kernel}, by nnx.scan "
            "or nnx.vmap: 'ptq' has no weights of stacked layers; take mode='qat', or layers that are not stacked"
        )


def _width(layer: Any) -> int | None:
    width = getattr(layer, "in_features", None)
    return width[-1] if isinstance(width, tuple) else width


def _intercept(layer: Any, rule, mode: Mode, inputs: Inputs, path: Path) -> None:
    """Let qwix compute the layer, in place."""
    qwix = require_qwix()
    rule = dataclasses.replace(rule, module_path=".*", op_names=())
    if mode == "ptq":
        provider = storing_provider()([rule])
    else:
        provider = (qwix.QtProvider if rule.act_static_scale else training_provider())([rule])
    idle = mode == "qat" and not rule.act_static_scale
    args, kwargs = inputs.zeros()
    quantized = qwix.quantize_model(layer, provider, *args, skip_nnx_init=idle, **kwargs)
    for name, value in vars(quantized).items():
        kept = isinstance(value, nnx.Variable) and isinstance(getattr(layer, name, None), nnx.Variable)
        if not kept and not name.startswith("_"):
            setattr(layer, name, value)
    layer.__class__ = type(quantized)
    layer.qwix_path = path


def _convolve_rounded(layer: Any, rule, mode: Mode, path: Path) -> None:
    """A float convolution of rounded weights and inputs, scaled as qwix does: for each output and each row.

    qwix 0.1.8 has no gradient of a grouped convolution, and none of inputs and weights of different types.
    """
    if rule.act_static_scale or getattr(rule, "bwd_qtype", None) is not None:
        raise ValueError(
            f"{_name(path, layer)}: act_static_scale and bwd_qtype are not supported for a convolution in {mode!r}: "
            "leave it out by module_path"
        )
    round_weight(layer, "kernel", Grid.of(rule, -1), mode)
    if rule.act_qtype is not None:
        grid = Grid(rule.act_qtype, 0, (), rule.act_calibration_method or "absmax")
        layer.conv_general_dilated = RoundedInput(grid, layer.conv_general_dilated)
    layer.qwix_path = path
