"""Linear Recurrent Unit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..ops.diagonal import Precision
from ..ops.dtypes import to_complex
from ._diagonal import DiagonalSSM, Matrices


class LRU(DiagonalSSM):
    """Linear Recurrent Unit: a diagonal complex recurrence, stable by construction.

    x_k = lam x_{k-1} + B u_k, y_k = Re(C x_k) + D u_k with lam = exp(-exp(nu) + i theta), so |lam| < 1.

    Args:
        d_model: width H of input and output.
        d_state: number N of complex states.
        r_min, r_max: at initialisation |lam|^2 is uniform in [r_min^2, r_max^2].
        use_skip: with the elementwise feedthrough D.
        reverse: run from the last step to the first (no `step`).
        dtype: of the output; None is that of the input. The state is float32 pairs or wider.
        param_dtype: of the parameters.
        precision: of every matrix product, as in `jax.lax.dot`.
        rngs: random streams; one key of `params` is used.

    Parameters: nu, theta (N,); B_re, B_im (N, H); C_re, C_im (H, N); D (H,) or None.

    Raises:
        ValueError: a size that is not a positive integer.

    Source: Orvieto et al. 2023 (arXiv:2303.06349).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
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
        if not 0.0 <= r_min <= r_max <= 1.0:
            raise ValueError(f"LRU needs 0 <= r_min <= r_max <= 1, got r_min={r_min}, r_max={r_max}")
        k_lam, k_B, k_C, k_D = jax.random.split(rngs.params(), 4)
        k_radius, k_theta = jax.random.split(k_lam)
        radius_squared = jax.random.uniform(k_radius, (d_state,)) * (r_max**2 - r_min**2) + r_min**2
        nu = jnp.log(-0.5 * jnp.log(radius_squared + 1e-8))
        self.nu = nnx.Param(nu.astype(param_dtype))
        self.theta = nnx.Param((jax.random.uniform(k_theta, (d_state,)) * 2.0 * jnp.pi).astype(param_dtype))
        gamma = jnp.sqrt(jnp.clip(1.0 - jnp.exp(-jnp.exp(nu)) ** 2, 0.0, None))
        self._init_matrices(k_B, k_C, k_D, gamma)

    def _complex_matrices(self) -> Matrices:
        lam = jnp.exp(to_complex(-jnp.exp(self.nu[...]), self.theta[...]))
        return lam, to_complex(self.B_re[...], self.B_im[...]), to_complex(self.C_re[...], self.C_im[...])
