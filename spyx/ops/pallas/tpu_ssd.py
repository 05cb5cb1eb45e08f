"""State-space dual scan on TPU: matrix products in chunks of time, the heads of a group one after the other.

Neighbouring heads fill a block of 128 lanes. The states of all heads of a group stay in VMEM from one chunk
to the next, and the products C B^T of a chunk are shared by its heads, as are the cotangents of B and C.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .ssd import Gradients, check, decay_cotangents, fits_arguments
from .tpu_ssd_plan import LANES, Decays, Plan

_MAX_WIDTH = 256
_MAX_STATE = 256
_MAX_STATE_BYTES = 4 * 2**20


def ssd_fits(x, dt, A, B, C, h0) -> bool:
    """Whether to use the kernels: float32 or bfloat16, not empty, P, N <= 256, a group's states in 4 MiB."""
    if not fits_arguments(x, dt, A, B, C, h0, max_width=_MAX_WIDTH, max_state=_MAX_STATE):
        return False
    return Plan(x, B, False, LANES, jax.lax.Precision.HIGHEST).state_bytes <= _MAX_STATE_BYTES


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
    dtype: DTypeLike | None = None,
    interpret=False,
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
        chunk: steps in a block of matrix products, a multiple of 128.
        precision: of the matrix products; DEFAULT is one bfloat16 pass, all others are HIGHEST.
        dtype: of y; None is that of `x`.
        interpret: True or `pltpu.InterpretParams()` runs without a TPU.

    Returns:
        `(y, h_last)`: the output and the last state computed, float32.

    Raises:
        ValueError: shapes do not agree, P or N > 256, or an unfit `chunk`.
        TypeError: a dtype other than float32 and bfloat16.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    plan = Plan(x, B, reverse, chunk, precision)
    y, h_last = plan.call(
        partial(_forward, plan=plan),
        "ssd_forward",
        [plan.step, plan.vectors, plan.vectors, plan.scalars, plan.state],
        [
            (plan.step, plan.step_shape, x.dtype if dtype is None else dtype),
            (plan.last_state, plan.state_shape, jnp.float32),
        ],
        [plan.states, plan.square],
        interpret,
    )(plan.tile(x), plan.tile_vectors(B), plan.tile_vectors(C), plan.rows(dt, A, reset), plan.tile_state(h0))
    return plan.untile(y), plan.untile_state(h_last)


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
    chunk: int = 128,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret=False,
) -> Gradients:
    """Cotangents of the arguments of `ssd_forward`, from those of y and h_last.

    `reverse` and `reset` are those of the forward pass; `chunk` may differ. The same errors are raised.
    """
    check(x, dt, A, B, C, h0, reset, max_width=_MAX_WIDTH, max_state=_MAX_STATE)
    plan = Plan(x, B, reverse, chunk, precision)
    x_, B_, C_, rows = plan.tile(x), plan.tile_vectors(B), plan.tile_vectors(C), plan.rows(dt, A, reset)
    (starts,) = plan.call(
        partial(_starts, plan=plan),
        "ssd_starts",
        [plan.step, plan.vectors, plan.scalars, plan.state],
        [(plan.start, (plan.chunks, *plan.state_shape), jnp.float32)],
        [plan.states],
        interpret,
    )(x_, B_, rows, plan.tile_state(h0))
    vectors = (plan.back_vectors, plan.vectors_shape, jnp.float32)
    dx, dB, dC, sums, dh0 = plan.call(
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
        [plan.states, plan.square, plan.square],
        interpret,
    )(x_, B_, C_, rows, starts, plan.tile(dy), plan.tile_state(dh_last))  # fmt: skip
    ddt, dA = decay_cotangents(plan.step_sums(sums), dt, A, chunk=plan.steps, reverse=reverse)
    return Gradients(plan.untile(dx), ddt, dA, plan.untile_vectors(dB), plan.untile_vectors(dC), plan.untile_state(dh0))


def _float32(ref) -> Array:
    return ref[...].astype(jnp.float32)


def _starts(x, B, rows, h0, starts, states, *, plan: Plan) -> None:
    k = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        states[k] = h0[...]

    starts[...] = states[k]
    states[k] = _advanced(plan, Decays(rows, plan), _float32(x), B, states[k])


def _advanced(plan: Plan, decays: Decays, x: Array, B, h: Array) -> Array:
    """The state at the end of a chunk, from that at its start."""
    return decays.whole * h + plan.dot(_float32(B), decays.to_end * decays.dt * x, (0, 0))


def _forward(x, B, C, rows, h0, y, h_last, states, products, *, plan: Plan) -> None:
    k = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        states[k] = h0[...]

    @pl.when(k == 0)
    def _():
        products[...] = plan.dot(C[...], B[...], (1, 1))

    h, x_ = states[k], _float32(x)
    decays = Decays(rows, plan)
    driven = decays.dt * x_
    out = decays.since_start * plan.dot(_float32(C), h)
    for head in range(plan.heads):
        out += plan.dot(products[...] * decays.between(head), plan.only(head, driven))
    y[...] = out.astype(y.dtype)
    states[k] = _advanced(plan, decays, x_, B, h)
    h_last[...] = states[k]


def _backward(
    x, B, C, rows, start, dy, dh_last, dx, dB, dC, step_sums, dh0, carry, products, dproducts, *, plan: Plan
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
    decays = Decays(rows, plan)
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
        earlier = plan.dot(dpairs * products[...], jnp.where(decays.reaches, 0.0, 1.0))
        sums += jnp.where(row == head, jnp.sum(jnp.where(decays.reaches, earlier, 0.0), axis=0, keepdims=True), 0.0)
    dx[...] = (decays.dt * ddriven).astype(dx.dtype)
    dB[...] += plan.dot(kept, dh, (1, 1))
    dC[...] += plan.dot(read, h, (1, 1))

    for first, value in enumerate((read * plan.dot(C_, h), kept * dkept, x_ * ddriven), 1):
        sums += plan.dot(plan.selector(first * plan.heads), value, (1, 1))
    through = decays.whole * jnp.sum(dh * h, axis=0, keepdims=True)
    through = jnp.sum(plan.selector(plan.heads) * through, axis=1, keepdims=True)
    step = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    step_sums[...] = sums + jnp.where(step == decays.last_step, through, 0.0)

    carry[k] = decays.whole * dh + plan.dot(C_, read, (0, 0))
    dh0[...] = carry[k]

    @pl.when(k == plan.blocks - 1)
    def _():
        dB[...] += plan.dot(dproducts[...], C_, (0, 0))
        dC[...] += plan.dot(dproducts[...], B_)
