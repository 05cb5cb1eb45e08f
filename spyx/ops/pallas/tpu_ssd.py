"""State-space dual scan on TPU: matrix products in chunks of time, the heads of a group one after the other.

Neighbouring heads fill a block of 128 lanes. The states of all heads of a group stay in VMEM from one chunk
to the next, and the products C B^T of a chunk are shared by its heads, as are the cotangents of B and C.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from .loops import with_32_bit_indices
from .ssd import START, Gradients, Place, check, cumulated, cumulated_cotangents, decay, fits_arguments

_LANES = 128
_ROWS = 8
_NARROWEST = 16
_MAX_WIDTH = 256
_MAX_STATE = 256
_MAX_STATE_BYTES = 4 * 2**20


def ssd_fits(x, dt, A, B, C, h0) -> bool:
    """Whether to use the kernels: float32 or bfloat16, not empty, P, N <= 256, a group's states in 4 MiB."""
    if not fits_arguments(x, dt, A, B, C, h0, max_width=_MAX_WIDTH, max_state=_MAX_STATE):
        return False
    return _Plan(x, B, False, _LANES, jax.lax.Precision.HIGHEST).state_bytes <= _MAX_STATE_BYTES


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
    chunk: int = 128,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret=False,
) -> tuple[Float[Array, "T B H P"], Float[Array, "B H P N"], Float[Array, "chunks B N W"]]:
    """y_t = h_t C_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T for each head, in float32.

    Args:
        x: input; float32 or bfloat16, as all the others.
        dt: step size (after softplus and bias); a padded step has dt = 0 and x = 0.
        A: decay rate of each head.
        B, C: input and readout vectors, one for each of G groups of H / G neighbouring heads.
        h0: state before the first step.
        reset: where true, the incoming state is dropped before the step, in scan direction.
        reverse: from the last step to the first.
        chunk: steps in a block of matrix products, a multiple of 128.
        precision: of the matrix products; DEFAULT is one bfloat16 pass, all others are HIGHEST.
        interpret: True or `pltpu.InterpretParams()` runs without a TPU.

    Returns:
        `(y, h_last, starts)`: y in the dtype of `x`, the last state computed, and for `ssd_backward` the
        state with which each chunk starts (in scan direction) in the kernel's layout, both float32.

    Raises:
        ValueError: shapes do not agree, P or N > 256, or an unfit `chunk`.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    plan = _Plan(x, B, reverse, chunk, precision)
    rows = plan.rows(dt, A, reset)
    y, h_last, starts = plan.call(
        partial(_forward, plan=plan),
        "ssd_forward",
        [plan.step, plan.vectors, plan.vectors, plan.scalars, plan.state],
        [
            (plan.step, plan.step_shape, x.dtype),
            (plan.last_state, plan.state_shape, jnp.float32),
            (plan.start, (plan.chunks, *plan.state_shape), jnp.float32),
        ],
        [pltpu.VMEM((plan.blocks, plan.N, plan.lanes), jnp.float32), plan.square],
        interpret,
    )(plan.tile(x), plan.tile_vectors(B), plan.tile_vectors(C), rows, plan.tile_state(h0))
    return plan.untile(y), plan.untile_state(h_last), starts


def ssd_backward(
    x: Float[Array, "T B H P"],
    dt: Float[Array, "T B H"],
    A: Float[Array, " H"],
    B: Float[Array, "T B G N"],
    C: Float[Array, "T B G N"],
    starts: Float[Array, "chunks B N W"],
    dy: Float[Array, "T B H P"],
    dh_last: Float[Array, "B H P N"],
    reset: Bool[Array, "T B"] | None = None,
    *,
    reverse: bool = False,
    chunk: int = 128,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret=False,
) -> Gradients:
    """Cotangents of the arguments of `ssd_forward`, from those of y and h_last.

    `starts` is what the forward pass returned; `reverse`, `reset` and `chunk` are those of the forward pass. The
    same errors are raised.
    """
    check(x, dt, A, B, C, dh_last, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    plan = _Plan(x, B, reverse, chunk, precision)
    rows = plan.rows(dt, A, reset)
    vectors = (plan.back_vectors, plan.vectors_shape, jnp.float32)
    dx, dB, dC, drows, dh0 = plan.call(
        partial(_backward, plan=plan),
        "ssd_backward",
        [plan.back_step, plan.back_vectors, plan.back_vectors, plan.back_scalars, plan.back_start, plan.back_step,
         plan.state],
        [
            (plan.back_step, plan.step_shape, x.dtype),
            vectors,
            vectors,
            (plan.back_sums, (plan.batch, plan.groups * plan.blocks, plan.sums, plan.padded), jnp.float32),
            (plan.last_state, plan.state_shape, jnp.float32),
        ],
        [pltpu.VMEM((plan.blocks, plan.N, plan.lanes), jnp.float32), plan.square, plan.square],
        interpret,
    )(
        plan.tile(x), plan.tile_vectors(B), plan.tile_vectors(C), rows, starts, plan.tile(dy),
        plan.tile_state(dh_last),
    )  # fmt: skip
    dplace, ddt = plan.unpack(drows)
    dend = jnp.zeros((plan.chunks, *dt.shape[1:]), jnp.float32)
    ddt, dA = cumulated_cotangents(dplace, dend, ddt, dt, A, chunk=plan.steps, reverse=reverse)
    return Gradients(plan.untile(dx), ddt, dA, plan.untile_vectors(dB), plan.untile_vectors(dC), plan.untile_state(dh0))


class _Plan:
    """Sizes, block specifications and the layout changes between the public arrays and the kernels'."""

    def __init__(self, x: Array, B: Array, reverse: bool, chunk: int, precision: jax.lax.Precision) -> None:
        if chunk < 1 or chunk % _LANES:
            raise ValueError(f"chunk must be a multiple of {_LANES}, got {chunk}")
        self.T, self.batch, heads, self.real_width = x.shape
        self.groups, self.real_N = B.shape[2:]
        self.real_heads = heads // self.groups
        self.reverse = reverse
        default = precision == jax.lax.Precision.DEFAULT
        self.precision = jax.lax.Precision.DEFAULT if default else jax.lax.Precision.HIGHEST
        self.width = max(_NARROWEST, pl.next_power_of_2(self.real_width))
        self.heads = max(1, _LANES // self.width)
        self.lanes = self.heads * self.width
        self.blocks = pl.cdiv(self.real_heads, self.heads)
        self.N = pl.cdiv(self.real_N, _LANES) * _LANES
        self.steps = min(chunk, pl.cdiv(self.T, 2 * _ROWS) * 2 * _ROWS)
        self.chunks = pl.cdiv(self.T, self.steps)
        self.padded = self.chunks * self.steps
        self.values = pl.cdiv(3 * self.heads + 1, _ROWS) * _ROWS
        self.sums = pl.cdiv(2 * self.heads, _ROWS) * _ROWS
        self.step_shape = (self.padded, self.batch * self.groups * self.blocks * self.lanes)
        self.vectors_shape = (self.padded, self.batch * self.groups * self.N)
        self.state_shape = (self.batch, self.N, self.groups * self.blocks * self.lanes)
        self.square = pltpu.VMEM((self.steps, self.steps), jnp.float32)
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

    def unpack(self, drows: Array) -> tuple[Array, Array]:
        """Cotangents of the sums and of dt, each (padded, B, H)."""
        drows = drows[:, :, : 2 * self.heads].reshape(self.batch, self.groups, self.blocks, 2, self.heads, -1)
        parts = drows.transpose(3, 5, 0, 1, 2, 4).reshape(2, self.padded, self.batch, self.groups, -1)
        parts = parts[..., : self.real_heads].reshape(2, self.padded, self.batch, -1)
        return parts[0], parts[1]

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


class _Decays:
    """Decays of one chunk for the heads of one block."""

    def __init__(self, rows, plan: _Plan) -> None:
        rows = rows[...]
        columns = rows.T
        L = plan.steps
        self.last_step = 0 if plan.reverse else L - 1
        later = jax.lax.broadcasted_iota(jnp.int32, (L, L), 0)
        earlier = jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
        self._reaches = later <= earlier if plan.reverse else later >= earlier
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
        return decay(column, row, self._reaches)


def _float32(ref) -> Array:
    return ref[...].astype(jnp.float32)


def _forward(x, B, C, rows, h0, y, h_last, starts, states, products, *, plan: _Plan) -> None:
    k = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        states[k] = h0[...]

    @pl.when(k == 0)
    def _():
        products[...] = plan.dot(C[...], B[...], (1, 1))

    h = states[k]
    starts[...] = h
    decays = _Decays(rows, plan)
    driven = decays.dt * _float32(x)
    out = decays.since_start * plan.dot(_float32(C), h)
    for head in range(plan.heads):
        out += plan.dot(products[...] * decays.between(head), plan.only(head, driven))
    y[...] = out.astype(y.dtype)
    states[k] = decays.whole * h + plan.dot(_float32(B), decays.to_end * driven, (0, 0))
    h_last[...] = states[k]


def _backward(
    x, B, C, rows, start, dy, dh_last, dx, dB, dC, drows, dh0, carry, products, dproducts, *, plan: _Plan
) -> None:
    k = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[k] = dh_last[...]

    @pl.when(k == 0)
    def _():
        products[...] = plan.dot(C[...], B[...], (1, 1))
        dproducts[...] = jnp.zeros_like(dproducts)
        dB[...] = jnp.zeros_like(dB)
        dC[...] = jnp.zeros_like(dC)

    h, dh = start[...], carry[k]
    decays = _Decays(rows, plan)
    x_, B_, C_, dy_ = (_float32(ref) for ref in (x, B, C, dy))
    driven = decays.dt * x_
    read = decays.since_start * dy_
    kept = decays.to_end * driven
    dkept = plan.dot(B_, dh)
    ddriven = decays.to_end * dkept
    sums = jnp.zeros((plan.sums, plan.steps), jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    for head in range(plan.heads):
        between = decays.between(head)
        dy_head = plan.only(head, dy_)
        dpairs = plan.dot(dy_head, driven, (1, 1)) * between
        pairs = products[...] * between
        ddriven += plan.dot(pairs, dy_head, (0, 0))
        dproducts[...] += dpairs
        change = dpairs * products[...]
        ones = jnp.where(row == head, 1.0, 0.0)
        sums += plan.dot(ones, change, (1, 1)) - plan.dot(ones, change)
    dx[...] = (decays.dt * ddriven).astype(dx.dtype)
    dB[...] += plan.dot(kept, dh, (1, 1))
    dC[...] += plan.dot(read, h, (1, 1))

    kept = kept * dkept
    sums += plan.dot(plan.selector(0), read * plan.dot(C_, h) - kept, (1, 1))
    sums += plan.dot(plan.selector(plan.heads), x_ * ddriven, (1, 1))
    at_end = jnp.sum(kept, axis=0, keepdims=True) + decays.whole * jnp.sum(dh * h, axis=0, keepdims=True)
    at_end = jnp.sum(plan.selector(0) * at_end, axis=1, keepdims=True)
    step = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    drows[...] = sums + jnp.where(step == decays.last_step, at_end, 0.0)

    carry[k] = decays.whole * dh + plan.dot(C_, read, (0, 0))
    dh0[...] = carry[k]

    @pl.when(k == plan.blocks - 1)
    def _():
        dB[...] += plan.dot(dproducts[...], C_, (0, 0))
        dC[...] += plan.dot(dproducts[...], B_)
