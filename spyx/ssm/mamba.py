"""The selective state-space core of Mamba."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..ops import selective_scan, selective_state_update
from ..ops.diagonal import Precision
from ..ops.dtypes import widen
from ._layer import Lengths, Reset, SequenceLayer, check_masks, clear_padding

DtInit = Literal["random", "constant"]
State = Float[Array, "B D N"]


class Mamba(SequenceLayer):
    """Selective state-space core: step size, input and readout vectors are computed from the input.

    [dt, B, C] = x_proj(u), dt = softplus(dt_proj(dt)), A = -exp(A_log), and with N states per channel
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t. Projections, convolution and gate around it
    are `MambaBlock`.

    Args:
        d_inner: number of channels.
        d_state: number N of states per channel.
        dt_rank: rank of the projection to step sizes; None is ceil(d_inner / 16).
        dt_min, dt_max: the step sizes start log-uniform in [dt_min, dt_max], in the time unit of A.
        dt_init: start of dt_proj's kernel: "random" is normal, "constant" one number; both of size
            dt_scale / sqrt(dt_rank).
        dt_scale: see `dt_init`.
        dt_init_floor: no step size starts below it.
        reverse: run from the last step to the first (no `step`).
        dtype: of the projections and the output; None is the common dtype of input and parameters for the
            projections, that of the input for the output. The state is float32 or wider.
        param_dtype: of the parameters.
        precision: of every matrix product, as in `jax.lax.dot`.
        rngs: random streams; one key of `params` is used.

    Parameters: x_proj.kernel (d_inner, dt_rank + 2 N), dt_proj.kernel (dt_rank, d_inner), dt_proj.bias (d_inner,),
    A_log (d_inner, N), D (d_inner,).

    Raises:
        ValueError: a size that is not a positive integer, unknown `dt_init`, a range that is none.

    Source: Mamba (arXiv:2312.00752).
    """

    _width = "d_inner"

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int | None = None,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init: DtInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        reverse: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(reverse=reverse, dtype=dtype)
        self._check_sizes(d_inner=d_inner, d_state=d_state)
        dt_rank = math.ceil(d_inner / 16) if dt_rank is None else dt_rank
        self._check_sizes(dt_rank=dt_rank)
        self._check_steps(dt_min, dt_max)
        if dt_init not in get_args(DtInit):
            raise ValueError(f"Mamba: dt_init must be one of {get_args(DtInit)}, got {dt_init!r}")
        if dt_scale <= 0 or dt_init_floor < 0:
            got = f"dt_scale={dt_scale}, dt_init_floor={dt_init_floor}"
            raise ValueError(f"Mamba needs dt_scale > 0 and dt_init_floor >= 0, got {got}")
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, dt_rank
        self.param_dtype = param_dtype
        self.precision: Any = precision

        k_x, k_dt, _, k_D = jax.random.split(rngs.params(), 4)
        columns = dt_rank + 2 * d_state
        x_kernel = jax.random.normal(k_x, (d_inner, columns)) * (1.0 / jnp.sqrt(d_inner))
        size = dt_rank**-0.5 * dt_scale
        random = dt_init == "random"
        dt_kernel = (jax.random.normal(k_dt, (dt_rank, d_inner)) if random else jnp.ones((dt_rank, d_inner))) * size
        dt = jnp.exp(jax.random.uniform(k_dt, (d_inner,), minval=jnp.log(dt_min), maxval=jnp.log(dt_max)))
        dt = jnp.maximum(dt, dt_init_floor)
        self.x_proj = self._linear(x_kernel)
        self.dt_proj = self._linear(dt_kernel, dt + jnp.log1p(-jnp.exp(-dt)))
        states = jnp.tile(jnp.arange(1, d_state + 1, dtype=jnp.float32), (d_inner, 1))
        self.A_log = nnx.Param(jnp.log(states).astype(param_dtype))
        self.D = nnx.Param((jnp.ones((d_inner,)) + 0.1 * jax.random.normal(k_D, (d_inner,))).astype(param_dtype))

    def _linear(self, kernel: Array, bias: Array | None = None) -> nnx.Linear:
        def starting_at(value):
            return lambda key, shape, dtype: value.astype(dtype)

        return nnx.Linear(
            *kernel.shape, use_bias=bias is not None, kernel_init=starting_at(kernel), bias_init=starting_at(bias),
            dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision, rngs=nnx.Rngs(0),
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> State:
        """Zero state for `batch_size` rows: shape (batch_size, d_inner, d_state), float32 or wider."""
        dtype = jnp.result_type(self.A_log.dtype, jnp.float32)
        return jnp.zeros((batch_size, self.d_inner, self.d_state), dtype)

    def __call__(
        self,
        u: Float[Array, "T B D"],
        state: State | None = None,
        *,
        return_state: bool = False,
        lengths: Lengths = None,
        reset: Reset = None,
    ) -> Any:
        """Run the layer over a time-major sequence.

        Args:
            u: real floating point, shape (T, B, d_inner).
            state: state before the first step in scan direction, (B, d_inner, d_state); None is zero.
            return_state: also return the last state computed.
            lengths: int (B,): valid steps of each row; outputs past them are 0 and the state returned
                is the one at the last valid step.
            reset: bool (T,) or (T, B): where true the state is cleared before that step.

        Returns:
            y of shape (T, B, d_inner), in `dtype` or else the dtype of `u`; with `return_state`, `(y, state)`.

        Raises:
            ValueError: wrong rank or width. TypeError: wrong dtype.
        """
        u = self._input(u)
        lengths, reset = check_masks(u, lengths, reset)
        y, state = self._scan(clear_padding(u, lengths), None, state, lengths, reset)
        return (y, state) if return_state else y

    def step(self, u_t: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One step: `(y_t, state)` from u_t (B, d_inner) and the state (B, d_inner, d_state) before it.

        Raises:
            ValueError: wrong rank or width, or the layer is reversed. TypeError: wrong dtype.
        """
        self._refuse_reversed_step()
        return self._step(self._input(u_t, step=True), None, state)

    def _scan(self, u, z, state: State | None, lengths: Lengths, reset: Reset) -> tuple[Array, State]:
        """Outputs times silu(z), and the last state; `u` is finite past the lengths."""
        return selective_scan(
            u, *self._selected(u), z, dt_softplus=True,
            h0=state, reverse=self.reverse, reset=reset, lengths=lengths, return_state=True,
        )  # fmt: skip

    def _step(self, u, z, state: State) -> tuple[Array, State]:
        y, new = selective_state_update(state, u, *self._selected(u), z, dt_softplus=True)
        return y, new.astype(jnp.asarray(state).dtype)

    def _selected(self, u: Float[Array, "*T B D"]) -> tuple[Array, Array, Array, Array, Array]:
        """(dt before softplus, A, B, C, D) for the inputs `u`."""
        R, N = self.dt_rank, self.d_state
        dt, B, C = jnp.split(self.x_proj(u), (R, R + N), axis=-1)
        return self.dt_proj(dt), -jnp.exp(widen(self.A_log[...])), B, C, self.D[...]
