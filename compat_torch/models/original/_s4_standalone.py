"""The standalone S4D of state-spaces/s4."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spyx.ops.dtypes import to_complex, widen

from ...core.layers import symmetric_uniform
from ...random import default_rngs
from ..lti import _s4_diagonal as diagonal
from ..lti._s4_kernels import DiagonalKernel, registrar
from ..lti._s4_layer import Activations, S4Layer
from ..lti._s4_parameters import initial_dt


class S4DKernel(DiagonalKernel):
    """C (H, n, 2), log_dt (H,), log_A_real, A_imag (H, n): A = -exp(log_A_real) + i A_imag, B = 1, under ZOH."""

    disc = "zoh"

    def __init__(self, owner: str, H: int, n: int, dt_min, dt_max, lr: float | None, param_dtype, precision, rngs):
        self.owner, self.precision = owner, precision
        register = registrar(owner, lr, 0.0, ("dt", "A"), param_dtype)
        C = jax.random.normal(rngs.params(), (H, n), complex)
        self.C = register("C", jnp.stack([C.real, C.imag], -1))
        log_dt = initial_dt(
            H, n, dt_min=dt_min, dt_max=dt_max, dt_tie=True, dt_transform="exp", dt_fast=False, deterministic=False,
            as_its_own_logarithm=False, key=rngs.params(),
        )  # fmt: skip
        self.log_dt = register("dt", log_dt[:, 0])
        self.log_A_real = register("A", jnp.full((H, n), math.log(0.5)))
        self.A_imag = register("A", jnp.broadcast_to(math.pi * jnp.arange(n), (H, n)))

    def continuous(self, rate: float = 1.0) -> diagonal.Continuous:
        dt = rate * jnp.exp(widen(self.log_dt[...]))[:, None]
        A = to_complex(-jnp.exp(widen(self.log_A_real[...])), widen(self.A_imag[...]))
        C = self.C[...]
        return diagonal.Continuous(dt, A, jnp.ones_like(A), to_complex(C[..., 0], C[..., 1])[None])


class S4D(S4Layer):
    """The standalone S4D: (B, H, L) -> ((B, H, L), state).

    h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) + D u_t for every channel, under zero-order hold with B = 1; then
    GELU, dropout, a linear layer to 2 H channels and a gated linear unit.

    Args:
        d_model: width H.
        d_state: real states of each channel, at least 2; n = d_state // 2 are stored, one of each conjugate pair.
        dropout: rate, one mask for all steps.
        transposed: the layout of x and y is (B, H, L) rather than (B, L, H).
        dt_min, dt_max: dt starts log-uniform in [dt_min, dt_max], in the time unit of A.
        lr: learning rate of log_dt, log_A_real and A_imag; 0 makes them buffers. Their weight decay is 0. Both are
            metadata, see `compat_torch.optim`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: D (H,), kernel.C (H, n, 2), kernel.log_dt (H,), kernel.log_A_real, kernel.A_imag (H, n),
    output_linear.0.weight (2 H, H, 1) and bias (2 H,). Cache: lrnn_state (B, H, n).

    The reference has neither `lengths`, state nor step.

    Raises:
        ValueError: an argument out of range; it is named.

    Source: S4D (arXiv:2206.11893); state-spaces/s4 `models/s4/s4d.py`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float = 0.0,
        transposed: bool = True,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr: float | None = None,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        acts = Activations("gelu", None, None, "glu")
        self._set_up(d_model, d_state, acts, transposed=transposed, dropout=dropout, tie_dropout=True)
        self._check_pairs(d_state)
        rngs = default_rngs(rngs)
        self.D = self._param(jax.random.normal(rngs.params(), (d_model,)))
        n = d_state // 2
        self.kernel = S4DKernel(self._name, d_model, n, dt_min, dt_max, lr, self.param_dtype, precision, rngs)
        self.output_linear = nnx.List([_pointwise(d_model, 2 * d_model, self.param_dtype, precision, rngs)])

    @property
    def d_output(self) -> int:
        """Width of the output."""
        return self.d_model

    @property
    def _ssm(self) -> S4DKernel:
        return self.kernel

    @property
    def _skip(self) -> Float[Array, "1 H"]:
        return self.D[...][None]


def _pointwise(in_features: int, out_features: int, param_dtype: DTypeLike, precision: Any, rngs: nnx.Rngs) -> nnx.Conv:
    """`torch.nn.Conv1d(in_features, out_features, 1)`."""
    init = symmetric_uniform(in_features**-0.5)
    return nnx.Conv(
        in_features, out_features, (1,), kernel_init=init, bias_init=init, param_dtype=param_dtype,
        precision=precision, rngs=rngs,
    )  # fmt: skip
