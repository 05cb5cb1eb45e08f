"""Rules: which layers get which types."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

FEEDFORWARD = ("dot_general", "conv_general_dilated")
PROJECTION = "ssm_projection"
_OP_NAMES = (*FEEDFORWARD, "einsum", PROJECTION)
_NAMED_QTYPES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "nvfp4", "mxfp4", "mxfp8")
_TILES = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}


def available() -> bool:
    """Whether qwix is installed."""
    return importlib.util.find_spec("qwix") is not None


def require_qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("spyx.quant needs qwix: pip install 'spyx-torch[quant]'") from error
    return qwix


def linear_only_rules(
    weight_qtype: DTypeLike = "int8",
    act_qtype: DTypeLike | None = "int8",
    extra_op_names: Sequence[str] = (),
    tile_size: int | float | None = None,
) -> list[Any]:
    """Weights and activations of every dense layer and convolution.

    Args:
        weight_qtype: "int2" to "int8", "nf4", "float8_e4m3fn", or a microscaled format: "nvfp4", "mxfp4", "mxfp8".
        act_qtype: the same for the inputs of the layers; None leaves them float. qwix scales by absmax / 127.5 at
            int8, so a spike is not exact: for spiking layers see `spiking_feedforward_rules`.
        extra_op_names: further op names, see the module's table.
        tile_size: number of inputs that share a scale, or 1 / the number of tiles as a float; None is what the format
            asks for: 16 for nvfp4, 32 for mxfp4 and mxfp8, else one scale for each output (weights) and each position
            (inputs).

    Raises:
        ImportError: without qwix. ValueError: unknown type or op name, a tile size the format does not have.
        TypeError: op names that are one string.

    Source: microscaling formats (arXiv:2310.10537).
    """
    return [_rule(".*", (*FEEDFORWARD, *_names(extra_op_names)), weight_qtype, act_qtype, tile_size)]


def weights_only_rules(
    weight_qtype: DTypeLike = "int8",
    module_path: str = ".*",
    op_names: Sequence[str] = FEEDFORWARD,
    tile_size: int | float | None = None,
) -> list[Any]:
    """Weights of dense layers and convolutions; the inputs stay float.

    On TPU and GPU the product of float inputs and rounded weights runs at JAX's ambient matmul precision.

    Args:
        weight_qtype, tile_size: as in `linear_only_rules`.
        module_path: regular expression for the whole path of a layer.
        op_names: which kinds of layers, see the module's table.

    Raises:
        ImportError: without qwix. ValueError, TypeError: as in `linear_only_rules`; a `module_path` that is no
            regular expression.
    """
    return [_rule(module_path, op_names, weight_qtype, None, tile_size)]


def spiking_feedforward_rules(
    weight_qtype: DTypeLike = "int8",
    *,
    module_path: str = ".*",
    extra_op_names: Sequence[str] = (),
    tile_size: int | float | None = None,
) -> list[Any]:
    """Weights of the layers that spikes feed: a spike, 0 or 1, is exact as it is (`binary_activation_error`).

    Arguments and errors are those of `weights_only_rules` and `linear_only_rules`.
    """
    return [_rule(module_path, (*FEEDFORWARD, *_names(extra_op_names)), weight_qtype, None, tile_size)]


def bitnet_ternary_rules(act_qtype: DTypeLike | None = "int8") -> list[Any]:
    """Weights near {-1, 0, 1} times a scale for each output, after BitNet b1.58, in all dense and convolution layers.

    The type is qwix's "int2" with absmax scaling: the fourth level, -2, is taken only by the weights at minus the
    largest magnitude of their output. BitNet itself scales by the mean magnitude and has no fourth level.

    Args:
        act_qtype: type of the inputs; None leaves them float.

    Raises:
        ImportError: without qwix. ValueError: unknown type.

    Source: BitNet b1.58 (arXiv:2402.17764).
    """
    return [_rule(".*", FEEDFORWARD, "int2", act_qtype, None)]


def projection_rules(
    weight_qtype: DTypeLike = "int8", *, module_path: str = ".*", tile_size: int | float | None = None
) -> list[Any]:
    """Weights of the projections B and C of LRU and S5Diag: real and imaginary part, a scale for each row.

    To be added to other rules: `linear_only_rules() + projection_rules()`. The eigenvalues and the feedthrough D stay
    float. "qat" rounds B and C at each use and passes the gradient straight through; "ptq" stores them rounded.

    Args:
        weight_qtype, tile_size: as in `linear_only_rules`; tiles run along d_model in B, along d_state in C.
        module_path: regular expression for the whole path of a layer.

    Raises:
        ImportError: without qwix. ValueError: as in `linear_only_rules`.
    """
    return [_rule(module_path, (PROJECTION,), weight_qtype, None, tile_size)]


def _rule(module_path, op_names, weight_qtype, act_qtype, tile_size) -> Any:
    qwix = require_qwix()
    op_names = _names(op_names)
    if not op_names or not set(op_names) <= set(_OP_NAMES):
        raise ValueError(f"op names must be some of {_OP_NAMES}, got {op_names}")
    _check_qtype("weight_qtype", weight_qtype)
    wanted = {_TILES[q] for q in (weight_qtype, act_qtype) if isinstance(q, str) and q in _TILES}
    if len(wanted) > 1 or (wanted and tile_size not in (None, *wanted)):
        raise ValueError(
            f"weight_qtype={weight_qtype!r} and act_qtype={act_qtype!r} need tiles of {sorted(wanted)}, "
            f"got tile_size={tile_size}; leave tile_size=None, and take formats with equal tiles"
        )
    rule = qwix.QuantizationRule(
        module_path=module_path, op_names=op_names, weight_qtype=weight_qtype, act_qtype=act_qtype,
        tile_size=next(iter(wanted), tile_size),
    )  # fmt: skip
    check_rule(rule)
    return rule


def _names(op_names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(op_names, str):
        raise TypeError(f"op names must be a sequence of names, got {op_names!r}: write ({op_names!r},)")
    return tuple(op_names)


def check_rule(rule: Any) -> None:
    """Raise unless the path, the types and the tile size of a `qwix.QuantizationRule` can be used."""
    if not isinstance(rule.module_path, str):
        raise TypeError(f"module_path must be a regular expression, got {rule.module_path!r}")
    try:
        re.compile(rule.module_path)
    except re.error as error:
        raise ValueError(f"module_path={rule.module_path!r} is no regular expression: {error}") from error
    for name in ("weight_qtype", "act_qtype"):
        if getattr(rule, name) is not None:
            _check_qtype(name, getattr(rule, name))
    tile = rule.tile_size
    whole = isinstance(tile, int) and not isinstance(tile, bool) and tile > 0
    if not (tile is None or whole or (isinstance(tile, float) and 0 < tile <= 1)):
        raise ValueError(f"tile_size must be a number of inputs, from 1, or 1 / the number of tiles, got {tile!r}")


def _check_qtype(name: str, qtype: DTypeLike) -> None:
    if isinstance(qtype, str) and qtype in _NAMED_QTYPES:
        return
    try:
        dtype = jnp.dtype(qtype) if qtype is not None else None
    except TypeError:
        dtype = None
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        usable = jnp.finfo(dtype).bits in (4, 8) and jnp.finfo(dtype).min < 0
    else:
        usable = dtype is not None and jnp.issubdtype(dtype, jnp.signedinteger) and 2 <= jnp.iinfo(dtype).bits <= 8
    if not usable:
        raise ValueError(
            f"{name} must be one of {_NAMED_QTYPES} or a signed dtype of at most 8 bits, integer (from 2 bits) or "
            f"float (of 4 or 8 bits), got {qtype!r}"
        )


def binary_activation_error(spikes: ArrayLike, *, weight_qtype: str = "int8") -> float:
    """Largest error of `spikes` rounded to a symmetric integer grid scaled to their largest magnitude.

    Needs no qwix. A spike train, values 0 and 1, gives 0.0: rounding the input of a spiking layer gains nothing
    over leaving it as it is.

    Args:
        spikes: array of any shape.
        weight_qtype: "int2", "int3", ...: the grid.

    Raises:
        ValueError: not an integer type of at least 2 bits.
    """
    match = re.fullmatch(r"int(\d+)", str(weight_qtype))
    if match is None or int(match[1]) < 2:
        raise ValueError(f"weight_qtype must be 'int2', 'int3', ..., got {weight_qtype!r}")
    levels = 2.0 ** (int(match[1]) - 1) - 1
    x = jnp.asarray(spikes, jnp.float32)
    largest = jnp.max(jnp.abs(x), initial=0.0)
    codes = jnp.round(x / jnp.where(largest > 0, largest, 1.0) * levels)
    return float(jnp.max(jnp.abs(x - codes * largest / levels), initial=0.0))
