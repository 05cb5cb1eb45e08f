"""State-space dual scan on NVIDIA GPUs: matrix products in chunks of time, all chunks at once.

One kernel computes what each chunk adds to the state, one the states at the start of the chunks (elementwise, a
loop over chunks), one the products C B^T, shared by the heads of a group, and one the outputs. The backward pass
computes the states anew and goes the same way in the other direction; the cotangents of B and C are summed over the
heads inside a kernel. Each kernel is small enough for its tiles to stay in registers.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .gpu_ssd_chunk import Chunk, Sizes, axis, tile
from .ssd import START, Gradients, Place, StepSums, check, decay, decay_cotangents, fits_arguments

_MAX_WIDTH = 64
_MAX_STATE = 128
_FLAT_BLOCK = 512


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
    chunk: int = 32,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "T B H P"], Float[Array, "B H P N"]]:
    """y_t = h_t C_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T for each head, in float32.

    Args:
        x: input; float32 or bfloat16, as all the others.
        dt: step size (after softplus and bias); a padded step has dt = 0 and x = 0.
        A: decay rate of each head.
        B, C: input and readout vectors, one for each of G groups of H / G neighbouring heads.
        h0: state before the first step.
        reset: where true, the incoming state is dropped before the step, in scan direction.
        reverse: from the last step to the first.
        chunk: steps in a block of matrix products, a power of two of at least 16; 32 keeps tiles in registers on
            H100 and A100, 64 on H100 alone, with less memory for states.
        precision: of the matrix products; DEFAULT is TF32, all others are three products of TF32 parts (TF32x3).
        dtype: of y; None is that of `x`.
        interpret: True runs without a GPU.

    Returns:
        `(y, h_last)`: the output and the last state computed, float32.

    Raises:
        ValueError: shapes do not agree, P > 64, N > 128 or an unfit `chunk`.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    sizes = Sizes.of(x, B, chunk, reverse, precision, interpret)
    places = sizes.places(dt, A, reset)
    starts, h_last = _starts(sizes, x, B, h0, places)
    y = sizes.call(
        partial(_outputs, sizes=sizes),
        "ssd_outputs",
        (sizes.batch, sizes.heads, sizes.chunks),
        jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype),
    )(x, *places, C, _pair_products(sizes, B, C), starts)
    return y, h_last


def ssd_backward(
    x: Float[Array, "T B H P"],
    dt: Float[Array, "T B H"],
    A: Float[Array, " H"],
    B: Float[Array, "T B G N"],
    C: Float[Array, "T B G N"],
    h0: Float[Array, "B H P N"],
    dy: Float[Array, "T B H P"],
    dh_last: Float[Array, "B H P N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    reverse: bool = False,
    chunk: int = 32,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret: bool = False,
) -> Gradients:
    """Cotangents of the arguments of `ssd_forward`, from those of y and h_last.

    `reverse` and `reset` are those of the forward pass; `chunk` may differ. The same errors are raised.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    sizes = Sizes.of(x, B, chunk, reverse, precision, interpret)
    places = sizes.places(dt, A, reset)
    starts, _ = _starts(sizes, x, B, h0, places)
    added = sizes.outer(partial(_added_backward, sizes=sizes), "ssd_added_backward", dy, C, places)
    ends, dh0 = _passed_on(sizes, added, dh_last, places, reverse=not reverse)

    per_chunk = (sizes.batch, sizes.heads, sizes.chunks)
    per_step = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.chunks * chunk), jnp.float32)
    read = sizes.call(partial(_states_backward, sizes=sizes), "ssd_states_backward", per_chunk, per_step)(
        *places, C, starts, ends, dy
    )
    products = _pair_products(sizes, B, C)
    dx, kept, ddt = sizes.call(
        partial(_inputs_backward, sizes=sizes),
        "ssd_inputs_backward",
        per_chunk,
        (jax.ShapeDtypeStruct(x.shape, x.dtype), per_step, per_step),
    )(x, *places, B, products, ends, dy)
    dproducts, between = sizes.call(
        partial(_products_backward, sizes=sizes),
        "ssd_products_backward",
        (sizes.batch, sizes.groups, sizes.chunks),
        (jax.ShapeDtypeStruct(products.shape, jnp.float32), per_step),
    )(x, *places, products, dy)
    sums = StepSums(*(v.transpose(2, 0, 1) for v in (between, read, kept, ddt)))
    ddt, dA = decay_cotangents(sums, dt, A, chunk=chunk, reverse=reverse)

    grid = (sizes.batch, sizes.groups, sizes.chunks * len(sizes.slices))
    vector = jax.ShapeDtypeStruct(B.shape, jnp.float32)
    dB, dC = (
        sizes.call(partial(_vectors_backward, sizes=sizes, of_B=of_B), "ssd_vectors_backward", grid, vector)(
            rows, *places, states, dproducts, vectors
        )
        for rows, states, vectors, of_B in ((x, ends, C, True), (dy, starts, B, False))
    )
    return Gradients(dx, ddt, dA, dB, dC, dh0)


def _pair_products(sizes: Sizes, B: Array, C: Array) -> Array:
    """C_i B_j of the steps i, j of each chunk and group, (chunks, B, G, L, L)."""
    shape = (sizes.chunks, sizes.batch, sizes.groups, sizes.chunk, sizes.chunk)
    return sizes.call(
        partial(_products, sizes=sizes),
        "ssd_products",
        (sizes.batch, sizes.groups, sizes.chunks),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )(B, C)


def _starts(sizes: Sizes, x: Array, B: Array, h0: Array, places: tuple[Array, ...]) -> tuple[Array, Array]:
    """States with which the chunks start, (chunks, B, H, P, N), and the last."""
    added = sizes.outer(partial(_added, sizes=sizes), "ssd_added", x, B, places)
    return _passed_on(sizes, added, h0, places, reverse=sizes.reverse)


def _passed_on(
    sizes: Sizes, added: Array, first: Array, places: tuple[Array, ...], *, reverse: bool
) -> tuple[Array, Array]:
    """States before each chunk, in the memory of `added`, and after the last; `reverse` is their order."""
    end = 0 if sizes.reverse else sizes.chunk - 1
    last = Place(*(v.reshape(*v.shape[:2], sizes.chunks, sizes.chunk)[..., end] for v in places[:3]))
    flat = sizes.P * sizes.N
    shapes = (sizes.chunks, sizes.batch, sizes.heads, flat), (sizes.batch, sizes.heads, flat)
    before, after = sizes.call(
        partial(_passed, flat=flat, chunks=sizes.chunks, reverse=reverse),
        "ssd_passed",
        (sizes.batch, sizes.heads, pl.cdiv(flat, _FLAT_BLOCK)),
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        aliases={0: 0},
    )(added.reshape(shapes[0]), first.reshape(shapes[1]), decay(last, START))
    return before.reshape(added.shape), after.reshape(first.shape)


def _sliced(sizes: Sizes):
    """Chunk and slice of N of a program whose third index counts both."""
    parts = len(sizes.slices)
    index = pl.program_id(2)
    return index // parts, axis(index % parts * sizes.slice, sizes.slice, sizes.N)


def _added(x, high, low, segment, dt, B, added, *, sizes: Sizes) -> None:
    index, n = _sliced(sizes)
    here = Chunk(sizes, index, pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    B_n = here.vectors(B, here.head // sizes.shared, n).astype(jnp.float32)
    kept = here.to_end() * here.dt() * here.steps(x)
    here.store(added, sizes.dot(kept, B_n, (0, 0)), here.p, n, lead=(index, here.b, here.head))


def _added_backward(dy, high, low, segment, dt, C, added, *, sizes: Sizes) -> None:
    index, n = _sliced(sizes)
    here = Chunk(sizes, index, pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    C_n = here.vectors(C, here.head // sizes.shared, n).astype(jnp.float32)
    read = here.since_start() * here.steps(dy)
    here.store(added, sizes.dot(read, C_n, (0, 0)), here.p, n, lead=(index, here.b, here.head))


def _passed(added, first, whole, before, after, *, flat: int, chunks: int, reverse: bool) -> None:
    b, head = pl.program_id(0), pl.program_id(1)
    place, mask = axis(pl.program_id(2) * _FLAT_BLOCK, _FLAT_BLOCK, flat)
    other = None if mask is None else 0.0

    def step(k, h):
        chunk = chunks - 1 - k if reverse else k
        more = plgpu.load(added.at[chunk, b, head, place], mask=mask, other=other)
        plgpu.store(before.at[chunk, b, head, place], h, mask=mask)
        return whole[b, head, chunk] * h + more

    h = plgpu.load(first.at[b, head, place], mask=mask, other=other).astype(jnp.float32)
    h = jax.lax.fori_loop(np.int32(0), np.int32(chunks), step, h)
    plgpu.store(after.at[b, head, place], h, mask=mask)


def _products(B, C, products, *, sizes: Sizes) -> None:
    here = Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), ())
    total = jnp.zeros((sizes.chunk, sizes.chunk), jnp.float32)
    for first in sizes.slices:
        n = axis(first, sizes.slice, sizes.N)
        total += sizes.dot(here.vectors(C, here.head, n), here.vectors(B, here.head, n), (1, 1))
    here.store_square(products, total)


def _outputs(x, high, low, segment, dt, C, products, starts, y, *, sizes: Sizes) -> None:
    here = Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    group = here.head // sizes.shared
    out = jnp.zeros((sizes.chunk, tile(sizes.P)), jnp.float32)
    for first in sizes.slices:
        n = axis(first, sizes.slice, sizes.N)
        out += sizes.dot(here.vectors(C, group, n).astype(jnp.float32), here.state(starts, n), (1, 1))
    pairs = here.square(products, group) * here.between()
    out = here.since_start() * out + sizes.dot(pairs, here.dt() * here.steps(x))
    here.store(y, out, here.t, here.p, here.b, here.head)


def _states_backward(high, low, segment, dt, C, starts, ends, dy, read, *, sizes: Sizes) -> None:
    here = Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    out = jnp.zeros((sizes.chunk, tile(sizes.P)), jnp.float32)
    dwhole = jnp.zeros((tile(sizes.P), sizes.slice), jnp.float32)
    for first in sizes.slices:
        n = axis(first, sizes.slice, sizes.N)
        h_n = here.state(starts, n)
        C_n = here.vectors(C, here.head // sizes.shared, n).astype(jnp.float32)
        out += sizes.dot(C_n, h_n, (1, 1))
        dwhole += here.state(ends, n) * h_n
    through = here.at_end(here.whole() * jnp.sum(jnp.sum(dwhole, axis=1)))
    here.store_scalars(read, through + jnp.sum(here.since_start() * here.steps(dy) * out, axis=1))


def _inputs_backward(x, high, low, segment, dt, B, products, ends, dy, dx, kept, ddt, *, sizes: Sizes) -> None:
    here = Chunk(sizes, pl.program_id(2), pl.program_id(0), pl.program_id(1), (high, low, segment, dt))
    group = here.head // sizes.shared
    ddriven = jnp.zeros((sizes.chunk, tile(sizes.P)), jnp.float32)
    for first in sizes.slices:
        n = axis(first, sizes.slice, sizes.N)
        ddriven += sizes.dot(here.vectors(B, group, n).astype(jnp.float32), here.state(ends, n), (1, 1))
    ddriven = here.to_end() * ddriven
    here.store_scalars(kept, jnp.sum(here.dt() * here.steps(x) * ddriven, axis=1))
    ddriven += sizes.dot(here.square(products, group) * here.between(), here.steps(dy), (0, 0))
    here.store_scalars(ddt, jnp.sum(here.steps(x) * ddriven, axis=1))
    here.store(dx, here.dt() * ddriven, here.t, here.p, here.b, here.head)


def _products_backward(x, high, low, segment, dt, products, dy, dproducts, between, *, sizes: Sizes) -> None:
    """Cotangents of the products, summed over the heads of a group, and each head's sums over pairs of steps."""
    b, group, chunk = (pl.program_id(axis) for axis in range(3))

    def head(k, total):
        here = Chunk(sizes, chunk, b, group * sizes.shared + k, (high, low, segment, dt))
        dpairs = jnp.zeros_like(total)
        for p in sizes.columns:
            dpairs += sizes.dot(here.steps(dy, p), here.dt() * here.steps(x, p), (1, 1))
        dpairs *= here.between()
        here.store_scalars(between, here.across(dpairs * here.square(products, group)))
        return total + dpairs

    total = jnp.zeros((sizes.chunk, sizes.chunk), jnp.float32)
    total = jax.lax.fori_loop(np.int32(0), np.int32(sizes.shared), head, total)
    Chunk(sizes, chunk, b, group, ()).store_square(dproducts, total)


def _vectors_backward(
    rows, high, low, segment, dt, states, dproducts, vectors, out, *, sizes: Sizes, of_B: bool
) -> None:
    """Cotangents of B from x, the ends' cotangents and C; of C from dy, the starts and B."""
    chunk, n = _sliced(sizes)
    b, group = pl.program_id(0), pl.program_id(1)

    def head(k, total):
        here = Chunk(sizes, chunk, b, group * sizes.shared + k, (high, low, segment, dt))
        weight = here.to_end() * here.dt() if of_B else here.since_start()
        return total + sizes.dot(weight * here.steps(rows), here.state(states, n))

    total = jnp.zeros((sizes.chunk, sizes.slice), jnp.float32)
    total = jax.lax.fori_loop(np.int32(0), np.int32(sizes.shared), head, total)
    here = Chunk(sizes, chunk, b, group, ())
    paired = here.vectors(vectors, group, n).astype(jnp.float32)
    total += sizes.dot(here.square(dproducts, group), paired, (0, 0) if of_B else (1, 0))
    here.store(out, total, here.t, n, b, group)
