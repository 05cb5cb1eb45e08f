"""What the state-space dual kernels on TPU are built from: sizes, blocks, layouts, and the decays of one chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .loops import with_32_bit_indices
from .ssd import START, Place, StepSums, cumulated, decay

LANES = 128
_ROWS = 8
_NARROWEST = 16


class Plan:
    """Sizes, block specifications and the layout changes between the public arrays and the kernels'."""

    def __init__(self, x: Array, B: Array, reverse: bool, chunk: int, precision: jax.lax.Precision) -> None:
        if chunk < 1 or chunk % LANES:
            raise ValueError(f"chunk must be a multiple of {LANES}, got {chunk}")
        self.T, self.batch, heads, self.real_width = x.shape
        self.groups, self.real_N = B.shape[2:]
        self.real_heads = heads // self.groups
        self.reverse = reverse
        default = precision == jax.lax.Precision.DEFAULT
        self.precision = jax.lax.Precision.DEFAULT if default else jax.lax.Precision.HIGHEST
        self.width = max(_NARROWEST, pl.next_power_of_2(self.real_width))
        self.heads = max(1, LANES // self.width)
        self.lanes = self.heads * self.width
        self.blocks = pl.cdiv(self.real_heads, self.heads)
        self.N = pl.cdiv(self.real_N, LANES) * LANES
        self.steps = min(chunk, pl.cdiv(self.T, 2 * _ROWS) * 2 * _ROWS)
        self.chunks = pl.cdiv(self.T, self.steps)
        self.padded = self.chunks * self.steps
        self.values = pl.cdiv(3 * self.heads + 1, _ROWS) * _ROWS
        self.sums = pl.cdiv(4 * self.heads, _ROWS) * _ROWS
        self.step_shape = (self.padded, self.batch * self.groups * self.blocks * self.lanes)
        self.vectors_shape = (self.padded, self.batch * self.groups * self.N)
        self.state_shape = (self.batch, self.N, self.groups * self.blocks * self.lanes)
        self.square = pltpu.VMEM((self.steps, self.steps), jnp.float32)
        self.states = pltpu.VMEM((self.blocks, self.N, self.lanes), jnp.float32)
        forward = (lambda c: self.chunks - 1 - c) if reverse else (lambda c: c)
        backward = (lambda c: c) if reverse else (lambda c: self.chunks - 1 - c)
        self.step, self.vectors, self.scalars, self.start, _ = self._specs(forward)
        self.back_step, self.back_vectors, self.back_scalars, self.back_start, self.back_sums = self._specs(backward)
        self.state = pl.BlockSpec(
            (None, self.N, self.lanes), lambda b, g, c, k: (b, 0, g * self.blocks + jnp.where(c == 0, k, 0))
        )
        self.last_state = pl.BlockSpec(
            (None, self.N, self.lanes),
            lambda b, g, c, k: (b, 0, g * self.blocks + jnp.where(c == self.chunks - 1, k, 0)),
        )

    @property
    def state_bytes(self) -> int:
        return 4 * self.blocks * self.lanes * self.N

    def _specs(self, chunk) -> tuple[pl.BlockSpec, ...]:
        def block(g, k):
            return g * self.blocks + k

        groups, blocks = self.groups, self.groups * self.blocks
        return (
            pl.BlockSpec((self.steps, self.lanes), lambda b, g, c, k: (chunk(c), b * blocks + block(g, k))),
            pl.BlockSpec((self.steps, self.N), lambda b, g, c, k: (chunk(c), b * groups + g)),
            pl.BlockSpec((None, None, self.values, self.steps), lambda b, g, c, k: (b, block(g, k), 0, chunk(c))),
            pl.BlockSpec((None, None, self.N, self.lanes), lambda b, g, c, k: (chunk(c), b, 0, block(g, k))),
            pl.BlockSpec((None, None, self.sums, self.steps), lambda b, g, c, k: (b, block(g, k), 0, chunk(c))),
        )

    def call(self, kernel, name: str, in_specs, outs, scratch, interpret):
        size = self.padded * self.batch * self.groups * self.blocks * self.lanes
        call = pl.pallas_call(
            kernel,
            grid=(self.batch, self.groups, self.chunks, self.blocks),
            in_specs=in_specs,
            out_specs=[spec for spec, _, _ in outs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * size * (self.steps + 2 * self.N), bytes_accessed=12 * size, transcendentals=size
            ),
            interpret=interpret,
            name=name,
        )
        return with_32_bit_indices(call)

    def _pad(self, value: Array, sizes: dict[int, int]) -> Array:
        padding = [(0, sizes[axis] - size if axis in sizes else 0) for axis, size in enumerate(value.shape)]
        return jnp.pad(value, padding) if any(after for _, after in padding) else value

    def tile(self, x: Array) -> Array:
        x = x.reshape(self.T, self.batch, self.groups, self.real_heads, self.real_width)
        x = self._pad(x, {0: self.padded, 3: self.blocks * self.heads, 4: self.width})
        return x.reshape(self.step_shape)

    def untile(self, x: Array) -> Array:
        x = x.reshape(self.padded, self.batch, self.groups, self.blocks * self.heads, self.width)
        return x[: self.T, :, :, : self.real_heads, : self.real_width].reshape(self.T, self.batch, -1, self.real_width)

    def tile_vectors(self, B: Array) -> Array:
        return self._pad(B, {0: self.padded, 3: self.N}).reshape(self.vectors_shape)

    def untile_vectors(self, B: Array) -> Array:
        return B.reshape(self.padded, self.batch, self.groups, self.N)[: self.T, ..., : self.real_N]

    def tile_state(self, h: Array) -> Array:
        h = h.astype(jnp.float32).reshape(self.batch, self.groups, self.real_heads, self.real_width, self.real_N)
        h = self._pad(h, {2: self.blocks * self.heads, 3: self.width, 4: self.N})
        return h.reshape(self.batch, -1, self.N).swapaxes(1, 2)

    def untile_state(self, h: Array) -> Array:
        h = h.swapaxes(1, 2).reshape(self.batch, self.groups, self.blocks * self.heads, self.width, self.N)
        h = h[:, :, : self.real_heads, : self.real_width, : self.real_N]
        return h.reshape(self.batch, -1, self.real_width, self.real_N)

    def rows(self, dt: Array, A: Array, reset: Array | None) -> Array:
        """High and low sum and dt of each head of a block, then the segment; time on lanes."""
        place, dt = cumulated(dt, A, reset, chunk=self.steps, reverse=self.reverse)
        values = jnp.stack([place.high, place.low, dt], axis=-1)
        values = values.reshape(self.padded, self.batch, self.groups, self.real_heads, 3)
        values = self._pad(values, {3: self.blocks * self.heads})
        values = values.reshape(self.padded, self.batch, self.groups * self.blocks, self.heads * 3)
        segment = jnp.broadcast_to(place.segment[:, :, :1, None], (*values.shape[:-1], 1))
        values = self._pad(jnp.concatenate([values, segment], axis=-1), {3: self.values})
        return values.transpose(1, 2, 3, 0)

    def step_sums(self, sums: Array) -> StepSums:
        sums = sums[:, :, : 4 * self.heads].reshape(self.batch, self.groups, self.blocks, 4, self.heads, -1)
        parts = sums.transpose(3, 5, 0, 1, 2, 4).reshape(4, self.padded, self.batch, self.groups, -1)
        return StepSums(*parts[..., : self.real_heads].reshape(4, self.padded, self.batch, -1))

    def dot(self, left: Array, right: Array, axes: tuple[int, int] = (1, 0)) -> Array:
        """Product over one axis of each; bfloat16 operands are multiplied exactly as they are."""
        precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else self.precision
        return jax.lax.dot_general(
            left, right, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def only(self, head: int, value: Array) -> Array:
        """`value` in the lanes of one head, else 0."""
        if self.heads == 1:
            return value
        lane = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
        return jnp.where((lane >= head * self.width) & (lane < (head + 1) * self.width), value, 0.0)

    def spread(self, values: list[Array]) -> Array:
        """One column of each head, (L, 1), in all lanes of the head."""
        shape = (values[0].shape[0], self.lanes)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        out = jnp.broadcast_to(values[0], shape)
        for head in range(1, self.heads):
            out = jnp.where(lane >= head * self.width, values[head], out)
        return out

    def selector(self, first: int) -> Array:
        """Sums over the lanes of each head, for rows first, first + 1, ... of the results."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.sums, self.lanes), 0) - first
        lane = jax.lax.broadcasted_iota(jnp.int32, (self.sums, self.lanes), 1)
        return jnp.where((lane >= row * self.width) & (lane < (row + 1) * self.width), 1.0, 0.0)


class Decays:
    """Decays of one chunk for the heads of one block."""

    def __init__(self, rows, plan: Plan) -> None:
        rows = rows[...]
        columns = rows.T
        L = plan.steps
        self.last_step = 0 if plan.reverse else L - 1
        later = jax.lax.broadcasted_iota(jnp.int32, (L, L), 0)
        earlier = jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
        self.reaches = later <= earlier if plan.reverse else later >= earlier
        self._heads = []
        segment = 3 * plan.heads
        for k in range(plan.heads):
            at = (3 * k, 3 * k + 1, segment)
            row = Place(*(rows[i : i + 1] for i in at))
            column = Place(*(columns[:, i : i + 1] for i in at))
            last = Place(*(part[:, self.last_step : self.last_step + 1] for part in row))
            self._heads.append((column, row, last))
        self.dt = plan.spread([columns[:, 3 * k + 2 : 3 * k + 3] for k in range(plan.heads)])
        self.since_start = plan.spread([decay(column, START) for column, _, _ in self._heads])
        self.to_end = plan.spread([decay(last, column) for column, _, last in self._heads])
        self.whole = plan.spread([decay(last, START) for _, _, last in self._heads])

    def between(self, head: int) -> Array:
        column, row, _ = self._heads[head]
        return decay(column, row, self.reaches)
