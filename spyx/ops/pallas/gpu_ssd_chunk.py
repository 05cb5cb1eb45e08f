"""What the state-space dual kernels on NVIDIA GPUs are built from: sizes, calls, and one chunk of one head."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from .loops import with_32_bit_indices
from .ssd import START, Place, cumulated, decay

_SMALLEST_TILE = 16
_SLICE = 32
_WARPS = 8


def tile(size: int) -> int:
    return max(_SMALLEST_TILE, pl.next_power_of_2(size))


def axis(first, width: int, size: int):
    """`width` places from `first`, and which of them are inside; None where all are."""
    whole = size % width == 0 or (isinstance(first, int) and first + width <= size)
    if whole:
        return pl.ds(first, width), None
    first = jnp.int32(first)
    return pl.ds(first, width), first + jnp.arange(width, dtype=jnp.int32) < size


class Sizes(NamedTuple):
    """What the kernels are built for."""

    T: int
    batch: int
    heads: int
    groups: int
    P: int
    N: int
    chunk: int
    reverse: bool
    precision: jax.lax.Precision
    interpret: bool

    @classmethod
    def of(cls, x: Array, B: Array, chunk: int, reverse: bool, precision: jax.lax.Precision, interpret) -> Sizes:
        if chunk < _SMALLEST_TILE or chunk != pl.next_power_of_2(chunk):
            raise ValueError(f"chunk must be a power of two of at least {_SMALLEST_TILE}, got {chunk}")
        default = precision == jax.lax.Precision.DEFAULT
        precision = jax.lax.Precision.DEFAULT if default else jax.lax.Precision.HIGHEST
        (T, batch, heads, P), (groups, N) = x.shape, B.shape[2:]
        return cls(T, batch, heads, groups, P, N, chunk, reverse, precision, interpret)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.T, self.chunk)

    @property
    def shared(self) -> int:
        """Heads in a group."""
        return self.heads // self.groups

    @property
    def slice(self) -> int:
        return min(_SLICE, tile(self.N))

    @property
    def slices(self) -> range:
        return range(0, self.N, self.slice)

    @property
    def columns(self) -> list:
        """Slices of P."""
        width = min(_SLICE, tile(self.P))
        return [axis(first, width, self.P) for first in range(0, self.P, width)]

    def call(self, kernel, name: str, grid, out_shape, *, aliases=None):
        call = pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
            input_output_aliases=aliases or {},
            interpret=self.interpret,
            name=name,
        )
        return with_32_bit_indices(call)

    def places(self, dt: Array, A: Array, reset: Array | None) -> tuple[Array, ...]:
        """High and low sum, segment and dt, each (B, H, chunks * L)."""
        place, dt = cumulated(dt, A, reset, chunk=self.chunk, reverse=self.reverse)
        return tuple(v.transpose(1, 2, 0) for v in (*place, dt))

    def outer(self, kernel, name: str, rows: Array, columns: Array, places: tuple[Array, ...]) -> Array:
        """For each chunk and head the (P, N) sum over its steps of weighted outer products."""
        shape = (self.chunks, self.batch, self.heads, self.P, self.N)
        grid = (self.batch, self.heads, self.chunks * len(self.slices))
        return self.call(kernel, name, grid, jax.ShapeDtypeStruct(shape, jnp.float32))(rows, *places, columns)

    def dot(self, left: Array, right: Array, axes: tuple[int, int] = (1, 0)) -> Array:
        """Product over one axis of each; bfloat16 operands are multiplied exactly as they are."""
        precision = self.precision
        if precision == jax.lax.Precision.HIGHEST and not self.interpret:
            precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(
            left, right, (((axes[0],), (axes[1],)), ((), ())),
            precision=jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip


class Chunk:
    """One chunk of one head: masked loads and stores; decays, each computed where it is used."""

    def __init__(self, sizes: Sizes, chunk, b, head, places) -> None:
        self.chunk, self.b, self.head = chunk, b, head
        self.t = axis(chunk * sizes.chunk, sizes.chunk, sizes.T)
        self.p = axis(0, tile(sizes.P), sizes.P)
        self._end = chunk * sizes.chunk + (0 if sizes.reverse else sizes.chunk - 1)
        self._reverse, self._length = sizes.reverse, sizes.chunk
        self._places = places

    def load(self, ref, rows, columns, *between, lead=()) -> Array:
        mask = _mask(rows, columns)
        return plgpu.load(
            ref.at[(*lead, rows[0], *between, columns[0])], mask=mask, other=None if mask is None else 0.0
        )

    def store(self, ref, value, rows, columns, *between, lead=()) -> None:
        index = (*lead, rows[0], *between, columns[0])
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=_mask(rows, columns))

    def steps(self, ref, p=None) -> Array:
        """(L, P) of x, y or their cotangents, or the part p of their columns."""
        return self.load(ref, self.t, p or self.p, self.b, self.head).astype(jnp.float32)

    def vectors(self, ref, group, n) -> Array:
        """(L, n) of B or C."""
        return self.load(ref, self.t, n, self.b, group)

    def state(self, ref, n) -> Array:
        return self.load(ref, self.p, n, lead=(self.chunk, self.b, self.head))

    def scalars(self, ref) -> Array:
        return plgpu.load(ref.at[self.b, self.head, self.t[0]])

    def store_scalars(self, ref, value) -> None:
        plgpu.store(ref.at[self.b, self.head, self.t[0]], value)

    def square(self, ref, group) -> Array:
        """(L, L), of a group."""
        return plgpu.load(ref.at[self.chunk, self.b, group])

    def store_square(self, ref, value) -> None:
        plgpu.store(ref.at[self.chunk, self.b, self.head], value)

    def _at(self) -> Place:
        return Place(*(self.scalars(ref) for ref in self._places[:3]))

    def _last(self) -> Place:
        return Place(*(plgpu.load(ref.at[self.b, self.head, self._end]) for ref in self._places[:3]))

    def dt(self) -> Array:
        return self.scalars(self._places[3])[:, None]

    def between(self) -> Array:
        at = self._at()
        column, row = Place(*(v[:, None] for v in at)), Place(*(v[None, :] for v in at))
        return decay(column, row, self.reaches())

    def reaches(self) -> Array:
        """(i, j): whether step i is not before step j, in scan direction."""
        step = jnp.arange(self._length, dtype=jnp.int32)
        return step[:, None] <= step[None, :] if self._reverse else step[:, None] >= step[None, :]

    def across(self, pairs: Array) -> Array:
        """For each step t the sum over the pairs (i, j) of steps where i is not before t, and j is."""
        step = jnp.arange(self._length, dtype=jnp.int32)
        after = step[:, None] < step[None, :]
        if self._reverse:
            return jnp.sum(jnp.where(after, jnp.cumsum(pairs, axis=0), 0.0), axis=1)
        return jnp.sum(jnp.where(after, 0.0, jnp.cumsum(pairs, axis=1) - pairs), axis=0)

    def at_end(self, value) -> Array:
        """`value` at the last step of the chunk, else 0."""
        step = jnp.arange(self._length, dtype=jnp.int32)
        return jnp.where(step == (0 if self._reverse else self._length - 1), value, 0.0)

    def since_start(self) -> Array:
        return decay(self._at(), START)[:, None]

    def to_end(self) -> Array:
        return decay(self._last(), self._at())[:, None]

    def whole(self) -> Array:
        return decay(self._last(), START)


def _mask(rows, columns) -> Array | None:
    shape = (rows[0].size, columns[0].size)
    inside = None if rows[1] is None else jnp.broadcast_to(rows[1][:, None], shape)
    if columns[1] is None:
        return inside
    across = jnp.broadcast_to(columns[1][None, :], shape)
    return across if inside is None else inside & across
