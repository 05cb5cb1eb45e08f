"""Mamba's mixer, and lrnnx's Mamba, which has an event mode besides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops import _mamba_native, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from spyx.ops._projections import fits
from spyx.ops._undifferentiated import undifferentiated
from spyx.ops.dtypes import widen
from spyx.ops.selective import Discretization

from ...core.discretization import Reference
from ...core.layers import bias_of, depthwise_conv, linear, taps
from ...core.variables import hint
from ...random import default_rngs
from ...state import IncompatibleKeys
from ._kernels import may_fuse
from .base import LTV_LRNN, Cache


class MambaMixer(LTV_LRNN):
    """A selective state-space block: (B, L, d_model) -> (B, L, d_model); see `Mamba`.

    Args:
        d_model: width of input and output.
        d_inner: channels of the recurrence.
        d_state: number N of states of each channel.
        d_conv: taps K of the causal convolution.
        dt_rank: width R of the input of dt_proj.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias, discretization: see `Mamba`.
        norm_eps: if not None, r, B and C are divided by their root mean square, with this under the root (Falcon).
        event_mode: have dtA_proj and take integration_timesteps.
        precision, dtype, param_dtype, rngs: see `Mamba`.

    Raises:
        ValueError: see `Mamba`.

    Source: Mamba (arXiv:2312.00752); norms: Falcon Mamba (arXiv:2410.05355).
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        discretization: Discretization = "mamba",
        norm_eps: float | None = None,
        event_mode: bool = False,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_inner=d_inner, dt_rank=dt_rank)
        self._check_choice("discretization", discretization, get_args(Discretization))
        self._check_choice("dt_init", dt_init, ("random", "constant"))
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_model, d_inner, d_state, d_conv, dt_rank
        self.discretization: Discretization = discretization
        self.norm_eps, self._event_mode = norm_eps, event_mode

        rngs = default_rngs(rngs)
        common = {"param_dtype": self.param_dtype, "precision": precision, "rngs": rngs}
        self.in_proj = linear(d_model, 2 * d_inner, bias=bias, **common)
        self.conv1d = depthwise_conv(d_inner, d_conv, bias=conv_bias, **common)
        self.x_proj = linear(d_inner, dt_rank + 2 * d_state, bias=False, **common)
        self.dt_proj = linear(dt_rank, d_inner, **common)
        if event_mode:
            self.dtA_proj = linear(dt_rank, d_inner, **common)
        bound = dt_scale * dt_rank**-0.5
        shape = (dt_rank, d_inner)
        uniform = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        weight = uniform if dt_init == "random" else jnp.full(shape, bound)
        self.dt_proj.kernel.set_value(weight.astype(self.param_dtype))
        dt_bias = initial_dt_bias(d_inner, dt_min, dt_max, dt_init_floor, self._name, rngs)
        hint(bias_of(self.dt_proj), no_reinit=True).set_value(dt_bias.astype(self.param_dtype))
        wide = widen(jnp.zeros((), self.param_dtype)).dtype
        A = jnp.broadcast_to(jnp.arange(1, d_state + 1, dtype=wide), (d_inner, d_state))
        self.A_log = hint(nnx.Param(jnp.log(A)), no_weight_decay=True)
        self.D = hint(nnx.Param(jnp.ones((d_inner,), wide)), no_weight_decay=True)
        self.out_proj = linear(d_inner, d_model, bias=bias, **common)

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        before = None if state is None else (state["conv_state"], state["lrnn_state"])
        plain = timesteps is None and self.discretization == "mamba"
        if plain and may_fuse(x.shape[0], *self._projections()):
            graph, params = nnx.split(self)
            y, conv_state, h = _compute(graph, (params, x, before), lengths)
        else:
            y, conv_state, h = self._outputs(x, timesteps, before, lengths)
        return y, {"conv_state": conv_state, "lrnn_state": h}

    def _outputs(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        before: tuple[Float[Array, "B D K"], Float[Array, "B D N"]] | None,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "L B H"], Float[Array, "B D K"], Float[Array, "B D N"]]:
        conv_state, h0 = before or (None, None)
        u, z = jnp.split(self.in_proj(x), 2, -1)
        u, conv_state = causal_conv1d(
            u, *taps(self.conv1d), conv_state, activation="silu", lengths=lengths, return_state=True
        )
        system, options = self._system(u, timesteps)
        y, h = selective_scan(u, *system, self.D[...], z, **options, h0=h0, lengths=lengths, return_state=True)
        return self.out_proj(y), conv_state, h

    def _projections(self) -> list[nnx.Linear]:
        return [self.in_proj, self.x_proj, self.dt_proj, self.out_proj]

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        u, z = jnp.split(self.in_proj(x), 2, -1)
        u, conv_state = causal_conv1d_update(u, state["conv_state"], *taps(self.conv1d), activation="silu")
        system, options = self._system(u, timesteps)
        y, h = selective_state_update(state["lrnn_state"], u, *system, self.D[...], z, **options)
        return self.out_proj(y), {"conv_state": conv_state, "lrnn_state": h}

    def _system(
        self, u: Float[Array, "*L B D"], timesteps: Array | None
    ) -> tuple[tuple[Array, Array, Array, Array], dict[str, Any]]:
        """(dt, A, B, C) and the options of the scan, from the convolved input."""
        R, N = self.dt_rank, self.d_state
        r, B, C = jnp.split(self.x_proj(u), [R, R + N], -1)
        if self.norm_eps is not None:
            r, B, C = (_unit_rms(v, self.norm_eps) for v in (r, B, C))
        options: dict[str, Any] = {"dt_softplus": True, "discretization": self.discretization}
        if timesteps is not None:
            options["dt_A"] = timesteps[..., None] * jax.nn.softplus(widen(bias_of(self.dtA_proj)[...]))
        return (self.dt_proj(r), -jnp.exp(widen(self.A_log[...])), B, C), options

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        state = jnp.zeros((batch_size, self.d_inner, self.d_state), widen(jnp.zeros((), dtype)).dtype)
        return {"conv_state": jnp.zeros((batch_size, self.d_inner, self.d_conv), dtype), "lrnn_state": state}


class Mamba(MambaMixer):
    """Mamba, a selective state-space block: (B, L, d_model) -> (B, L, d_model).

    With u = silu(conv1d(x)) for [x, z] = in_proj(input), and [r, B, C] = x_proj(u): h_t = A_bar_t h_{t-1} +
    gamma_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t), output out_proj(y); A = -exp(A_log) and
    dt = softplus(dt_proj(r)). For A_bar and gamma see `spyx.ops.selective_scan`. In event mode (a call with
    `integration_timesteps`) A_bar has the step integration_timesteps * softplus(dtA_proj.bias), gamma keeps dt.

    Args:
        d_model: width of input and output.
        d_state: number N of states of each channel.
        d_conv: taps K of the causal convolution.
        expand: d_inner = int(expand * d_model).
        dt_rank: width R of the input of dt_proj; "auto" is ceil(d_model / 16).
        dt_min, dt_max: softplus(dt_proj.bias) starts log-uniform in [dt_min, dt_max], not below `dt_init_floor`.
        dt_init: "random" (dt_proj.weight uniform within dt_scale / sqrt(R)) or "constant" (equal to it).
        dt_scale, dt_init_floor: see above.
        conv_bias: bias of the convolution.
        bias: bias of in_proj and out_proj.
        use_fast_path, layer_idx, device: no effect (device: None or "cpu").
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
            A_log and D stay float32.
        discretization: "mamba", "zoh", "bilinear" or "dirac".
        reference: "lrnnx" or "paper"; for this class they are the same arithmetic.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by the reference's names: in_proj.weight (2 d_inner, d_model), conv1d.weight (d_inner, 1, K),
    conv1d.bias, x_proj.weight (R + 2 N, d_inner), dt_proj and dtA_proj .weight (d_inner, R) and .bias, A_log
    (d_inner, N), D (d_inner,), out_proj.weight (d_model, d_inner). Cache: conv_state (B, d_inner, K), lrnn_state
    (B, d_inner, N), seqlen_offset (B,).

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: its step uses exp(dt A) for
    "bilinear" and "mamba" for an unknown discretization; a second forward with the cache is a step that drops all
    but one input; forward does not advance seqlen_offset; `lengths` has no effect.

    Raises:
        ValueError: unknown discretization, dt_init, reference or device; a size that is not a positive integer; not
            0 < dt_min <= dt_max.

    Source: Mamba (arXiv:2312.00752), STREAM (arXiv:2411.12603) for event mode; lrnnx 1.0.0
    `lrnnx.models.ltv.Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: DTypeLike | None = None,
        discretization: Discretization = "mamba",
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        self._check_device(device)
        super().__init__(
            d_model, int(expand * d_model), d_state, d_conv, math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale, dt_init_floor=dt_init_floor,
            conv_bias=conv_bias, bias=bias, discretization=discretization, event_mode=True,
            reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.expand = expand
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, dtype: DTypeLike | None = None
    ) -> IncompatibleKeys:
        """Load the reference's state_dict, all or nothing; see `compat_torch.load_state_dict`.

        A checkpoint without `dtA_proj`, as the original Mamba writes, is complete: event mode then starts from the
        values of `dt_proj`.
        """
        if not any(name.startswith("dtA_proj.") for name in state_dict):
            copies = {f"dtA_proj.{leaf}": state_dict.get(f"dt_proj.{leaf}") for leaf in ("weight", "bias")}
            state_dict = {**state_dict, **{name: value for name, value in copies.items() if value is not None}}
        return super().load_state_dict(state_dict, strict, dtype=dtype)


def _in_jax(graph, values, lengths):
    params, x, before = values
    return nnx.merge(graph, params)._outputs(x, None, before, lengths)


def _in_kernel(graph, values, lengths):
    params, x, before = values
    layer = nnx.merge(graph, params)
    projections = [(p.kernel[...], None if p.bias is None else p.bias[...]) for p in layer._projections()]
    weights, bias = taps(layer.conv1d)
    A, D = -jnp.exp(layer.A_log[...]), layer.D[...]
    if not fits(x, projections, weights, bias, A, D, *(before or ())):
        return layer._outputs(x, None, before, lengths)
    return _mamba_native.forward(x, projections, weights.T, bias, A, D, layer.norm_eps, before, lengths)


_compute = undifferentiated("mamba", _in_jax, _in_kernel)


def initial_dt_bias(
    size: int, dt_min: float, dt_max: float, floor: float, name: str, rngs: nnx.Rngs
) -> Float[Array, " size"]:
    """The inverse of softplus of step sizes log-uniform in [dt_min, dt_max], not below `floor`.

    Raises:
        ValueError: not 0 < dt_min <= dt_max; `name` is that of the layer.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"{name} needs 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")
    log_dt = jax.random.uniform(rngs.params(), (size,), minval=math.log(dt_min), maxval=math.log(dt_max))
    dt = jnp.maximum(jnp.exp(log_dt), floor)
    return dt + jnp.log(-jnp.expm1(-dt))


def _unit_rms(x: Float[Array, "*L N"], eps: float) -> Float[Array, "*L N"]:
    wide = widen(x)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)
