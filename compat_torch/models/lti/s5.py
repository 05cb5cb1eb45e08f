"""lrnnx's LTI S5."""

from __future__ import annotations

import math
import warnings
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from spyx.ops import zoh
from spyx.ops.dtypes import to_complex, widen

from ...core.discretization import DISCRETIZE_FNS, Discretization, Reference, bilinear
from ...errors import ReferenceDefectWarning
from ...random import default_rngs
from .base import LTI_LRNN, System


class S5(LTI_LRNN):
    """S5 with a diagonal state matrix: (B, L, H) -> (B, L, H).

    Args:
        d_model: width H.
        d_state: number N of states; with `conj_sym` half of them are stored (N must be even).
        discretization: "zoh", "bilinear", "dirac" or "no_discretization".
        conj_sym: the states are conjugate pairs: one of each is stored and the output is doubled. The
            reference declares the argument and raises NotImplementedError.
        reference: which arithmetic, see the table.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, with n = N or N / 2: A (n, 2) = [softplus^-1(-Re), Im], B (n, H), log_dt (n,), C (H, n, 2),
    D (H, H) applied as x @ D.

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | bilinear | signs swapped: abs(A_bar) > 1, the output grows with L (one warning) | Tustin's method |
    | no_discretization | the continuous A is used as A_bar: the output overflows (one warning) | \
A = [Re, Im] of the discrete eigenvalue itself, at first that of the ZOH layer |

    Raises:
        ValueError: unknown discretization or reference, a size that is not a positive integer, odd d_state
            with `conj_sym`; "async", which needs time-varying steps.

    Source: S5 (arXiv:2208.04933); lrnnx 1.0.0 `lrnnx.models.lti.S5`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        discretization: Discretization,
        conj_sym: bool = False,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state)
        if discretization not in get_args(Discretization):
            hint = "; for event streams use compat_torch.models.ltv" if discretization == "async" else ""
            raise ValueError(
                f"S5: discretization must be one of {get_args(Discretization)}, got {discretization!r}{hint}"
            )
        if conj_sym and d_state % 2:
            raise ValueError(f"S5: conj_sym=True stores one state of each pair, so d_state must be even, got {d_state}")
        if reference == "lrnnx" and discretization in ("bilinear", "no_discretization"):
            warnings.warn(
                f'S5 with discretization="{discretization}" and reference="lrnnx" is unstable, as in lrnnx 1.0.0: '
                'the output grows with the length. reference="paper" is the published method.',
                ReferenceDefectWarning,
                stacklevel=2,
            )
        self.d_model, self.d_state = d_model, d_state
        self.discretization, self.conj_sym = discretization, bool(conj_sym)
        self._init_parameters(default_rngs(rngs))

    def _init_parameters(self, rngs: nnx.Rngs) -> None:
        H, N = self.d_model, self._n_states
        re, im = jnp.full((N,), -0.5), math.pi * jnp.arange(N)
        log_dt = jnp.linspace(math.log(0.001), math.log(0.1), N)
        if self._discrete:
            first = zoh(to_complex(re, im), jnp.exp(log_dt))[0]
            self.A = self._param(jnp.stack([first.real, first.imag], -1))
        else:
            self.A = self._param(jnp.stack([jnp.log(jnp.expm1(-re)), im], -1))
        self.B = self._param(jnp.full((N, H), H**-0.5))
        self.log_dt = self._param(log_dt)
        self.C = self._param(jax.random.normal(rngs.params(), (H, N, 2)) * math.sqrt(2 / N))
        self.D = self._param(jax.random.normal(rngs.params(), (H, H)) * math.sqrt(2 / H))

    @property
    def _discrete(self) -> bool:
        return self.discretization == "no_discretization" and self.reference == "paper"

    def discretize(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"] | float, Complex[Array, "H N"]]:
        """(A_bar (n,), gamma_bar (n,) or the float 1.0, C (H, n)), complex."""
        A, C, dt = widen(self.A[...]), self.C[...], jnp.exp(widen(self.log_dt[...]))
        eigenvalues = to_complex(A[:, 0] if self._discrete else -jax.nn.softplus(A[:, 0]), A[:, 1])
        if self.discretization == "bilinear":
            A_bar, gamma_bar = bilinear(eigenvalues, dt, reference=self.reference)
        else:
            A_bar, gamma_bar = DISCRETIZE_FNS[self.discretization](eigenvalues, dt)
        return A_bar, gamma_bar, to_complex(C[..., 0], C[..., 1])

    def compute_kernel(
        self, L: int, A_bar: Complex[Array, " N"], gamma_bar: Complex[Array, " N"] | float
    ) -> tuple[Complex[Array, "N L"], Complex[Array, "N H"]]:
        """(A_power (n, L) = A_bar^0 ... A_bar^(L-1), B_bar (n, H) = gamma_bar B)."""
        B = widen(self.B[...])
        gamma_bar = jnp.asarray(gamma_bar)
        B_bar = gamma_bar * B if gamma_bar.ndim == 0 else gamma_bar[:, None] * B
        return A_bar[:, None] ** jnp.arange(L), B_bar.astype(A_bar.dtype)

    def _system(self) -> System:
        A_bar, gamma_bar, C = self.discretize()
        return A_bar, self.compute_kernel(0, A_bar, gamma_bar)[1], C

    def _feedthrough(self) -> Float[Array, "H H"]:
        return self.D[...].T
