"""State-space dual scan on NVIDIA GPUs: matrix products in chunks of time, all chunks at once.

One kernel computes what each chunk adds to the state, one the states at the start of the chunks (elementwise, a
loop over chunks), one the products C B^T, shared by the heads of a group, and one the outputs. The backward pass
goes the same way in the other direction; the cotangents of B and C are summed over the heads inside a kernel.
Each kernel is small enough for its tiles to stay in registers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from .loops import with_32_bit_indices
from .ssd import START, Gradients, Place, check, cumulated, cumulated_cotangents, decay, fits_arguments

_SMALLEST_TILE = 16
_MAX_WIDTH = 64
_MAX_STATE = 128
_SLICE = 32
_FLAT_BLOCK = 512
_WARPS = 8


def ssd_fits(x, dt, A, B, C, h0) -> bool:
    """Whether the kernels take these arguments: float32 or bfloat16, not empty, P <= 64, N <= 128."""
    return fits_arguments(x, dt, A, B, C, h0, max_width=_MAX_WIDTH, max_state=_MAX_STATE)


def ssd_forward(
    x: Float[Array, "T B H P"],
    dt: Float[Array, "T B H"],
    A: Float[Array, " H"],
    B: Float[Array, "T B G N"],
    C: Float[Array, "T B G N"],
    h0: Float[Array, "B H P N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    reverse: bool = False,
    chunk: int = 64,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret: bool = False,
) -> tuple[Float[Array, "T B H P"], Float[Array, "B H P N"], Float[Array, "chunks B H P N"]]:
    """y_t = h_t C_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T for each head, in float32.

    Args:
        x: input; float32 or bfloat16, as all the others.
        dt: step size (after softplus and bias); a padded step has dt = 0 and x = 0.
        A: decay rate of each head.
        B, C: input and readout vectors, one for each of G groups of H / G neighbouring heads.
        h0: state before the first step.
        reset: where true, the incoming state is dropped before the step, in scan direction.
        reverse: from the last step to the first.
        chunk: steps in a block of matrix products, a power of two of at least 16; 64 keeps tiles in registers on
            H100, 32 on A100 too.
        precision: of the matrix products; DEFAULT is TF32, all others are three products of TF32 parts.
        interpret: True runs without a GPU.

    Returns:
        `(y, h_last, starts)`: y in the dtype of `x`, the last state computed, and for `ssd_backward` the
        state with which each chunk starts (in scan direction), both float32.

    Raises:
        ValueError: shapes do not agree, P > 64, N > 128 or an unfit `chunk`.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    sizes = _Sizes.of(x, B, chunk, reverse, precision, interpret)
    places = sizes.places(dt, A, reset)
    added = sizes.outer(partial(_added, sizes=sizes), "ssd_added", x, B, places)
    starts, h_last = sizes.passed(added, h0, places, reverse=reverse)
    y = sizes.call(
        partial(_outputs, sizes=sizes),
        "ssd_outputs",
        (sizes.batch, sizes.heads, sizes.chunks),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, *places, C, sizes.products(_products, "ssd_products", B, C), starts)
    return y, h_last, starts


def ssd_backward(
    x: Float[Array, "T B H P"],
    dt: Float[Array, "T B H"],
    A: Float[Array, " H"],
    B: Float[Array, "T B G N"],
    C: Float[Array, "T B G N"],
    starts: Float[Array, "chunks B H P N"],
    dy: Float[Array, "T B H P"],
    dh_last: Float[Array, "B H P N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    reverse: bool = False,
    chunk: int = 64,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret: bool = False,
) -> Gradients:
    """Cotangents of the arguments of `ssd_forward`, from those of y and h_last.

    `starts` is what the forward pass returned; `reverse`, `reset` and `chunk` are those of the forward pass. The
    same errors are raised.
    """
    check(x, dt, A, B, C, dh_last, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    sizes = _Sizes.of(x, B, chunk, reverse, precision, interpret)
    places = sizes.places(dt, A, reset)
    added = sizes.outer(partial(_added_backward, sizes=sizes), "ssd_added_backward", dy, C, places)
    ends, dh0 = sizes.passed(added, dh_last, places, reverse=not reverse)
    per_step = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.chunks * chunk), jnp.float32)
    per_chunk = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.chunks), jnp.float32)
    dread, dend = sizes.call(
        partial(_states_backward, sizes=sizes), "ssd_states_backward", per_chunk.shape, (per_step, per_chunk)
    )(*places, C, starts, ends, dy)
    dx, dplace, dkept, ddt = sizes.call(
        partial(_inputs_backward, sizes=sizes),
        "ssd_inputs_backward",
        per_chunk.shape,
        (jax.ShapeDtypeStruct(x.shape, x.dtype), per_step, per_step, per_step),
    )(x, *places, B, sizes.products(_products, "ssd_products", B, C), ends, dy)

    dproducts = sizes.products(_products_backward, "ssd_products_backward", x, *places, dy)
    grid = (sizes.batch, sizes.groups, sizes.chunks * len(sizes.slices))
    vector = jax.ShapeDtypeStruct(B.shape, jnp.float32)
    dB, dC = (
        sizes.call(partial(_vectors_backward, sizes=sizes, of_B=of_B), "ssd_vectors_backward", grid, vector)(
            rows, *places, states, dproducts, vectors
        )
        for rows, states, vectors, of_B in ((x, ends, C, True), (dy, starts, B, False))
    )

    dend += dkept.reshape(*dend.shape, chunk).sum(-1)
    dplace, dend, ddt = (v.transpose(2, 0, 1) for v in (dplace + dread - dkept, dend, ddt))
    ddt, dA = cumulated_cotangents(dplace, dend, ddt, dt, A, chunk=chunk, reverse=reverse)
    return Gradients(dx, ddt, dA, dB, dC, dh0)


def _tile(size: int) -> int:
    return max(_SMALLEST_TILE, pl.next_power_of_2(size))


def _axis(first, width: int, size: int):
    """`width` places from `first`, and which of them are inside; None where all are."""
    whole = size % width == 0 or (isinstance(first, int) and first + width <= size)
    if whole:
        return pl.ds(first, width), None
    first = jnp.int32(first)
    return pl.ds(first, width), first + jnp.arange(width, dtype=jnp.int32) < size


class _Sizes(NamedTuple):
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
    def of(cls, x: Array, B: Array, chunk: int, reverse: bool, precision: jax.lax.Precision, interpret) -> _Sizes:
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
        return min(_SLICE, _tile(self.N))

    @property
    def slices(self) -> range:
        return range(0, self.N, self.slice)

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
        """High and low sum, segment and dt, each (B, H, padded time)."""
        place, dt = cumulated(dt, A, reset, chunk=self.chunk, reverse=self.reverse)
        return tuple(v.transpose(1, 2, 0) for v in (*place, dt))

    def products(self, kernel, name: str, *args: Array) -> Array:
        """One (L, L) for each chunk and group."""
        shape = (self.chunks, self.batch, self.groups, self.chunk, self.chunk)
        grid = (self.batch, self.groups, self.chunks)
        return self.call(partial(kernel, sizes=self), name, grid, jax.ShapeDtypeStruct(shape, jnp.float32))(*args)

    def outer(self, kernel, name: str, rows: Array, columns: Array, places: tuple[Array, ...]) -> Array:
        """For each chunk and head the (P, N) sum over its steps of weighted outer products."""
        shape = (self.chunks, self.batch, self.heads, self.P, self.N)
        grid = (self.batch, self.heads, self.chunks * len(self.slices))
        return self.call(kernel, name, grid, jax.ShapeDtypeStruct(shape, jnp.float32))(rows, *places, columns)

    def passed(self, added: Array, first: Array, places: tuple[Array, ...], *, reverse: bool) -> tuple[Array, Array]:
        """States before each chunk, in the memory of `added`, and after the last; `reverse` is their order."""
        end = 0 if self.reverse else self.chunk - 1
        last = Place(*(v.reshape(*v.shape[:2], self.chunks, self.chunk)[..., end] for v in places[:3]))
        flat = self.P * self.N
        shapes = (self.chunks, self.batch, self.heads, flat), (self.batch, self.heads, flat)
        before, after = self.call(
            partial(_passed, flat=flat, chunks=self.chunks, reverse=reverse),
            "ssd_passed",
            (self.batch, self.heads, pl.cdiv(flat, _FLAT_BLOCK)),
            tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
            aliases={0: 0},
        )(added.reshape(shapes[0]), first.reshape(shapes[1]), decay(last, START))
        return before.reshape(added.shape), after.reshape(first.shape)

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


class _Chunk:
    """One chunk of one head: masked loads and stores; decays, each computed where it is used."""

    def __init__(self, sizes: _Sizes, chunk, b, head, places) -> None:
        self.chunk, self.b, self.head = chunk, b, head
        self.t = _axis(chunk * sizes.chunk, sizes.chunk, sizes.T)
        self.p = _axis(0, _tile(sizes.P), sizes.P)
        self._end = chunk * sizes.chunk + (0 if sizes.reverse else sizes.chunk - 1)
        self._reverse = sizes.reverse
        self._places = places

    def load(self, ref, rows, columns, *between, lead=()) -> Array:
        mask = _mask(rows, columns)
        return plgpu.load(
            ref.at[(*lead, rows[0], *between, columns[0])], mask=mask, other=None if mask is None else 0.0
        )

    def store(self, ref, value, rows, columns, *between, lead=()) -> None:
        index = (*lead, rows[0], *between, columns[0])
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=_mask(rows, columns))

    def steps(self, ref) -> Array:
        """(L, P) of x, y or their cotangents."""
        return self.load(ref, self.t, self.p, self.b, self.head).astype(jnp.float32)

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
        step = jnp.arange(at.high.shape[0], dtype=jnp.int32)
        reaches = step[:, None] <= step[None, :] if self._reverse else step[:, None] >= step[None, :]
        return decay(column, row, reaches)

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


def _sliced(sizes: _Sizes):
    """Chunk and slice of N of a program whose third index counts both."""
    parts = len(sizes.slices)
    index = pl.program_id(2)
    return index // parts, _axis(index % parts * sizes.slice, sizes.slice, sizes.N)


def _added(x, high, low, segment, dt, B, added, *, sizes: _Sizes) -> None:
    index, n = _sliced(sizes)
    here = _Chunk(sizes, index, pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    B_n = here.vectors(B, here.head // sizes.shared, n).astype(jnp.float32)
    kept = here.to_end() * here.dt() * here.steps(x)
    here.store(added, sizes.dot(kept, B_n, (0, 0)), here.p, n, lead=(index, here.b, here.head))


def _added_backward(dy, high, low, segment, dt, C, added, *, sizes: _Sizes) -> None:
    index, n = _sliced(sizes)
    here = _Chunk(sizes, index, pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    C_n = here.vectors(C, here.head // sizes.shared, n).astype(jnp.float32)
    read = here.since_start() * here.steps(dy)
    here.store(added, sizes.dot(read, C_n, (0, 0)), here.p, n, lead=(index, here.b, here.head))


def _passed(added, first, whole, before, after, *, flat: int, chunks: int, reverse: bool) -> None:
    b, head = pl.program_id(0), pl.program_id(1)
    place, mask = _axis(pl.program_id(2) * _FLAT_BLOCK, _FLAT_BLOCK, flat)
    other = None if mask is None else 0.0

    def step(k, h):
        chunk = chunks - 1 - k if reverse else k
        more = plgpu.load(added.at[chunk, b, head, place], mask=mask, other=other)
        plgpu.store(before.at[chunk, b, head, place], h, mask=mask)
        return whole[b, head, chunk] * h + more

    h = plgpu.load(first.at[b, head, place], mask=mask, other=other).astype(jnp.float32)
    h = jax.lax.fori_loop(np.int32(0), np.int32(chunks), step, h)
    plgpu.store(after.at[b, head, place], h, mask=mask)


def _products(B, C, products, *, sizes: _Sizes) -> None:
    here = _Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), ())
    total = jnp.zeros((sizes.chunk, sizes.chunk), jnp.float32)
    for first in sizes.slices:
        n = _axis(first, sizes.slice, sizes.N)
        total += sizes.dot(here.vectors(C, here.head, n), here.vectors(B, here.head, n), (1, 1))
    here.store_square(products, total)


def _outputs(x, high, low, segment, dt, C, products, starts, y, *, sizes: _Sizes) -> None:
    here = _Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    group = here.head // sizes.shared
    out = jnp.zeros((sizes.chunk, _tile(sizes.P)), jnp.float32)
    for first in sizes.slices:
        n = _axis(first, sizes.slice, sizes.N)
        out += sizes.dot(here.vectors(C, group, n).astype(jnp.float32), here.state(starts, n), (1, 1))
    pairs = here.square(products, group) * here.between()
    out = here.since_start() * out + sizes.dot(pairs, here.dt() * here.steps(x))
    here.store(y, out, here.t, here.p, here.b, here.head)


def _states_backward(high, low, segment, dt, C, starts, ends, dy, dplace, dend, *, sizes: _Sizes) -> None:
    here = _Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    out = jnp.zeros((sizes.chunk, _tile(sizes.P)), jnp.float32)
    dwhole = jnp.zeros((_tile(sizes.P),), jnp.float32)
    for first in sizes.slices:
        n = _axis(first, sizes.slice, sizes.N)
        h_n = here.state(starts, n)
        C_n = here.vectors(C, here.head // sizes.shared, n).astype(jnp.float32)
        out += sizes.dot(C_n, h_n, (1, 1))
        dwhole += jnp.sum(here.state(ends, n) * h_n, axis=1)
    here.store_scalars(dplace, jnp.sum(here.since_start() * here.steps(dy) * out, axis=1))
    dend[here.b, here.head, here.chunk] = here.whole() * jnp.sum(dwhole)


def _inputs_backward(
    x, high, low, segment, dt, B, products, ends, dy, dx, dplace, dkept, ddt, *, sizes: _Sizes
) -> None:
    here = _Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    group = here.head // sizes.shared
    ddriven = jnp.zeros((sizes.chunk, _tile(sizes.P)), jnp.float32)
    for first in sizes.slices:
        n = _axis(first, sizes.slice, sizes.N)
        ddriven += sizes.dot(here.vectors(B, group, n).astype(jnp.float32), here.state(ends, n), (1, 1))
    ddriven = here.to_end() * ddriven
    here.store_scalars(dkept, jnp.sum(here.dt() * here.steps(x) * ddriven, axis=1))
    pairs = here.square(products, group) * here.between()
    change = sizes.dot(here.steps(dy), here.dt() * here.steps(x), (1, 1)) * pairs
    here.store_scalars(dplace, jnp.sum(change, axis=1) - jnp.sum(change, axis=0))
    ddriven += sizes.dot(pairs, here.steps(dy), (0, 0))
    here.store_scalars(ddt, jnp.sum(here.steps(x) * ddriven, axis=1))
    here.store(dx, here.dt() * ddriven, here.t, here.p, here.b, here.head)


def _products_backward(x, high, low, segment, dt, dy, dproducts, *, sizes: _Sizes) -> None:
    b, group, chunk = (pl.program_id(axis) for axis in range(3))

    def head(k, total):
        here = _Chunk(sizes, chunk, b, group * sizes.shared + k, (high, low, segment, dt))
        return total + sizes.dot(here.steps(dy), here.dt() * here.steps(x), (1, 1)) * here.between()

    total = jnp.zeros((sizes.chunk, sizes.chunk), jnp.float32)
    total = jax.lax.fori_loop(np.int32(0), np.int32(sizes.shared), head, total)
    _Chunk(sizes, chunk, b, group, ()).store_square(dproducts, total)


def _vectors_backward(
    rows, high, low, segment, dt, states, dproducts, vectors, out, *, sizes: _Sizes, of_B: bool
) -> None:
    """Cotangents of B from x, the ends' cotangents and C; of C from dy, the starts and B."""
    chunk, n = _sliced(sizes)
    b, group = pl.program_id(0), pl.program_id(1)

    def head(k, total):
        here = _Chunk(sizes, chunk, b, group * sizes.shared + k, (high, low, segment, dt))
        weight = here.to_end() * here.dt() if of_B else here.since_start()
        return total + sizes.dot(weight * here.steps(rows), here.state(states, n))

    total = jnp.zeros((sizes.chunk, sizes.slice), jnp.float32)
    total = jax.lax.fori_loop(np.int32(0), np.int32(sizes.shared), head, total)
    here = _Chunk(sizes, chunk, b, group, ())
    paired = here.vectors(vectors, group, n).astype(jnp.float32)
    total += sizes.dot(here.square(dproducts, group), paired, (0, 0) if of_B else (1, 0))
    here.store(out, total, here.t, n, b, group)
