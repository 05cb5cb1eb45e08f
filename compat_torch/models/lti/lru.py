"""lrnnx's LRU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from spyx.ops.dtypes import to_complex, widen

from ...core.discretization import Reference
from ...random import default_rngs
from .base import LTI_LRNN, System


class LRU(LTI_LRNN):
    """Linear Recurrent Unit: (B, L, H) -> (B, L, H).

    Args:
        d_model: width H.
        d_state: number N of complex states.
        r_min, r_max: at initialisation |Lambda|^2 is uniform in [r_min^2, r_max^2].
        max_phase: at initialisation the phase is uniform in [0, max_phase], in radians.
        reference: "lrnnx" or "paper"; the two agree for this class.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: nu_log, theta_log, gamma_log (N,); B_re, B_im (N, H); C_re, C_im (H, N); D (H,).

    Raises:
        ValueError: unknown reference, a size that is not a positive integer, not 0 <= r_min <= r_max <= 1.

    Source: Orvieto et al. 2023 (arXiv:2303.06349); lrnnx 1.0.0 `lrnnx.models.lti.LRU`.
    """

    _cache_names = ("Lambda", "B_norm", "C_complex")

    def __init__(
        self,
        d_model: int,
        d_state: int,
        r_min: float = 0,
        r_max: float = 1,
        max_phase: float = 2 * math.pi,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state)
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"LRU: need 0 <= r_min <= r_max <= 1, got r_min={r_min}, r_max={r_max}")
        if not max_phase > 0:
            raise ValueError(f"LRU: max_phase must be positive, got {max_phase}")
        self.d_model, self.d_state = d_model, d_state
        self._init_parameters(default_rngs(rngs), r_min, r_max, max_phase)

    def _init_parameters(self, rngs: nnx.Rngs, r_min: float, r_max: float, max_phase: float) -> None:
        H, N = self.d_model, self.d_state
        tiny = jnp.finfo(jnp.float32).tiny

        def normal(*shape: int) -> Array:
            return jax.random.normal(rngs.params(), shape)

        radius_squared = jax.random.uniform(rngs.params(), (N,)) * (r_max**2 - r_min**2) + r_min**2
        nu = -0.5 * jnp.log(jnp.clip(radius_squared, tiny, 1 - 2.0**-24))
        self.nu_log = self._param(jnp.log(nu))
        self.theta_log = self._param(jnp.log(max_phase * jax.random.uniform(rngs.params(), (N,), minval=tiny)))
        self.gamma_log = self._param(0.5 * jnp.log(-jnp.expm1(-2 * nu)))
        self.B_re = self._param(normal(N, H) / math.sqrt(2 * H))
        self.B_im = self._param(normal(N, H) / math.sqrt(2 * H))
        self.C_re = self._param(normal(H, N) / math.sqrt(N))
        self.C_im = self._param(normal(H, N) / math.sqrt(N))
        self.D = self._param(normal(H))

    def discretize(self) -> System:
        """(Lambda (N,), B (N, H) before normalisation, C (H, N)), complex."""
        nu, theta = jnp.exp(widen(self.nu_log[...])), jnp.exp(widen(self.theta_log[...]))
        B, C = to_complex(self.B_re[...], self.B_im[...]), to_complex(self.C_re[...], self.C_im[...])
        return jnp.exp(to_complex(-nu, theta)), B, C

    def compute_kernel(
        self, L: int, Lambda: Complex[Array, " N"], B: Complex[Array, "N H"]
    ) -> tuple[Complex[Array, "N L"], Complex[Array, "N H"]]:
        """(K (N, L) = Lambda^0 ... Lambda^(L-1), B_norm (N, H) = exp(gamma_log) B)."""
        gamma = jnp.exp(widen(self.gamma_log[...]))
        return Lambda[:, None] ** jnp.arange(L), gamma[:, None] * B

    def _system(self) -> System:
        Lambda, B, C = self.discretize()
        return Lambda, self.compute_kernel(0, Lambda, B)[1], C

    def _feedthrough(self) -> Float[Array, " H"]:
        return self.D[...]
