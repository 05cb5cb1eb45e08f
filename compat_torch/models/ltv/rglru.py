"""lrnnx's RG-LRU block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops import _rglru_native, causal_conv1d, linear_scan
from spyx.ops._projections import fits
from spyx.ops._undifferentiated import undifferentiated
from spyx.ops.dtypes import widen

from ...core.discretization import Reference
from ...core.layers import depthwise_conv, linear, taps
from ...core.variables import hint
from ...random import default_rngs
from ._kernels import may_fuse
from ._scanned import ScannedLTV
from .base import Cache


class RGLRU(ScannedLTV):
    """The recurrent block of Griffin, around a real-gated linear recurrent unit: (B, L, d_model) -> (B, L, d_model).

    With u = conv1d(in_proj(x)), r = sigmoid(recurrent_gate_proj(u)), i = sigmoid(input_gate_proj(u)) and
    a = sigmoid(a_log): a_t = a^(c r_t), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t; the output is
    out_proj(gelu(gate_proj(x)) h). One state per channel: nothing larger than (B, L, d_inner) exists.

    Args:
        d_model: width of input and output.
        d_conv: taps K of the causal convolution.
        expand: d_inner = int(expand * d_model).
        c: exponent of the recurrent gate, positive.
        a_init_range: (lo, hi), inside (0, 1); see the table.
        conv_bias: bias of the convolution.
        bias: bias of gate_proj, in_proj and out_proj.
        use_fast_path, layer_idx, device: no effect (device: None or "cpu").
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
        reference: which initial values, see the table; outputs for given parameters do not depend on it.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by the reference's names: gate_proj and in_proj .weight (d_inner, d_model), conv1d.weight
    (d_inner, 1, K), conv1d.bias, recurrent_gate_proj and input_gate_proj .weight (d_inner, d_inner) and .bias, a_log
    (d_inner, 1), out_proj.weight (d_model, d_inner). Cache: conv_state (B, d_inner, K), lrnn_state (B, d_inner, 1),
    seqlen_offset (B,).

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | a_init_range | exp(a_log) starts uniform in the range, so a = sigmoid(a_log) in [lo / (1 + lo), hi / (1 + hi)]: \
0.474 to 0.4997 by default | a starts uniform in the range |

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: a forward with a cache stores the outputs of
    the convolution in conv_state instead of its inputs, and does not advance seqlen_offset; a second one is a step
    that drops all but one input; `lengths` and `integration_timesteps` have no effect (here the latter raises).

    Raises:
        ValueError: a size that is not a positive integer; c not positive; a_init_range outside (0, 1); unknown
            reference or device.

    Source: Griffin (arXiv:2402.19427); lrnnx 1.0.0 `lrnnx.models.ltv.RGLRU`.
    """

    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        expand: float = 1,
        c: float = 8.0,
        a_init_range: tuple[float, float] = (0.9, 0.999),
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: DTypeLike | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_device(device)
        d_inner = int(expand * d_model)
        self._check_sizes(d_model=d_model, d_conv=d_conv, d_inner=d_inner)
        low, high = a_init_range
        if not 0 < low <= high < 1:
            raise ValueError(f"RGLRU: a_init_range must be (lo, hi) with 0 < lo <= hi < 1, got {a_init_range}")
        if not c > 0:
            raise ValueError(f"RGLRU: c must be positive, got {c}")
        self.d_model, self.d_conv, self.expand, self.d_inner, self.c = d_model, d_conv, expand, d_inner, float(c)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

        rngs = default_rngs(rngs)
        common = {"param_dtype": self.param_dtype, "precision": precision, "rngs": rngs}
        self.gate_proj = linear(d_model, d_inner, bias=bias, **common)
        self.in_proj = linear(d_model, d_inner, bias=bias, **common)
        self.conv1d = depthwise_conv(d_inner, d_conv, bias=conv_bias, **common)
        self.recurrent_gate_proj = linear(d_inner, d_inner, **common)
        self.input_gate_proj = linear(d_inner, d_inner, **common)
        a = jax.random.uniform(rngs.params(), (d_inner, 1), minval=low, maxval=high)
        a_log = jnp.log(a) if reference == "lrnnx" else jnp.log(a) - jnp.log1p(-a)
        self.a_log = hint(self._param(a_log), no_weight_decay=True)
        self.out_proj = linear(d_inner, d_model, bias=bias, **common)

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        before = None if state is None else (state["conv_state"], state["lrnn_state"][..., 0])
        if may_fuse(x.shape[0], *self._projections()):
            graph, params = nnx.split(self)
            y, conv_state, h = _compute(graph, (params, x, before), lengths)
        else:
            y, conv_state, h = self._outputs(x, before, lengths)
        return y, {"conv_state": conv_state, "lrnn_state": h[..., None]}

    def _outputs(
        self,
        x: Float[Array, "L B H"],
        before: tuple[Float[Array, "B D K"], Float[Array, "B D"]] | None,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "L B H"], Float[Array, "B D K"], Float[Array, "B D"]]:
        conv_state, h0 = before or (None, None)
        gate = jax.nn.gelu(self.gate_proj(x), approximate=False)
        u, conv_state = causal_conv1d(
            self.in_proj(x), *taps(self.conv1d), conv_state, lengths=lengths, return_state=True
        )
        recurrent, inputs = (jax.nn.sigmoid(widen(p(u))) for p in (self.recurrent_gate_proj, self.input_gate_proj))
        log_a = self.c * recurrent * jax.nn.log_sigmoid(widen(self.a_log[:, 0]))
        # the bound keeps the gradient finite where a_t is 1
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(log_a.dtype).tiny))
        h, last = linear_scan(jnp.exp(log_a), scale * inputs * widen(u), h0, lengths=lengths)
        return self.out_proj(gate * h.astype(gate.dtype)), conv_state, last

    def _projections(self) -> list[nnx.Linear]:
        return [self.gate_proj, self.in_proj, self.recurrent_gate_proj, self.input_gate_proj, self.out_proj]

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        state = jnp.zeros((batch_size, self.d_inner, 1), widen(jnp.zeros((), dtype)).dtype)
        return {"conv_state": jnp.zeros((batch_size, self.d_inner, self.d_conv), dtype), "lrnn_state": state}


def _in_jax(graph, values, lengths):
    params, x, before = values
    return nnx.merge(graph, params)._outputs(x, before, lengths)


def _in_kernel(graph, values, lengths):
    params, x, before = values
    layer = nnx.merge(graph, params)
    projections = [(p.kernel[...], None if p.bias is None else p.bias[...]) for p in layer._projections()]
    weights, bias = taps(layer.conv1d)
    if not fits(x, projections, weights, bias, layer.a_log[...], *(before or ())):
        return layer._outputs(x, before, lengths)
    return _rglru_native.forward(x, projections, weights.T, bias, layer.a_log[:, 0], layer.c, before, lengths)


_compute = undifferentiated("rglru", _in_jax, _in_kernel)
