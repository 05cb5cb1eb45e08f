"""Diagonal S4D / S5-style layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..ops import zoh
from ..ops.diagonal import Precision
from ..ops.dtypes import to_complex
from ._diagonal import DiagonalSSM, Matrices


class S5Diag(DiagonalSSM):
    """Diagonal continuous-time SSM, discretised by zero-order hold; eigenvalues start at -1/2 + i pi n.

    The continuous eigenvalues are -softplus(A_re_raw) + i A_im, so |exp(A dt)| <= 1 whatever the parameters.

    Args:
        d_model: width H of input and output.
        d_state: number N of complex states.
        dt_min, dt_max: the step sizes start log-uniform in [dt_min, dt_max], in the time unit of A.
        use_skip: with the elementwise feedthrough D.
        reverse: run from the last step to the first (no `step`).
        dtype: of the output; None is that of the input. The state is float32 pairs or wider.
        param_dtype: of the parameters.
        precision: of every matrix product, as in `jax.lax.dot`.
        rngs: random streams; one key of `params` is used.

    Parameters: A_re_raw, A_im, log_dt (N,); B_re, B_im (N, H); C_re, C_im (H, N); D (H,) or None.

    Raises:
        ValueError: a size that is not a positive integer, or not 0 < dt_min <= dt_max.

    Source: S4D (arXiv:2206.11893), S5 (arXiv:2208.04933).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        use_skip: bool = True,
        reverse: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            d_model, d_state, use_skip=use_skip, reverse=reverse, dtype=dtype,
            param_dtype=param_dtype, precision=precision,
        )  # fmt: skip
        self._check_steps(dt_min, dt_max)
        k_dt, k_B, k_C, k_D = jax.random.split(rngs.params(), 4)
        half = jnp.full((d_state,), 0.5)
        self.A_re_raw = nnx.Param(jnp.log(jnp.expm1(half)).astype(param_dtype))
        self.A_im = nnx.Param((jnp.pi * jnp.arange(d_state, dtype=jnp.float32)).astype(param_dtype))
        log_dt = jax.random.uniform(k_dt, (d_state,), minval=jnp.log(dt_min), maxval=jnp.log(dt_max))
        self.log_dt = nnx.Param(log_dt.astype(param_dtype))
        self._init_matrices(k_B, k_C, k_D)

    def _complex_matrices(self) -> Matrices:
        A = to_complex(-jax.nn.softplus(self.A_re_raw[...]), self.A_im[...])
        lam, gamma = zoh(A, jnp.exp(self.log_dt[...].astype(A.real.dtype)))
        B = to_complex(self.B_re[...], self.B_im[...])
        return lam, gamma[:, None] * B, to_complex(self.C_re[...], self.C_im[...])
