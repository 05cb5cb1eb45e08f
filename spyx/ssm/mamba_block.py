"""The Mamba block."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..ops.diagonal import Precision
from ._conv import depthwise_conv, depthwise_conv_step
from ._layer import Lengths, Reset, SequenceLayer, check_masks, clear_padding, flip, flip_reset
from .mamba import DtInit, Mamba


class MambaState(NamedTuple):
    """What a Mamba block carries from step to step."""

    conv_state: Float[Array, "B D K"]
    """The last d_conv inputs of the convolution, oldest first."""
    ssm_state: Float[Array, "B D N"]


class MambaBlock(SequenceLayer):
    """Mamba block: in_proj, causal depthwise convolution, SiLU, selective SSM, SiLU gate, out_proj.

    [x, z] = in_proj(u), x = silu(conv(x)), y = out_proj(ssm(x) * silu(z)). Residual and norm are the caller's.

    Args:
        d_model: width H of input and output.
        d_state: number N of states per channel.
        d_conv: number K of taps of the convolution.
        expand: the block has d_inner = expand * d_model channels.
        dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor: as in `Mamba`.
        conv_bias: the convolution has a bias.
        bias: in_proj and out_proj have a bias.
        reverse: run from the last step to the first (no `step`).
        dtype: of the projections and the output; None is the common dtype of input and parameters for the
            projections, that of the input for the output. The state is float32 or wider.
        param_dtype: of the parameters.
        precision: of every matrix product, as in `jax.lax.dot`.
        rngs: random streams; keys of `params` go to in_proj, conv, ssm, out_proj in this order.

    Parameters: in_proj.kernel (H, 2 d_inner), conv.kernel (K, 1, d_inner), conv.bias (d_inner,), those of
    `Mamba` under ssm, out_proj.kernel (d_inner, H); with `bias`, in_proj.bias (2 d_inner,), out_proj.bias (H,).

    Raises:
        ValueError: a size that is not a positive integer, unknown `dt_init`, a range that is none.

    Source: Mamba (arXiv:2312.00752).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init: DtInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        reverse: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(reverse=reverse, dtype=dtype)
        self._check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = d_inner = expand * d_model
        self.param_dtype = param_dtype
        self.precision: Any = precision
        self.in_proj = self._linear(d_model, 2 * d_inner, bias, rngs)
        self.conv = nnx.Conv(
            d_inner, d_inner, (d_conv,), feature_group_count=d_inner, padding="VALID", use_bias=conv_bias,
            dtype=dtype, param_dtype=param_dtype, precision=self.precision, rngs=rngs,
        )  # fmt: skip
        self.ssm = Mamba(
            d_inner, d_state, dt_rank, dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale,
            dt_init_floor=dt_init_floor, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs,
        )  # fmt: skip
        self.out_proj = self._linear(d_inner, d_model, bias, rngs)

    def _linear(self, width: int, out: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(
            width, out, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype,
            precision=self.precision, rngs=rngs,
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> MambaState:
        """Zero state: conv_state (batch_size, d_inner, d_conv), ssm_state (batch_size, d_inner, d_state)."""
        ssm_state = self.ssm.initial_state(batch_size)
        return MambaState(jnp.zeros((batch_size, self.d_inner, self.d_conv), ssm_state.dtype), ssm_state)

    def __call__(
        self,
        u: Float[Array, "T B H"],
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        lengths: Lengths = None,
        reset: Reset = None,
    ) -> Any:
        """Run the block over a time-major sequence.

        Args:
            u: real floating point, shape (T, B, d_model).
            state: state before the first step in scan direction; None is zero.
            return_state: also return the last state computed.
            lengths: int (B,): valid steps of each row; outputs past them are 0 and the state returned
                is the one at the last valid step.
            reset: bool (T,) or (T, B): where true both states are cleared before that step.

        Returns:
            y of shape (T, B, d_model), in `dtype` or else the dtype of `u`; with `return_state`, `(y, state)`.

        Raises:
            ValueError: wrong rank or width. TypeError: wrong dtype, a state that is no `MambaState`.
        """
        u = self._input(u)
        lengths, reset = check_masks(u, lengths, reset)
        conv_state, ssm_state = (None, None) if state is None else self._parts(state)
        v = clear_padding(u, lengths)
        if self.reverse:
            v, reset = flip(v, lengths), flip_reset(reset, lengths)
        x, z = jnp.split(self.in_proj(v), 2, axis=-1)
        x, conv_state = depthwise_conv(self.conv, x, conv_state, lengths, reset)
        y, ssm_state = self.ssm._scan(x, z, ssm_state, lengths, reset)
        y = self.out_proj(y)
        if self.reverse:
            y = flip(y, lengths)
        y = clear_padding(y, lengths).astype(u.dtype)
        return (y, MambaState(conv_state, ssm_state)) if return_state else y

    def step(self, u_t: Float[Array, "B H"], state: MambaState) -> tuple[Float[Array, "B H"], MambaState]:
        """One step: `(y_t, state)` from u_t (B, d_model) and the state before it.

        Raises:
            ValueError: wrong rank or width, or the block is reversed.
            TypeError: wrong dtype, a state that is no `MambaState`.
        """
        self._refuse_reversed_step()
        u_t = self._input(u_t, step=True)
        conv_state, ssm_state = self._parts(state)
        x, z = jnp.split(self.in_proj(u_t), 2, axis=-1)
        x, conv_state = depthwise_conv_step(self.conv, x, conv_state)
        y, ssm_state = self.ssm._step(x, z, ssm_state)
        return self.out_proj(y).astype(u_t.dtype), MambaState(conv_state, ssm_state)

    def _parts(self, state: MambaState) -> MambaState:
        if not isinstance(state, MambaState):
            raise TypeError(f"MambaBlock expects a MambaState (see initial_state), got {type(state).__name__}")
        return state
