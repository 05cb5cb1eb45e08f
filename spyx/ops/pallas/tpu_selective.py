"""selective_scan on TPU: a tile of 8 x 128 channels per state index, B_t and C_t as scalars.

Channels fill the vector registers, the sum over the N states is a chain of multiply-adds, and nothing is
broadcast across lanes. The forward pass keeps the state at the start of every chunk of time; the backward
pass recomputes the states of a chunk in VMEM.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from .loops import unrolled_loop, with_32_bit_indices
from .selective import Discretization, Gradients, check, discretizer, fits_arguments, select

_ROWS, _LANES = 8, 128
_MAX_STATE = 32
_TILE = (_ROWS, _LANES)
_UNROLL = 2
_MAX_CHUNK_STATES = 1024


def selective_scan_fits(u, dt, A, B, C, h0) -> bool:
    """Whether to use the kernels: float32 or bfloat16, real, not empty, N <= 32, D >= 512.

    They also compute fewer channels, but padded to a tile of 1024.
    """
    return u.shape[-1] >= _ROWS * _LANES // 2 and fits_arguments(u, dt, A, B, C, h0, max_state=_MAX_STATE)


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
    interpret=False,
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
        chunk: steps between the states kept for the backward pass, a multiple of 8 with chunk * N <= 1024.
        interpret: True or `pltpu.InterpretParams()` runs without a TPU.

    Returns:
        `(y, h_last, starts)`: y in the dtype of `u`, the last state computed, and for
        `selective_scan_backward` the state with which each chunk starts (in scan direction), both float32.

    Raises:
        ValueError: shapes do not agree, N > 32 or an unfit `chunk`.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(u, dt, A, B, C, h0, reset, discretization, max_state=_MAX_STATE)
    plan = _Plan(u, A, reset is not None, reverse, chunk)
    kernel = partial(_forward, plan=plan, discretise=discretizer(discretization))
    y, h_last, starts = plan.call(
        kernel,
        "selective_scan_forward",
        [plan.step, plan.step, plan.matrix, plan.scalars, plan.state],
        [
            (plan.step, plan.step_shape, u.dtype),
            (plan.state, plan.state_shape, jnp.float32),
            (plan.start, (plan.chunks, *plan.state_shape), jnp.float32),
        ],
        [pltpu.VMEM((plan.N, *_TILE), jnp.float32)],
        interpret,
    )(plan.tile(u), plan.tile(dt), plan.tile_matrix(A), plan.pack(B, C, reset), plan.tile_state(h0))
    return plan.untile(y), plan.untile_state(h_last), plan.untile(starts)


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
    interpret=False,
) -> Gradients:
    """Cotangents of the arguments of `selective_scan_forward`, from those of y and h_last.

    `starts` is what the forward pass returned; `reverse`, `reset` and `chunk` are those of the forward pass. The
    same errors are raised.
    """
    check(u, dt, A, B, C, dh_last, reset, discretization, max_state=_MAX_STATE)
    plan = _Plan(u, A, reset is not None, reverse, chunk)
    step = (plan.back_step, plan.step_shape)
    du, ddt, dA, dBC, dh0 = plan.call(
        partial(_backward, plan=plan, discretise=discretizer(discretization)),
        "selective_scan_backward",
        [plan.back_step, plan.back_step, plan.matrix, plan.back_scalars, plan.back_start, plan.back_step,
         plan.state],
        [
            (*step, u.dtype),
            (*step, dt.dtype),
            (plan.state, plan.state_shape, jnp.float32),
            (plan.back_sums, (plan.batch, plan.blocks, plan.chunks, 1, plan.steps * plan.sums), jnp.float32),
            (plan.state, plan.state_shape, jnp.float32),
        ],
        [
            pltpu.VMEM((plan.N, *_TILE), jnp.float32),
            pltpu.VMEM((plan.steps + 1, plan.N, *_TILE), jnp.float32),
            pltpu.VMEM((plan.steps, plan.sums, _LANES), jnp.float32),
        ],
        interpret,
    )(
        plan.tile(u), plan.tile(dt), plan.tile_matrix(A), plan.pack(B, C, reset), plan.tile(starts), plan.tile(dy),
        plan.tile_state(dh_last),
    )  # fmt: skip
    dBC = dBC.sum(1).reshape(plan.batch, plan.chunks * plan.steps, 2, plan.sums // 2)
    dB, dC = dBC.transpose(2, 1, 0, 3)[:, : plan.T, :, : plan.N]
    dA = plan.untile_state(dA).sum(0)
    return Gradients(plan.untile(du), plan.untile(ddt), dA, dB, dC, plan.untile_state(dh0))


class _Plan:
    """Sizes, block specifications and the layout changes between the public arrays and the kernels'."""

    def __init__(self, u: Array, A: Array, resets: bool, reverse: bool, chunk: int) -> None:
        self.T, self.batch, self.D = u.shape
        self.N = A.shape[1]
        self.resets, self.reverse = resets, reverse
        self.rows = max(_ROWS, pl.cdiv(self.D, _LANES))
        self.blocks = pl.cdiv(self.rows, _ROWS)
        if chunk < 8 or chunk % 8 or chunk * self.N > _MAX_CHUNK_STATES:
            raise ValueError(
                f"chunk must be a multiple of 8 with chunk * N <= {_MAX_CHUNK_STATES}, got {chunk}, N {self.N}"
            )
        self.steps = min(chunk, pl.cdiv(self.T, 8) * 8)
        self.chunks = pl.cdiv(self.T, self.steps)
        self.width = 2 * self.N + resets
        self.sums = 2 * pl.cdiv(self.N, _ROWS) * _ROWS
        self.step_shape = (self.T, self.batch, self.rows, _LANES)
        self.state_shape = (self.batch, self.N, self.rows, _LANES)
        forward = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)
        backward = (lambda t: t) if reverse else (lambda t: self.chunks - 1 - t)
        self.step, self.scalars, self.start, _ = self._specs(forward)
        self.back_step, self.back_scalars, self.back_start, self.back_sums = self._specs(backward)
        self.matrix = pl.BlockSpec((self.N, *_TILE), lambda b, r, t: (0, r, 0))
        self.state = pl.BlockSpec((None, self.N, *_TILE), lambda b, r, t: (b, 0, r, 0))

    def _specs(self, chunk) -> tuple[pl.BlockSpec, ...]:
        return (
            pl.BlockSpec((self.steps, None, *_TILE), lambda b, r, t: (chunk(t), b, r, 0)),
            pl.BlockSpec(
                (None, None, 1, self.steps * self.width),
                lambda b, r, t: (b, chunk(t), 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec((None, None, self.N, *_TILE), lambda b, r, t: (chunk(t), b, 0, r, 0)),
            pl.BlockSpec((None, None, None, 1, self.steps * self.sums), lambda b, r, t: (b, r, chunk(t), 0, 0)),
        )

    def call(self, kernel, name: str, in_specs, outs, scratch, interpret):
        size = self.T * self.batch * self.D
        call = pl.pallas_call(
            kernel,
            grid=(self.batch, self.blocks, self.chunks),
            in_specs=in_specs,
            out_specs=[spec for spec, _, _ in outs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=8 * size * self.N, bytes_accessed=12 * size, transcendentals=size * self.N
            ),
            interpret=interpret,
            name=name,
        )
        return with_32_bit_indices(call)

    def _pad(self, value: Array) -> Array:
        missing = self.rows * _LANES - self.D
        value = value if missing == 0 else jnp.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)])
        return value.reshape(*value.shape[:-1], self.rows, _LANES)

    def _unpad(self, value: Array) -> Array:
        return value.reshape(*value.shape[:-2], self.rows * _LANES)[..., : self.D]

    tile, untile = _pad, _unpad

    def tile_matrix(self, A: Array) -> Array:
        return self._pad(A.astype(jnp.float32).T)

    def tile_state(self, h: Array) -> Array:
        return self._pad(h.astype(jnp.float32).swapaxes(1, 2))

    def untile_state(self, h: Array) -> Array:
        return self._unpad(h).swapaxes(1, 2)

    def pack(self, B: Array, C: Array, reset: Array | None) -> Array:
        """B_t, C_t and the reset flag of all steps of a chunk in one row of scalars."""
        parts = [B, C] if reset is None else [B, C, reset[..., None]]
        packed = jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=-1)
        packed = jnp.pad(packed, ((0, self.chunks * self.steps - self.T), (0, 0), (0, 0))).swapaxes(0, 1)
        return packed.reshape(self.batch, self.chunks, 1, self.steps * self.width)

    def count(self, chunk):
        """Number of steps in a chunk; only the last can have fewer than the others."""
        return self.steps if self.T % self.steps == 0 else jnp.minimum(self.steps, self.T - chunk * self.steps)

    def live(self) -> Array | None:
        """True in the rows of this block that are inside the array; None where all are."""
        if self.rows % _ROWS == 0:
            return None
        row = jax.lax.broadcasted_iota(jnp.int32, _TILE, 0)
        return row < self.rows - pl.program_id(1) * _ROWS


def _recur(plan: _Plan, discretise, u, dt, A, scalars, t, h):
    """One step of the recurrence, and the offset of the step's scalars."""
    at = t * plan.width
    new = []
    for n in range(plan.N):
        decay, weight, _ = discretise(dt, A[n])
        kept = select(scalars[0, at + 2 * plan.N] != 0, h[n]) if plan.resets else h[n]
        new.append(decay * kept + weight * u * scalars[0, at + n])
    return tuple(new), at


def _forward(u, dt, A, scalars, h0, y, h_last, starts, state, *, plan: _Plan, discretise) -> None:
    index = pl.program_id(2)

    @pl.when(index == 0)
    def _():
        state[...] = h0[...]

    starts[...] = state[...]
    count = plan.count(plan.chunks - 1 - index if plan.reverse else index)

    def step(i, h):
        t = count - 1 - i if plan.reverse else i
        u_t, dt_t = u[t].astype(jnp.float32), dt[t].astype(jnp.float32)
        h, at = _recur(plan, discretise, u_t, dt_t, A, scalars, t, h)
        y_t = h[0] * scalars[0, at + plan.N]
        for n in range(1, plan.N):
            y_t = y_t + h[n] * scalars[0, at + plan.N + n]
        y[t] = y_t.astype(y.dtype)
        return h

    h = unrolled_loop(count, step, tuple(state[n] for n in range(plan.N)), _UNROLL)
    for n in range(plan.N):
        state[n] = h[n]
    h_last[...] = state[...]


def _backward(
    u, dt, A, scalars, start, dy, dh_last, du, ddt, dA, dBC, dh0, carry, states, sums,
    *, plan: _Plan, discretise,
) -> None:  # fmt: skip
    index = pl.program_id(2)
    N = plan.N
    live = plan.live()

    @pl.when(index == 0)
    def _():
        carry[...] = dh_last[...]
        dA[...] = jnp.zeros_like(dA)

    count = plan.count(index if plan.reverse else plan.chunks - 1 - index)

    def recompute(i, h):
        t = count - 1 - i if plan.reverse else i
        for n in range(N):
            states[i, n] = h[n]
        u_t, dt_t = u[t].astype(jnp.float32), dt[t].astype(jnp.float32)
        return _recur(plan, discretise, u_t, dt_t, A, scalars, t, h)[0]

    h = unrolled_loop(count, recompute, tuple(start[n] for n in range(N)), _UNROLL)
    for n in range(N):
        states[count, n] = h[n]

    def adjoint(j, g):
        i = count - 1 - j
        t = j if plan.reverse else i
        at = t * plan.width
        u_t, dt_t, dy_t = (ref[t].astype(jnp.float32) for ref in (u, dt, dy))
        du_t, ddt_t = jnp.zeros(_TILE, jnp.float32), jnp.zeros(_TILE, jnp.float32)
        new, products_B, products_C = [], [], []
        for n in range(N):
            b, c = scalars[0, at + n], scalars[0, at + N + n]
            cleared = scalars[0, at + 2 * N] != 0 if plan.resets else None
            decay, weight, pull = discretise(dt_t, A[n])
            g_n = g[n] + dy_t * c
            gw = g_n * weight
            products_C.append(dy_t * states[i + 1, n])
            products_B.append(gw * u_t)
            du_t = du_t + gw * b
            before = states[i, n] if cleared is None else select(cleared, states[i, n])
            ddt_n, dA_n = pull(g_n * before, g_n * u_t * b)
            ddt_t = ddt_t + ddt_n
            dA[n] += dA_n
            new.append(g_n * decay if cleared is None else select(cleared, g_n * decay))
        for k, products in enumerate((products_B, products_C)):
            for first in range(0, N, _ROWS):
                offset = k * plan.sums // 2 + first
                sums[t, pl.ds(offset, _ROWS)] = _row_sums(products[first : first + _ROWS], live)
        du[t] = du_t.astype(du.dtype)
        ddt[t] = ddt_t.astype(ddt.dtype)
        return tuple(new)

    g = unrolled_loop(count, adjoint, tuple(carry[n] for n in range(N)), 1)
    for n in range(N):
        carry[n] = g[n]
    dh0[...] = carry[...]
    ones = jnp.ones((_ROWS, _LANES), jnp.float32)
    flat = sums[...].reshape(plan.steps * plan.sums, _LANES)
    total = jax.lax.dot_general(
        ones, flat, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    dBC[...] = total[:1]


def _row_sums(tiles: list[Array], live: Array | None) -> Array:
    """Tile whose row k is the sum over the live rows of the k-th of at most 8 tiles: a butterfly of 7 rolls."""
    if live is not None:
        tiles = [jnp.where(live, tile, 0.0) for tile in tiles]
    tiles = tiles + [jnp.zeros(_TILE, jnp.float32)] * (_ROWS - len(tiles))
    row = jax.lax.broadcasted_iota(jnp.int32, _TILE, 0)
    distance = 1
    while distance < _ROWS:
        odd = (row & distance) != 0
        tiles = [
            jnp.where(odd, right, left) + pltpu.roll(jnp.where(odd, left, right), distance, 0)
            for left, right in zip(tiles[::2], tiles[1::2], strict=True)
        ]
        distance *= 2
    return tiles[0]
