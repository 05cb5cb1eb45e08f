"""The parameters of s5-pytorch's layer and what they start from."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from spyx.ops.dtypes import to_complex, widen
from spyx.ops.hippo import block_normal_form

from ...utils.init import init_CV, init_log_steps, init_VinvB

Initialization = Literal["dense", "dense_columns", "complex_normal", "factorized"]

# s5-pytorch multiplies by the standard deviation of a normal cut off at 2 where Flax divides by it.
_SHRINK = 0.87962566103423978**4


def _truncated(scale: float = 1.0, **axes: Any) -> initializers.Initializer:
    return initializers.variance_scaling(scale * _SHRINK, "fan_in", "truncated_normal", **axes)


_by_first_axis = _truncated(0.5, in_axis=0, out_axis=1, batch_axis=2)


class SSM(nnx.Module):
    """What a checkpoint of s5-pytorch has under `seq`; see `S5`."""

    def __init__(
        self,
        width: int,
        state_width: int,
        *,
        factor_rank: int | None,
        block_count: int,
        dt_min: float,
        dt_max: float,
        bidir: bool,
        bcInit: Initialization,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        H, P, columns = width, state_width, 2 * state_width if bidir else state_width
        self._init: Initialization = bcInit

        def real(value) -> nnx.Param:
            return nnx.Param(jnp.asarray(value, param_dtype))

        def in_parts(value) -> nnx.Param:
            return nnx.Param(jnp.asarray(value, param_dtype), is_complex=True)

        def factor(*shape: int) -> nnx.Param:
            return in_parts(_by_first_axis(rngs.params(), (*shape, 2)))

        eigenvalues, V = block_normal_form(P, block_count)
        self.Lambda = in_parts(jnp.stack([np.real(eigenvalues), np.imag(eigenvalues)], -1))
        if bcInit == "factorized":
            rank = factor_rank or 0
            self.BH, self.BP = factor(H, rank), factor(P, rank)
            self.CH, self.CP = factor(rank, H), factor(rank, columns)
        else:
            if bcInit == "complex_normal":
                C = 0.5 * jax.random.normal(rngs.params(), (H, columns, 2))
            else:
                draw = _by_first_axis if bcInit == "dense_columns" else _truncated()
                C = jnp.concatenate([init_CV(V, P, H, draw=draw, rngs=rngs) for _ in range(columns // P)], 1)
            self.C = in_parts(C)
            self.B = real(init_VinvB(V.conj().T, P, H, draw=_truncated(), rngs=rngs))
        self.D = real(jax.random.uniform(rngs.params(), (H,)))
        self.log_step = real(init_log_steps(P, dt_min, dt_max, rngs=rngs))

    def system(
        self, precision: jax.lax.PrecisionLike
    ) -> tuple[Complex[Array, " P"], Complex[Array, "P H"], Complex[Array, "H C"], Float[Array, " P"]]:
        """(Lambda (P,), B (P, H), C (H, P), or (H, 2 P) if bidirectional, dt (P,)): continuous."""

        def whole(param: nnx.Param) -> Complex[Array, "..."]:
            return to_complex(param[..., 0], param[..., 1])

        dt = jnp.exp(widen(self.log_step[...]))
        if self._init != "factorized":
            return whole(self.Lambda), whole(self.B), whole(self.C), dt
        BH, BP, CH, CP = map(whole, (self.BH, self.BP, self.CH, self.CP))
        B, C = (jnp.matmul(left, right, precision=precision) for left, right in ((BP, BH.T), (CH.T, CP)))
        return whole(self.Lambda), B, C, dt
