"""selective_scan on NVIDIA GPUs: a tile of channels x states in registers, time in a loop.

The forward pass keeps the state at the start of every chunk of time. The backward pass recomputes the
states of one chunk at a time into a buffer of that size, which stays in the L2 cache.
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
from .selective import Discretization, Gradients, check, discretizer, fits_arguments, select

_AHEAD = 4
_AHEAD_BACKWARD = 1
_PROGRAMS = 512
_MAX_STATE = 32
_TILE_PER_WARP = 256
_LARGEST_TILE = 512


def selective_scan_fits(u, dt, A, B, C, h0) -> bool:
    """Whether the kernels take these arguments: float32 or bfloat16, real, not empty, N <= 32."""
    return fits_arguments(u, dt, A, B, C, h0, max_state=_MAX_STATE)


def selective_scan_forward(
    u: Float[Array, "T B D"],
    dt: Float[Array, "T B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "T B N"],
    C: Float[Array, "T B N"],
    h0: Float[Array, "B D N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    discretization: Discretization = "mamba",
    reverse: bool = False,
    chunk: int = 32,
    interpret: bool = False,
) -> tuple[Float[Array, "T B D"], Float[Array, "B D N"], Float[Array, "chunks B N D"]]:
    """y_t = C_t . h_t with h_t = decay(dt_t, A) h_{t-1} + weight(dt_t, A) B_t u_t, in float32.

    Args:
        u: input; float32 or bfloat16, as all the others.
        dt: step size (after softplus and bias); a padded step has dt = 0 and u = 0.
        A: state matrix, diagonal, real.
        B, C: input and output projections of each step.
        h0: state before the first step.
        reset: where true, the incoming state is dropped before the step, in scan direction.
        discretization: what decay and weight are, see `spyx.ops.discretize`; "mamba" has weight dt.
        reverse: from the last step to the first.
        chunk: steps between the states kept for the backward pass.
        interpret: True runs without a GPU.

    Returns:
        `(y, h_last, starts)`: y in the dtype of `u`, the last state computed, and for
        `selective_scan_backward` the state with which each chunk starts (in scan direction), both float32.

    Raises:
        ValueError: shapes do not agree or N > 32.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(u, dt, A, B, C, h0, reset, discretization, max_state=_MAX_STATE)
    T, batch, D = u.shape
    N = A.shape[1]
    block = 32
    while block > 8 and batch * pl.cdiv(D, block) < _PROGRAMS:
        block //= 2
    sizes = _Sizes(T, D, N, block, reverse, reset is not None, chunk)
    call = pl.pallas_call(
        partial(_forward, sizes=sizes, discretise=discretizer(discretization)),
        grid=(batch, pl.cdiv(D, block)),
        out_shape=(
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(h0.shape, jnp.float32),
            jax.ShapeDtypeStruct((pl.cdiv(T, chunk), *h0.shape), jnp.float32),
        ),
        compiler_params=sizes.compiler_params(),
        interpret=interpret,
        name="selective_scan_forward",
    )
    y, h_last, starts = with_32_bit_indices(call)(u, dt, A, B, C, h0, *_flags(reset))
    return y, h_last, starts.swapaxes(2, 3)


def selective_scan_backward(
    u: Float[Array, "T B D"],
    dt: Float[Array, "T B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "T B N"],
    C: Float[Array, "T B N"],
    starts: Float[Array, "chunks B N D"],
    dy: Float[Array, "T B D"],
    dh_last: Float[Array, "B D N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    discretization: Discretization = "mamba",
    reverse: bool = False,
    chunk: int = 32,
    interpret: bool = False,
) -> Gradients:
    """Cotangents of the arguments of `selective_scan_forward`, from those of y and h_last.

    `starts` is what the forward pass returned; `reverse`, `reset` and `chunk` are those of the forward pass. The
    same errors are raised.
    """
    check(u, dt, A, B, C, dh_last, reset, discretization, max_state=_MAX_STATE)
    T, batch, D = u.shape
    N = A.shape[1]
    block = min(64, max(16, pl.next_power_of_2(pl.cdiv(D, 16))), _LARGEST_TILE // pl.next_power_of_2(N))
    blocks = pl.cdiv(D, block)
    sizes = _Sizes(T, D, N, block, reverse, reset is not None, chunk)
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    call = pl.pallas_call(
        partial(_backward, sizes=sizes, discretise=discretizer(discretization), barriers=not interpret),
        grid=(batch, blocks),
        out_shape=(
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(dt.shape, dt.dtype),
            float32((batch, D, N)),
            float32((blocks, T, batch, N)),
            float32((blocks, T, batch, N)),
            float32((batch, D, N)),
            float32((chunk, batch, D, N)),
        ),
        compiler_params=sizes.compiler_params(),
        interpret=interpret,
        name="selective_scan_backward",
    )
    args = (u, dt, A, B, C, starts.swapaxes(2, 3), dy, dh_last, *_flags(reset))
    du, ddt, dA, dB, dC, dh0, _ = with_32_bit_indices(call)(*args)
    return Gradients(du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dh0)


def _flags(reset: Array | None) -> list[Array]:
    return [] if reset is None else [reset.astype(jnp.float32)]


class _Sizes(NamedTuple):
    """What a kernel is built for: `block` channels for each program."""

    T: int
    D: int
    N: int
    block: int
    reverse: bool
    resets: bool
    chunk: int

    @property
    def states(self) -> int:
        return pl.next_power_of_2(self.N)

    def compiler_params(self) -> plgpu.CompilerParams:
        warps = min(8, max(1, self.block * self.states // _TILE_PER_WARP))
        return plgpu.CompilerParams(num_warps=warps, num_stages=1)


class _Tile:
    """The channels and states of one program: masked loads and stores, and the order of the steps."""

    def __init__(self, sizes: _Sizes) -> None:
        self.sizes = sizes
        first = pl.program_id(1) * sizes.block
        channels = self._mask(first, sizes.block, sizes.D)
        states = self._mask(0, sizes.states, sizes.N)
        d, n = pl.ds(first, sizes.block), pl.ds(0, sizes.states)
        self.index = {"D": (d,), "N": (n,), "DN": (d, n)}
        whole = (sizes.block, sizes.states)
        columns = None if channels is None else jnp.broadcast_to(channels[:, None], whole)
        rows = None if states is None else jnp.broadcast_to(states[None, :], whole)
        both = columns if rows is None else rows if columns is None else columns & rows
        self.masks = {"D": channels, "N": states, "DN": both}

    @staticmethod
    def _mask(first, width: int, size: int) -> Array | None:
        return first + jnp.arange(width, dtype=jnp.int32) < size if size % width else None

    def load(self, ref, axes: str, *lead) -> Array:
        mask = self.masks[axes]
        other = None if mask is None else 0.0
        value = plgpu.load(ref.at[(*lead, *self.index[axes])], mask=mask, other=other)
        return value.astype(jnp.float32)

    def store(self, ref, axes: str, value: Array, *lead) -> None:
        plgpu.store(ref.at[(*lead, *self.index[axes])], value.astype(ref.dtype), mask=self.masks[axes])

    def place(self, k):
        """Place in time of the k-th chunk of the scan."""
        return pl.cdiv(self.sizes.T, self.sizes.chunk) - 1 - k if self.sizes.reverse else k

    def time(self, i):
        return self.sizes.T - 1 - i if self.sizes.reverse else i

    def scan(self, first, count: int, step, inputs, carry, *, ahead: int, backward: bool = False):
        """Run steps first ... first + count - 1 (from the last when `backward`), loading `ahead` at a time."""

        def group(base, size, carry):
            base = jnp.int32(base)
            order = [count - 1 - (base + j) if backward else base + j for j in range(size)]
            loaded = [inputs(self.time(first + i)) for i in order]
            for i, values in zip(order, loaded, strict=True):
                carry = step(i, self.time(first + i), values, carry)
            return carry

        turns, rest = divmod(count, ahead)
        if turns:
            carry = jax.lax.fori_loop(np.int32(0), np.int32(turns), lambda k, c: group(k * ahead, ahead, c), carry)
        return group(np.int32(turns * ahead), rest, carry) if rest else carry

    def chunks(self, body, carry, *, backward: bool = False):
        """Run body(chunk, steps in it, carry) over the chunks; only the last can be short."""
        whole, rest = divmod(self.sizes.T, self.sizes.chunk)
        last = np.int32(whole)
        if backward and rest:
            carry = body(last, rest, carry)
        if whole:

            def turn(k, carry):
                return body(jnp.int32(whole - 1 - k if backward else k), self.sizes.chunk, carry)

            carry = jax.lax.fori_loop(np.int32(0), np.int32(whole), turn, carry)
        return body(last, rest, carry) if rest and not backward else carry


def _recur(discretise, A, inputs, h):
    u_t, dt_t, B_t, cleared = inputs
    decay, weight, _ = discretise(jnp.broadcast_to(dt_t[:, None], A.shape), A)
    kept = h if cleared is None else select(cleared, h)
    return decay * kept + weight * u_t[:, None] * B_t[None, :]


def _forward(u, dt, A, B, C, h0, *refs, sizes: _Sizes, discretise) -> None:
    *reset, y, h_last, starts = refs
    tile = _Tile(sizes)
    b = pl.program_id(0)
    A_tile = tile.load(A, "DN")

    def inputs(t):
        cleared = reset[0][t, b] != 0 if sizes.resets else None
        step = tile.load(u, "D", t, b), tile.load(dt, "D", t, b), tile.load(B, "N", t, b), cleared
        return step, tile.load(C, "N", t, b)

    def step(i, t, values, h):
        recurrence, C_t = values
        h = _recur(discretise, A_tile, recurrence, h)
        tile.store(y, "D", jnp.sum(h * C_t[None, :], axis=1), t, b)
        return h

    def chunk(k, count, h):
        tile.store(starts, "DN", h, tile.place(k), b)
        return tile.scan(k * sizes.chunk, count, step, inputs, h, ahead=_AHEAD)

    tile.store(h_last, "DN", tile.chunks(chunk, tile.load(h0, "DN", b)), b)


def _backward(u, dt, A, B, C, starts, dy, dh_last, *refs, sizes: _Sizes, discretise, barriers) -> None:
    *reset, du, ddt, dA, dB, dC, dh0, states = refs
    tile = _Tile(sizes)
    b, d = pl.program_id(0), pl.program_id(1)
    A_tile = tile.load(A, "DN")

    def inputs(t):
        cleared = reset[0][t, b] != 0 if sizes.resets else None
        return tile.load(u, "D", t, b), tile.load(dt, "D", t, b), tile.load(B, "N", t, b), cleared

    def recompute(i, t, values, h):
        tile.store(states, "DN", h, i, b)
        return _recur(discretise, A_tile, values, h)

    def barrier():
        if barriers:
            plgpu.debug_barrier()

    def adjoint_inputs(t):
        return inputs(t), tile.load(C, "N", t, b), tile.load(dy, "D", t, b)

    def adjoint(i, t, values, carry):
        (u_t, dt_t, B_t, cleared), C_t, dy_t = values
        g, dA_sum = carry
        before = tile.load(states, "DN", i, b)
        before = before if cleared is None else select(cleared, before)
        u_t, dy_t = u_t[:, None], dy_t[:, None]
        B_t, C_t = B_t[None, :], C_t[None, :]
        decay, weight, pull = discretise(jnp.broadcast_to(dt_t[:, None], A_tile.shape), A_tile)
        h = decay * before + weight * u_t * B_t
        g = g + dy_t * C_t
        ddt_t, dA_t = pull(g * before, g * u_t * B_t)
        tile.store(du, "D", jnp.sum(g * weight * B_t, axis=1), t, b)
        tile.store(ddt, "D", jnp.sum(ddt_t, axis=1), t, b)
        tile.store(dB, "N", jnp.sum(g * weight * u_t, axis=0), d, t, b)
        tile.store(dC, "N", jnp.sum(dy_t * h, axis=0), d, t, b)
        g = g * decay
        return (g if cleared is None else select(cleared, g)), dA_sum + dA_t

    def chunk(k, count, carry):
        start = tile.load(starts, "DN", tile.place(k), b)
        tile.scan(k * sizes.chunk, count, recompute, inputs, start, ahead=_AHEAD_BACKWARD)
        barrier()
        carry = tile.scan(k * sizes.chunk, count, adjoint, adjoint_inputs, carry, ahead=_AHEAD_BACKWARD, backward=True)
        barrier()
        return carry

    g, dA_sum = tile.chunks(chunk, (tile.load(dh_last, "DN", b), jnp.zeros_like(A_tile)), backward=True)
    tile.store(dh0, "DN", g, b)
    tile.store(dA, "DN", dA_sum, b)
