"""linear_scan on NVIDIA GPUs: one feature a thread, time in a loop, the state in registers."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .linear import FORWARD, Flags, Parts, advance, check
from .linear import fits as linear_scan_fits
from .loops import with_32_bit_indices

__all__ = ["linear_scan_fits", "linear_scan_forward"]

_UNROLL = 8
_PROGRAMS = 256
_WARP = 32


def linear_scan_forward(
    a: Parts, x: Parts, h0: Parts, flags: Flags = FORWARD, *, interpret: bool = False
) -> tuple[Parts, Parts]:
    """h_t = a_t h_{t-1} + x_t on a GPU; `flags` has the variants, the adjoint among them.

    Args:
        a: decay, (value,) or (re, im), each of shape (T, ...), or (...) where it is constant in time.
        x: input, as many parts, each of shape (T, ...).
        h0: state before the first step, as many parts, each of shape (...).
        flags: direction and variant.
        interpret: True runs without a GPU.

    Returns:
        `(h, h_last)`: h in the shape and dtype of `x`, and the last state computed, shape (...), float32.
        All arithmetic is float32.

    Raises:
        ValueError: shapes do not agree, or there is nothing to compute.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(a, x, h0)
    T, *features = x[0].shape
    size = math.prod(features)
    varying = a[0].ndim == x[0].ndim
    block = 4 * _WARP
    while block > _WARP and pl.cdiv(size, block) < _PROGRAMS:
        block //= 2
    flat = [p.reshape(T, size) if p.shape == x[0].shape else p.reshape(size) for p in (*a, *x, *h0)]
    parts = len(x)
    call = pl.pallas_call(
        partial(_kernel, parts=parts, flags=flags, T=T, size=size, block=block, varying=varying),
        grid=(pl.cdiv(size, block),),
        out_shape=[jax.ShapeDtypeStruct((T, size), part.dtype) for part in x]
        + [jax.ShapeDtypeStruct((size,), jnp.float32) for _ in x],
        compiler_params=plgpu.CompilerParams(num_warps=block // _WARP, num_stages=1),
        interpret=interpret,
        name="linear_scan",
    )
    out = with_32_bit_indices(call)(*flat)
    h, h_last = out[:parts], out[parts:]
    return tuple(p.reshape(T, *features) for p in h), tuple(p.reshape(*features) for p in h_last)


def _kernel(*refs, parts: int, flags: Flags, T: int, size: int, block: int, varying: bool) -> None:
    a, x, h0, h, h_last = (refs[i * parts : (i + 1) * parts] for i in range(5))
    cols = pl.ds(pl.program_id(0) * block, block)
    mask = None if size % block == 0 else pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32) < size

    def read(group, *index):
        other = None if mask is None else 0.0
        return tuple(plgpu.load(ref.at[(*index, cols)], mask=mask, other=other) for ref in group)

    def write(group, values, *index):
        for ref, value in zip(group, values, strict=True):
            plgpu.store(ref.at[(*index, cols)], value.astype(ref.dtype), mask=mask)

    def steps(first, count, carried):
        times = [T - 1 - (first + j) if flags.reverse else first + j for j in range(count)]
        inputs = [(read(a, t) if varying else constant, read(x, t)) for t in times]
        carry, last = carried
        for t, (a_t, x_t) in zip(times, inputs, strict=True):
            last, carry = advance(a_t, x_t, carry, flags)
            write(h, last, t)
        return carry, last

    constant = () if varying else read(a)
    start = tuple(part.astype(jnp.float32) for part in read(h0))
    groups = T // _UNROLL
    carried = (start, start)
    if groups:
        carried = jax.lax.fori_loop(np.int32(0), np.int32(groups), lambda i, c: steps(i * _UNROLL, _UNROLL, c), carried)
    if T % _UNROLL:
        rest = np.int32(groups * _UNROLL)
        carried = steps(rest, T % _UNROLL, carried)
    write(h_last, carried[1])
