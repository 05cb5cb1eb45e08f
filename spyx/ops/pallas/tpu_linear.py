"""linear_scan on TPU: blocks of (time, rows, lanes), the state in VMEM from one block of time to the next."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .linear import FORWARD, Flags, Parts, advance, check
from .linear import fits as linear_scan_fits
from .loops import unrolled_loop, with_32_bit_indices

__all__ = ["linear_scan_fits", "linear_scan_forward"]

_LANES = 128
_BLOCK_LANES = 512
_UNROLL = 8
_VMEM_BYTES = 6 * 2**20
_MAX_STEPS = 256


def linear_scan_forward(
    a: Parts, x: Parts, h0: Parts, flags: Flags = FORWARD, *, interpret=False
) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t on TPU; `flags` has the variants, the adjoint among them.

    Args:
        a: decay, (value,) or (re, im), each of shape (T, ...), or (...) where it is constant in time.
        x: input, as many parts, each of shape (T, ...).
        h0: state before the first step, as many parts, each of shape (...).
        flags: direction and variant.
        interpret: True or `pltpu.InterpretParams()` runs without a TPU.

    Returns:
        `(h, h_last)`: h in the shape and dtype of `x`, and the last state computed, shape (...), float32.
        All arithmetic is float32.

    Raises:
        ValueError: shapes do not agree, or there is nothing to compute.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(a, x, h0)
    features = x[0].shape[1:]
    rows, lanes = _layout(features)
    size = math.prod(features)

    def tile(part: jax.Array) -> jax.Array:
        lead = part.shape[: part.ndim - len(features)]
        if rows * lanes != size:
            part = jnp.pad(part.reshape(*lead, size), [(0, 0)] * len(lead) + [(0, rows * lanes - size)])
        return part.reshape(*lead, rows, lanes)

    def untile(part: jax.Array) -> jax.Array:
        lead = part.shape[:-2]
        return part.reshape(*lead, rows * lanes)[..., :size].reshape(*lead, *features)

    a, x, h0 = (tuple(tile(part) for part in parts) for parts in (a, x, h0))
    h, h_last = _tiled(a, x, h0, flags, interpret=interpret)
    return tuple(untile(part) for part in h), tuple(untile(part) for part in h_last)


def _layout(features: tuple[int, ...]) -> tuple[int, int]:
    """Rows and lanes: as they are when they fill the sublanes, else flattened into rows of 128 lanes."""
    lanes = features[-1] if features else 1
    rows = math.prod(features[:-1])
    if rows >= 4 and lanes >= _LANES:
        return rows, lanes
    return pl.cdiv(rows * lanes, _LANES), _LANES


def _tiled(a: Parts, x: Parts, h0: Parts, flags: Flags, *, interpret) -> tuple[Parts, Parts]:
    T, rows, lanes = x[0].shape
    varying = a[0].ndim == 3
    row_tile = 32 // min(part.dtype.itemsize for part in (*a, *x, *h0))
    block_rows = min(rows, row_tile if lanes >= _BLOCK_LANES else 4 * row_tile)
    block_lanes = min(lanes, _BLOCK_LANES)
    step_bytes = sum(2 * part.dtype.itemsize for part in (*x, *x, *(a if varying else ())))
    step_bytes *= pl.cdiv(block_rows, 8) * 8 * pl.cdiv(block_lanes, _LANES) * _LANES
    steps = min(T, _MAX_STEPS, max(_UNROLL, 2 ** (_VMEM_BYTES // step_bytes).bit_length() // 2))
    blocks = pl.cdiv(T, steps)

    def time_block(r, c, t):
        return (blocks - 1 - t if flags.reverse else t, r, c)

    per_step = pl.BlockSpec((steps, block_rows, block_lanes), time_block)
    per_state = pl.BlockSpec((block_rows, block_lanes), lambda r, c, t: (r, c))
    parts = len(x)
    call = pl.pallas_call(
        partial(_kernel, parts=parts, flags=flags, T=T),
        grid=(pl.cdiv(rows, block_rows), pl.cdiv(lanes, block_lanes), blocks),
        in_specs=[per_step if varying else per_state] * parts + [per_step] * parts + [per_state] * parts,
        out_specs=[per_step] * parts + [per_state] * parts,
        out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in x]
        + [jax.ShapeDtypeStruct(part.shape, jnp.float32) for part in h0],
        scratch_shapes=[pltpu.VMEM((block_rows, block_lanes), jnp.float32)] * parts,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * parts**2 * T * rows * lanes,
            bytes_accessed=sum(part.nbytes for part in (*a, *x, *x)),
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_scan",
    )
    out = with_32_bit_indices(call)(*a, *x, *h0)
    return tuple(out[:parts]), tuple(out[parts:])


def _kernel(*refs, parts: int, flags: Flags, T: int) -> None:
    a, x, h0, h, h_last, state = (refs[i * parts : (i + 1) * parts] for i in range(6))
    steps = x[0].shape[0]
    blocks = pl.num_programs(2)
    index = pl.program_id(2)
    varying = len(a[0].shape) == 3

    @pl.when(index == 0)
    def _():
        for state_ref, h0_ref in zip(state, h0, strict=True):
            state_ref[...] = h0_ref[...].astype(jnp.float32)

    block = blocks - 1 - index if flags.reverse else index
    count = steps if T % steps == 0 else jnp.minimum(steps, T - block * steps)
    constant = () if varying else tuple(ref[...] for ref in a)

    def step(i, carried):
        carry, _ = carried
        t = count - 1 - i if flags.reverse else i
        a_t = tuple(ref[t] for ref in a) if varying else constant
        h_t, carry = advance(a_t, tuple(ref[t] for ref in x), carry, flags)
        for ref, part in zip(h, h_t, strict=True):
            ref[t] = part.astype(ref.dtype)
        return carry, h_t

    start = tuple(ref[...] for ref in state)
    carry, last = unrolled_loop(count, step, (start, start), _UNROLL)
    for state_ref, last_ref, carry_part, last_part in zip(state, h_last, carry, last, strict=True):
        state_ref[...] = carry_part
        last_ref[...] = last_part
