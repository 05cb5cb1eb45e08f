"""Weights and inputs rounded with qwix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ._rules import require_qwix

Mode = Literal["qat", "ptq"]


def _with_any_rows(base: type) -> type:
    """A provider of qwix that gives outputs without rows too: qwix divides by their number."""

    class Provider(base):
        def dot_general(self, lhs, rhs, *args, **kwargs):
            return _any_rows(jax.lax.dot_general, super().dot_general, lhs, rhs, *args, **kwargs)

        def einsum(self, einsum_str, lhs, rhs, **kwargs):
            def of(einsum):
                return lambda lhs, rhs, **kwargs: einsum(einsum_str, lhs, rhs, **kwargs)

            return _any_rows(of(jnp.einsum), of(super().einsum), lhs, rhs, **kwargs)

        def conv_general_dilated(self, lhs, rhs, *args, **kwargs):
            return _any_rows(jax.lax.conv_general_dilated, super().conv_general_dilated, lhs, rhs, *args, **kwargs)

    return Provider


def _any_rows(exact: Callable, rounded: Callable, lhs: jax.Array, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
    weight = jax.ShapeDtypeStruct(rhs.shape, lhs.dtype)
    shape = jax.eval_shape(lambda lhs, rhs: exact(lhs, rhs, *args, **kwargs), lhs, weight).shape
    if 0 in shape:
        return jnp.zeros(shape, jnp.result_type(lhs.dtype, rhs.dtype))
    return rounded(lhs, rhs, *args, **kwargs)


@functools.cache
def storing_provider() -> type:
    """qwix's provider for "ptq"."""
    return _with_any_rows(require_qwix().PtqProvider)


@functools.cache
def training_provider() -> type:
    """qwix's provider for "qat", for any shape of input."""

    class Provider(_with_any_rows(require_qwix().QtProvider)):
        """qwix takes an input for the weight if it, or what unary operations made it from, has the weight's shape.

        So the input gets more axes than the weight, by an operation that has several arguments.
        """

        def dot_general(self, lhs, rhs, dimension_numbers, *args, **kwargs):
            (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
            more = max(0, rhs.ndim + 1 - lhs.ndim)
            lhs = lhs.reshape((1,) * more + lhs.shape)
            lhs = jax.lax.select_n(jnp.bool_(True), lhs, lhs)
            contracted, batch = (tuple(a + more for a in axes) for axes in (lhs_contracted, lhs_batch))
            dimensions = ((contracted, rhs_contracted), (batch, rhs_batch))
            y = super().dot_general(lhs, rhs, dimensions, *args, **kwargs)
            return jnp.squeeze(y, tuple(range(len(batch), len(batch) + more)))

    return Provider


@dataclasses.dataclass(frozen=True)
class Grid:
    """How an array is rounded: a scale for each index of an axis, and for each tile of another."""

    qtype: DTypeLike
    channel: int
    tiles: tuple[tuple[int, int | float], ...]
    method: str

    @classmethod
    def of(cls, rule: Any, channel: int, tiled: int | None = None) -> Grid:
        tiles = () if rule.tile_size is None or tiled is None else ((tiled, rule.tile_size),)
        return cls(rule.weight_qtype, channel, tiles, rule.weight_calibration_method)

    def round(self, x: jax.Array) -> Any:
        return require_qwix().quantize(
            x, self.qtype, channelwise_axes=(self.channel % x.ndim,), tiled_axes=dict(self.tiles),
            calibration_method=self.method,
        )  # fmt: skip

    def straight_through(self, x: jax.Array) -> jax.Array:
        if not x.size:
            return x
        return x + jax.lax.stop_gradient(require_qwix().dequantize(self.round(x)) - x)


class RoundedParam(nnx.Param):
    """A float parameter that reads as its rounded self; gradients pass straight through."""

    @classmethod
    def of(cls, param: nnx.Variable, grid: Grid) -> RoundedParam:
        return cls(param.get_raw_value(), **{**param.get_metadata(), "grid": grid})

    def get_value(self, *, index: Any = ...):
        return self.get_metadata("grid").straight_through(super().get_value())[index]

    def unrounded(self) -> nnx.Param:
        metadata = {name: value for name, value in self.get_metadata().items() if name != "grid"}
        return nnx.Param(self.get_raw_value(), **metadata)


class StoredWeight(nnx.Variable):
    """A rounded array that reads as float."""

    @classmethod
    def of(cls, param: nnx.Variable, grid: Grid) -> StoredWeight:
        return cls(grid.round(param.get_raw_value()), **param.get_metadata())

    def get_value(self, *, index: Any = ...):
        return require_qwix().dequantize(super().get_value())[index]


@dataclasses.dataclass(frozen=True)
class RoundedInput:
    """A convolution of the rounded input."""

    grid: Grid
    convolve: Callable[..., jax.Array]

    def __call__(self, lhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return self.convolve(self.grid.straight_through(lhs), *args, **kwargs)


def round_weight(layer: Any, name: str, grid: Grid, mode: Mode) -> None:
    """Replace a parameter of a layer."""
    setattr(layer, name, (RoundedParam if mode == "qat" else StoredWeight).of(getattr(layer, name), grid))
