"""lrnnx's S7."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops import _s7_native, linear_scan
from spyx.ops._undifferentiated import undifferentiated
from spyx.ops.dtypes import state_dtype, widen

from ...core.discretization import Reference
from ...core.layers import linear
from ...random import default_rngs
from ._kernels import may_fuse
from .base import LTV_LRNN, Cache

_BLOCK = 2**18  # elements of B_t or C_t alive at once, unless one row needs more


class S7(LTV_LRNN):
    """S7, in which everything but the projections depends on the input: (B, L, d_model) -> (B, L, d_model).

    With u = in_proj(x) and [A', B, C, D, b] = x_proj(u), for H = d_model and N = d_state: A_t = base_params + A'_t,
    A_bar_t = 1 - 1 / (A_t^2 + 1/2), h_t = A_bar_t h_{t-1} + B_t^T u_t + b_t, y_t = C_t h_t + D_t u_t; the output is
    x + sigmoid(gate_proj(gelu(y))) y: the layer adds its own residual. B_t and C_t are (H, N) matrices for every step:
    they are made in blocks of steps, forward and again backward, so that nothing of size (B, L, H, N) exists.

    Args:
        d_model: width H.
        d_state: number N of states.
        J: equal blocks of the HiPPO initialisation; divides d_state.
        use_fast_path, layer_idx, device: no effect (device: None or "cpu").
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
            base_params stays float32.
        reference: "lrnnx" or "paper"; for this class they are the same arithmetic.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, by the reference's names: base_params (N,), in_proj.weight (H, H), x_proj.weight (2 N + 2 H N + H, H)
    with rows [A' N | B (H, N) | C (H, N) | D H | b N], gate_proj.weight (H, H). base_params starts at the real part of
    the eigenvalues of HiPPO-LegS, which is -1/2 for all of them and every J: A_bar starts near -1/3, as in the
    reference. Cache: lrnn_state (B, N), seqlen_offset (B,).

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: forward leaves the cache as it is; a second
    forward with it is a step that drops all but one input; `lengths` and `integration_timesteps` have no effect (here
    the latter raises).

    Raises:
        ValueError: a size that is not a positive integer, J that does not divide d_state, unknown reference or device.

    Source: S7 (arXiv:2410.03464); lrnnx 1.0.0 `lrnnx.models.ltv.S7`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        J: int = 1,
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
        self._check_sizes(d_model=d_model, d_state=d_state, J=J)
        if d_state % J:
            raise ValueError(f"S7: J must divide d_state = {d_state}, got {J}")
        self.d_model, self.d_state, self.J = d_model, d_state, J
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

        rngs = default_rngs(rngs)
        H, N = d_model, d_state
        common = {"bias": False, "param_dtype": self.param_dtype, "precision": precision, "rngs": rngs}
        wide = widen(jnp.zeros((), self.param_dtype)).dtype
        self.base_params = nnx.Param(jnp.full((N,), -0.5, wide))
        self.in_proj = linear(H, H, **common)
        self.x_proj = linear(H, 2 * N + 2 * H * N + H, **common)
        weight = 0.02 * jax.random.normal(rngs.params(), self.x_proj.kernel.shape)
        self.x_proj.kernel.set_value(weight.astype(self.param_dtype))
        self.gate_proj = linear(H, H, **common)

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        h0 = None if state is None else state["lrnn_state"]
        if may_fuse(x.shape[0], self.in_proj, self.x_proj, self.gate_proj):
            graph, params = nnx.split(self)
            y, last = _compute(graph, (params, x, h0), lengths)
        else:
            y, last = self._outputs(x, h0, lengths)
        return y, {"lrnn_state": last}

    def _outputs(
        self, x: Float[Array, "L B H"], h0: Float[Array, "B N"] | None, lengths: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "L B H"], Float[Array, "B N"]]:
        H, N = self.d_model, self.d_state
        u = self.in_proj(x)
        to_A, to_B, to_C, to_D, to_bias = self._cut(self.x_proj.kernel[...])
        real = state_dtype(u, self.base_params[...])
        dot = partial(jnp.einsum, precision=self.precision, preferred_element_type=real)

        def drive(u: Float[Array, "B H"]) -> Float[Array, "B N"]:
            return dot("bhn,bh->bn", dot("bk,kj->bj", u, to_B).reshape(-1, H, N), u.astype(real))

        def read_out(u: Float[Array, "B H"], h: Float[Array, "B N"]) -> Float[Array, "B H"]:
            return dot("bhn,bn->bh", dot("bk,kj->bj", u, to_C).reshape(-1, H, N), h)

        decay = self._decay(dot("lbk,kn->lbn", u, to_A))
        inputs = _in_blocks(drive, _BLOCK // (H * N), u) + dot("lbk,kn->lbn", u, to_bias)
        h, last = linear_scan(decay, inputs, h0, lengths=lengths)
        y = _in_blocks(read_out, _BLOCK // (H * N), u, h) + dot("lbk,kh->lbh", u, to_D) * u
        return self._leave(x, y), last

    def _update(
        self, x: Float[Array, "B H"], timesteps: Float[Array, " B"] | None, state: Cache
    ) -> tuple[Float[Array, "B H"], Cache]:
        u = self.in_proj(x)
        dot = partial(jnp.einsum, precision=self.precision)
        made = dot("bk,kj->bj", u, self.x_proj.kernel[...], preferred_element_type=state["lrnn_state"].dtype)
        A, B, C, D, bias = self._cut(made)
        shape = (-1, self.d_model, self.d_state)
        h = self._decay(A) * state["lrnn_state"] + dot("bhn,bh->bn", B.reshape(shape), u.astype(made.dtype)) + bias
        y = dot("bhn,bn->bh", C.reshape(shape), h) + D * u
        return self._leave(x, y), {"lrnn_state": h}

    def _cut(self, made: Float[Array, "B J"]) -> list[Float[Array, "B _"]]:
        """The columns for A, B, C, D and the bias."""
        H, N = self.d_model, self.d_state
        return jnp.split(made, (N, N + H * N, N + 2 * H * N, N + 2 * H * N + H), axis=1)

    def _decay(self, A: Float[Array, "*L B N"]) -> Float[Array, "*L B N"]:
        A = self.base_params[...] + A
        return 1 - 1 / (A * A + 0.5)

    def _leave(self, x: Float[Array, "*L B H"], y: Float[Array, "*L B H"]) -> Float[Array, "*L B H"]:
        return x + jax.nn.sigmoid(self.gate_proj(jax.nn.gelu(y, approximate=False))) * y

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        return {"lrnn_state": jnp.zeros((batch_size, self.d_state), widen(jnp.zeros((), dtype)).dtype)}


def _in_blocks(f, size: int, *arrays: Float[Array, "L B *_"]) -> Float[Array, "L B *_"]:
    """`f` of all rows (L B, ...), `size` of them at a time; what it makes on the way the backward pass makes again."""
    L, B = arrays[0].shape[:2]
    rows = [array.reshape(L * B, *array.shape[2:]) for array in arrays]
    one, size = jax.checkpoint(f), max(1, size)
    whole = L * B // size if size < L * B else 0
    parts = [one(*(array[whole * size :] for array in rows))]
    if whole:
        blocks = [array[: whole * size].reshape(whole, size, *array.shape[1:]) for array in rows]
        done = jax.lax.map(lambda block: one(*block), blocks)
        parts.insert(0, done.reshape(whole * size, *done.shape[2:]))
    return jnp.concatenate(parts).reshape(L, B, *parts[0].shape[1:])


def _in_jax(graph, values, lengths):
    params, x, h0 = values
    return nnx.merge(graph, params)._outputs(x, h0, lengths)


def _in_kernel(graph, values, lengths):
    params, x, h0 = values
    layer = nnx.merge(graph, params)
    W_in, W, W_gate = (p.kernel[...] for p in (layer.in_proj, layer.x_proj, layer.gate_proj))
    base = layer.base_params[...]
    if not _s7_native.fits(x, W_in, W, W_gate, base, *(() if h0 is None else (h0,))):
        return layer._outputs(x, h0, lengths)
    return _s7_native.forward(x, W_in, W, W_gate, base, h0, lengths)


_compute = undifferentiated("s7", _in_jax, _in_kernel)
