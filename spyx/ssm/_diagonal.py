"""What LRU and S5Diag share: everything but the parameterisation of (lam, B, C)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from ..ops import diagonal_ssm, diagonal_ssm_step
from ..ops.diagonal import Precision
from ._layer import Lengths, Reset, SequenceLayer

Matrices = tuple[Complex[Array, " N"], Complex[Array, "N H"], Complex[Array, "H N"]]


class DiagonalSSM(SequenceLayer):
    """h_t = lam h_{t-1} + B u_t, y_t = Re(C h_t) + D u_t, with `_complex_matrices()` from a subclass."""

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        use_skip: bool,
        reverse: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: Precision,
    ):
        super().__init__(reverse=reverse, dtype=dtype)
        self._check_sizes(d_model=d_model, d_state=d_state)
        self.d_model = d_model
        self.d_state = d_state
        self.use_skip = use_skip
        self.param_dtype = param_dtype
        self.precision = precision

    def _init_matrices(self, k_B: Array, k_C: Array, k_D: Array, gamma: Array | None = None) -> None:
        H, N, dtype = self.d_model, self.d_state, self.param_dtype
        scale = 1.0 / jnp.sqrt(2.0 * H)
        k_re, k_im = jax.random.split(k_B)
        B_re, B_im = (jax.random.normal(k, (N, H)) * scale for k in (k_re, k_im))
        if gamma is not None:
            B_re, B_im = B_re * gamma[:, None], B_im * gamma[:, None]
        self.B_re = nnx.Param(B_re.astype(dtype))
        self.B_im = nnx.Param(B_im.astype(dtype))
        scale = 1.0 / jnp.sqrt(2.0 * N)
        k_re, k_im = jax.random.split(k_C)
        self.C_re = nnx.Param((jax.random.normal(k_re, (H, N)) * scale).astype(dtype))
        self.C_im = nnx.Param((jax.random.normal(k_im, (H, N)) * scale).astype(dtype))
        self.D = nnx.Param(jax.random.normal(k_D, (H,)).astype(dtype)) if self.use_skip else None

    def _complex_matrices(self) -> Matrices:
        """The discrete system (lam (N,), B (N, H), C (H, N)), complex64 (complex128 for float64 parameters)."""
        raise NotImplementedError

    def _skip(self) -> Array | None:
        return None if self.D is None else self.D[...]

    def initial_state(self, batch_size: int) -> Complex[Array, "B N"]:
        """Zero state for `batch_size` rows: complex, shape (batch_size, d_state)."""
        return jnp.zeros((batch_size, self.d_state), jnp.result_type(self.C_re.dtype, jnp.complex64))

    def __call__(
        self,
        u: Float[Array, "T B H"],
        state: Complex[Array, "B N"] | None = None,
        *,
        return_state: bool = False,
        lengths: Lengths = None,
        reset: Reset = None,
    ) -> Any:
        """Run the layer over a time-major sequence.

        Args:
            u: real floating point, shape (T, B, d_model).
            state: state before the first step in scan direction, complex (B, d_state); None is zero.
            return_state: also return the last state computed.
            lengths: int (B,): valid steps of each row; outputs past them are 0 and the state returned
                is the one at the last valid step.
            reset: bool (T,) or (T, B): where true the state is cleared before that step.

        Returns:
            y of shape (T, B, d_model), in `dtype` or else the dtype of `u`; with `return_state`, `(y, state)`.

        Raises:
            ValueError: wrong rank or width. TypeError: wrong dtype.
        """
        u = self._input(u)
        lam, B, C = self._complex_matrices()
        return diagonal_ssm(
            u, lam, B, C, self._skip(), state,
            reverse=self.reverse, reset=reset, lengths=lengths,
            return_state=return_state, precision=self.precision,
        )  # fmt: skip

    def step(
        self, u_t: Float[Array, "B H"], state: Complex[Array, "B N"]
    ) -> tuple[Float[Array, "B H"], Complex[Array, "B N"]]:
        """One step: `(y_t, state)` from u_t (B, d_model) and the state (B, d_state) before it.

        Raises:
            ValueError: wrong rank or width, or the layer is reversed. TypeError: wrong dtype.
        """
        self._refuse_reversed_step()
        u_t = self._input(u_t, step=True)
        lam, B, C = self._complex_matrices()
        return diagonal_ssm_step(u_t, state, lam, B, C, self._skip(), precision=self.precision)
