"""Mamba-2's mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops import causal_conv1d, causal_conv1d_update
from spyx.ops.dtypes import widen
from spyx.ops.ssd import ssd, ssd_state_update

from ...core.layers import depthwise_conv, linear, taps
from ...core.variables import hint
from ...random import default_rngs
from .base import LTV_LRNN, Cache
from .mamba import initial_dt_bias

_INFINITY = float("inf")


class GatedRMSNorm(nnx.Module):
    """weight * v / rms(v) of v = y silu(z), the root mean square taken over each of some groups of channels."""

    def __init__(self, size: int, groups: int, eps: float, param_dtype: DTypeLike):
        self.groups, self.eps = groups, eps
        self.weight = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, y: Float[Array, "*L D"], z: Float[Array, "*L D"]) -> Float[Array, "*L D"]:
        """The gated norm, in the dtype of `z`."""
        v = (widen(y) * jax.nn.silu(widen(z))).reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)
        v = v * jax.lax.rsqrt(jnp.mean(v**2, -1, keepdims=True) + self.eps)
        return (v.reshape(y.shape) * self.weight[...]).astype(z.dtype)


class Mamba2(LTV_LRNN):
    """The block of Mamba-2: (B, L, d_model) -> (B, L, d_model).

    With [z0, x0, z, xBC, dt] = in_proj(input) and [x, B, C] = silu(conv1d(xBC)): y is the state-space dual scan
    `spyx.ops.ssd` of x with dt = clip(softplus(dt + dt_bias), dt_limit), A = -exp(A_log) and the feedthrough D; the
    output is out_proj([x0 silu(z0), norm(y silu(z))]). z0 and x0 have d_inner - d_ssm channels, none by default.

    Args:
        d_model: width of input and output.
        d_state: columns N of the state of each head.
        d_conv: taps K of the causal convolution.
        expand: d_inner = int(expand * d_model).
        headdim: channels P of each head.
        d_ssm: channels of the recurrence, a multiple of `headdim`, at most d_inner; None is d_inner.
        ngroups: groups of heads that share B, C and the norm's mean square.
        A_init_range: A starts uniform in minus this range.
        D_has_hdim: D is one number a channel, instead of one a head.
        dt_min, dt_max: softplus(dt_bias) starts log-uniform in [dt_min, dt_max], not below `dt_init_floor`.
        dt_init_floor: see above.
        dt_limit: lower and upper bound of dt, in calls and steps alike.
        bias: bias of in_proj and out_proj.
        conv_bias: bias of the convolution.
        chunk_size: steps per block of matrix products, see `spyx.ops.ssd`: speed and memory, not the result.
        norm_eps: of the gated norm.
        dtype: of the output; None is that of the input.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32. A_log, D and dt_bias start in float32 or wider.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, with H = d_ssm / P heads and W = d_ssm + 2 ngroups N: in_proj.weight (2 d_inner + 2 ngroups N + H,
    d_model), conv1d.weight (W, 1, K), conv1d.bias, dt_bias, A_log (H,), D (H,) or (d_ssm,), norm.weight (d_ssm,),
    out_proj.weight (d_model, d_inner). Cache: conv_state (B, W, K), lrnn_state (B, H, P, N), seqlen_offset (B,).

    Raises:
        ValueError: a size that is not a positive integer; d_ssm that is not made of heads, more than d_inner;
            heads that do not make `ngroups`; a range that does not ascend.

    Source: Mamba-2 (arXiv:2405.21060); state-spaces/mamba `Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, _INFINITY),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        norm_eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        d_inner = int(expand * d_model)
        d_ssm = d_inner if d_ssm is None else d_ssm
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "d_inner": d_inner, "headdim": headdim}
        self._check_sizes(**sizes, d_ssm=d_ssm, ngroups=ngroups, chunk_size=chunk_size)
        if d_ssm > d_inner or d_ssm % headdim or d_ssm // headdim % ngroups:
            raise ValueError(
                f"Mamba2: d_ssm must be at most d_inner = {d_inner} and made of heads of {headdim} channels in "
                f"{ngroups} equal groups, got d_ssm = {d_ssm}"
            )
        for name, (low, high) in {"A_init_range": A_init_range, "dt_limit": dt_limit}.items():
            if not 0 <= low <= high or (name == "A_init_range" and low == 0):
                raise ValueError(f"Mamba2: {name} must be positive and ascending, got {(low, high)}")
        self.d_model, self.d_state, self.d_conv, self.d_inner, self.d_ssm = d_model, d_state, d_conv, d_inner, d_ssm
        self.headdim, self.nheads, self.ngroups = headdim, d_ssm // headdim, ngroups
        self.dt_limit, self.chunk_size = (float(dt_limit[0]), float(dt_limit[1])), chunk_size
        self.D_has_hdim = D_has_hdim

        rngs = default_rngs(rngs)
        common = {"param_dtype": self.param_dtype, "precision": precision, "rngs": rngs}
        wide = widen(jnp.zeros((), self.param_dtype)).dtype
        self._conv_width = d_ssm + 2 * ngroups * d_state
        self.in_proj = linear(d_model, 2 * d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **common)
        self.conv1d = depthwise_conv(self._conv_width, d_conv, bias=conv_bias, **common)
        dt_bias = initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, self._name, rngs)
        self.dt_bias = hint(nnx.Param(dt_bias.astype(wide)), no_weight_decay=True)
        A = jax.random.uniform(rngs.params(), (self.nheads,), wide, *A_init_range)
        self.A_log = hint(nnx.Param(jnp.log(A)), no_weight_decay=True)
        self.D = hint(nnx.Param(jnp.ones((d_ssm if D_has_hdim else self.nheads,), wide)), no_weight_decay=True)
        self.norm = GatedRMSNorm(d_ssm, ngroups, norm_eps, self.param_dtype)
        self.out_proj = linear(d_inner, d_model, bias=bias, **common)

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        state = state or {}
        z0, x0, z, xBC, dt = self._split(x)
        xBC, conv_state = causal_conv1d(
            xBC, *taps(self.conv1d), state.get("conv_state"), activation="silu", lengths=lengths, return_state=True
        )
        (A, D), (u, B, C) = self._system(), self._heads(xBC)
        y, h = ssd(
            u, dt, A, B, C, D, None, self.dt_bias[...], True, chunk=self.chunk_size,
            h0=state.get("lrnn_state"), dt_limit=self.dt_limit, lengths=lengths, return_state=True,
            precision=self.precision,
        )  # fmt: skip
        return self._leave(y, z, z0, x0), {"conv_state": conv_state, "lrnn_state": h}

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        z0, x0, z, xBC, dt = self._split(x)
        xBC, conv_state = causal_conv1d_update(xBC, state["conv_state"], *taps(self.conv1d), activation="silu")
        (A, D), (u, B, C) = self._system(), self._heads(xBC)
        y, h = ssd_state_update(
            state["lrnn_state"], u, dt, A, B, C, D, None, self.dt_bias[...], True,
            dt_limit=self.dt_limit, precision=self.precision,
        )  # fmt: skip
        return self._leave(y, z, z0, x0), {"conv_state": conv_state, "lrnn_state": h}

    def _system(self) -> tuple[Float[Array, " H"], Float[Array, " H"] | Float[Array, "H P"]]:
        """(A, D)."""
        D = self.D[...]
        return -jnp.exp(widen(self.A_log[...])), D.reshape(self.nheads, self.headdim) if self.D_has_hdim else D

    def _split(self, x: Float[Array, "*L H"]) -> list[Array]:
        """[z0, x0, z, xBC, dt] of the input."""
        beside = self.d_inner - self.d_ssm
        ends = [beside, 2 * beside, 2 * beside + self.d_ssm, 2 * beside + self.d_ssm + self._conv_width]
        return jnp.split(self.in_proj(x), ends, -1)

    def _heads(self, xBC: Float[Array, "*L W"]) -> tuple[Array, Array, Array]:
        """x (..., H, P), and B and C (..., G, N), from the convolved input."""
        width = self.ngroups * self.d_state
        x, B, C = jnp.split(xBC, [self.d_ssm, self.d_ssm + width], -1)
        x = widen(x).reshape(*x.shape[:-1], self.nheads, self.headdim)
        B, C = (v.reshape(*v.shape[:-1], self.ngroups, self.d_state) for v in (B, C))
        return x, B, C

    def _leave(self, y: Float[Array, "*L H P"], z: Array, z0: Array, x0: Array) -> Float[Array, "*L H"]:
        y = self.norm(y.reshape(z.shape), z)
        if z0.shape[-1]:
            y = jnp.concatenate([jax.nn.silu(z0) * x0, y], -1)
        return self.out_proj(y)

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        state = jnp.zeros(shape, widen(jnp.zeros((), dtype)).dtype)
        return {"conv_state": jnp.zeros((batch_size, self._conv_width, self.d_conv), dtype), "lrnn_state": state}
