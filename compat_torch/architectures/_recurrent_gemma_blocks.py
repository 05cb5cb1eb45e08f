"""The parts of RecurrentGemma: norm, recurrent block, local attention, MLP.

B rows, L tokens, H the width of the stream, D that of the recurrence, G heads of keys and values, E width of a head,
W the window.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from spyx.ops import causal_conv1d, linear_scan
from spyx.ops.dtypes import state_dtype, widen

from ..core.compiled import compiled
from ..core.layers import depthwise_conv, taps
from ..layers.mha import attention, rotate

Cache = dict[str, Array]

_STEEPEST_ROOT = 1000.0


class Norm(nnx.Module):
    """x / rms(x) * (1 + weight), computed in float32 or wider."""

    def __init__(self, width: int, eps: float, param_dtype: Any):
        self.eps, self.weight = eps, nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: Float[Array, "*L H"]) -> Float[Array, "*L H"]:
        """In the dtype of `x`."""
        wide = widen(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return (wide * (1 + widen(self.weight[...]))).astype(x.dtype)


class RGLRU(nnx.Module):
    """h_t = a_t h_{t-1} + m_t sigmoid(i_t) u_t with log a_t = -8 sigmoid(r_t) softplus(recurrent_param).

    i and r are products of u with a block for each head; m_t = sqrt(1 - a_t^2), and 1 at position 0.
    """

    def __init__(self, config: Any, *, param_dtype: Any, precision: Any, rngs: nnx.Rngs):
        D, heads = config.recurrent_width, config.num_attention_heads
        width = D // heads
        self.precision = precision
        draw = nnx.initializers.normal(math.sqrt(config.w_init_variance_scale / width))
        for name in ("input", "recurrent"):
            weight = nnx.Param(draw(rngs.params(), (heads, width, width), param_dtype))
            setattr(self, f"{name}_gate_weight", weight)
            setattr(self, f"{name}_gate_bias", nnx.Param(jnp.zeros((heads, width), param_dtype)))
        squared = jax.random.uniform(rngs.params(), (D,), minval=0.9**2 + 1e-8, maxval=0.999**2 + 1e-8)
        self.recurrent_param = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(squared))).astype(param_dtype))

    def __call__(self, u: Float[Array, "L B D"], position: Int[Array, "L B"], h0, lengths):
        """`(h, last)`: (L, B, D) and (B, D)."""
        i, r = (self._gate(u, name) for name in ("input", "recurrent"))
        log_a = -8 * r * jax.nn.softplus(widen(self.recurrent_param[...]))
        scale = jnp.where((position == 0)[..., None], 1, _root(-jnp.expm1(2 * log_a)))
        return linear_scan(jnp.exp(log_a), scale * i * widen(u), h0, lengths=lengths)

    def _gate(self, u: Float[Array, "L B D"], name: str) -> Float[Array, "L B D"]:
        weight, bias = getattr(self, f"{name}_gate_weight")[...], getattr(self, f"{name}_gate_bias")[...]
        heads = u.reshape(*u.shape[:2], *bias.shape)
        mixed = jnp.einsum("lbhi,hij->lbhj", heads, weight.astype(u.dtype), precision=self.precision)
        return jax.nn.sigmoid(widen(mixed + bias.astype(u.dtype))).reshape(u.shape)


@jax.custom_jvp
def _root(x: Array) -> Array:
    """sqrt with a derivative of at most 1000, as RecurrentGemma is trained with."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _root(x), dx / jnp.sqrt(jnp.maximum(4 * x, _STEEPEST_ROOT**-2))


class RecurrentBlock(nnx.Module):
    """linear_out(rg_lru(conv_1d(linear_x(x))) activation(linear_y(x))): (B, L, H) -> (B, L, H)."""

    def __init__(self, config: Any, *, param_dtype: Any, precision: Any, rngs: nnx.Rngs):
        H, D = config.hidden_size, config.recurrent_width
        common: dict[str, Any] = {"param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        self.activation = ACTIVATIONS[config.hidden_activation]
        self.linear_y = dense(H, D, H**-0.5, **common)
        self.linear_x = dense(H, D, H**-0.5, **common)
        self.linear_out = dense(D, H, math.sqrt(config.out_variance / D), **common)
        self.conv_1d = depthwise_conv(D, config.conv1d_width, **common)
        kernel, std = self.conv_1d.kernel, math.sqrt(config.w_init_variance_scale / config.conv1d_width)
        kernel.set_value(std * jax.random.normal(rngs.params(), kernel.shape, kernel.dtype))
        self.rg_lru = RGLRU(config, **common)

    def __call__(
        self, x: Float[Array, "B L H"], lengths: Int[Array, " B"] | None, cache: Cache | None
    ) -> tuple[Float[Array, "B L H"], Cache]:
        """`(y, cache)`; without one a cache that starts at position 0."""
        x = jnp.swapaxes(x, 0, 1)
        state = cache or {}
        offset = state.get("seqlen_offset", jnp.zeros(x.shape[1], jnp.int32))
        position = jnp.arange(x.shape[0])[:, None] + offset
        u, conv_state = causal_conv1d(
            self.linear_x(x), *taps(self.conv_1d), state.get("conv_state"), lengths=lengths, return_state=True
        )
        h, last = self.rg_lru(u, position, state.get("lrnn_state"), lengths)
        y = self.linear_out(h.astype(x.dtype) * self.activation(self.linear_y(x)))
        seen = offset + (x.shape[0] if lengths is None else jnp.clip(lengths, 0, x.shape[0]))
        after = {"conv_state": conv_state, "lrnn_state": last, "seqlen_offset": seen.astype(jnp.int32)}
        return jnp.swapaxes(y, 0, 1), after

    def allocate(self, batch: int, max_seqlen: int, dtype: Any) -> Cache:
        """conv_state (B, D, K), lrnn_state (B, D), seqlen_offset int32 (B,)."""
        K, _, D = self.conv_1d.kernel.shape
        wide = state_dtype(jnp.zeros((), dtype))
        return {
            "conv_state": jnp.zeros((batch, D, K), dtype),
            "lrnn_state": jnp.zeros((batch, D), wide),
            "seqlen_offset": jnp.zeros(batch, jnp.int32),
        }


class LocalAttention(nnx.Module):
    """Causal attention over the last W steps, with rotary positions: (B, L, H) -> (B, L, H).

    The cache is a ring: the key and value of position p are in slot p modulo its number of slots.
    """

    def __init__(self, config: Any, *, param_dtype: Any, precision: Any, rngs: nnx.Rngs):
        H, heads, G, E = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_width
        self.G, self.E, self.window, self.precision = G, E, config.attention_window_size, precision
        self.rotary_width, self.theta = int(E * config.partial_rotary_factor), config.rope_theta
        common: dict[str, Any] = {"param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        self.q_proj = dense(H, heads * E, H**-0.5, bias=config.attention_bias, **common)
        self.k_proj = dense(H, G * E, H**-0.5, bias=config.attention_bias, **common)
        self.v_proj = dense(H, G * E, H**-0.5, bias=config.attention_bias, **common)
        self.o_proj = dense(heads * E, H, math.sqrt(config.out_variance / H), **common)

    def __call__(
        self, x: Float[Array, "B L H"], lengths: Int[Array, " B"] | None, cache: Cache | None
    ) -> tuple[Float[Array, "B L H"], Cache]:
        """`(y, cache)`; {} for no cache. Past the room of a cache narrower than the window, y is NaN."""
        B, L, _ = x.shape
        offset = jnp.zeros(B, jnp.int32) if cache is None else cache["seqlen_offset"]
        position = offset[:, None] + jnp.arange(L)
        valid = jnp.ones((B, L), bool) if lengths is None else jnp.arange(L) < lengths[:, None]
        q, k, v = (p(x).reshape(B, L, -1, self.E) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(z, position, self.rotary_width, self.theta) for z in (q, k))
        pieces = q, k, v, jnp.where(valid, position, -1)
        if cache is None and self.window >= L:
            y, after = self._attend(pieces, k, v, pieces[3]), {}
        elif cache is not None and L == 1:
            after = self._store(cache, pieces)
            y = self._attend(pieces, after["k"], after["v"], _held(after))
        else:
            ring = self.allocate(B, self.window, x.dtype) if cache is None else cache
            y, after = self._by_windows(pieces, ring)
            after = {} if cache is None else after
        if cache is not None and (room := cache["k"].shape[1]) < self.window:
            y = jnp.where((valid & (position >= room))[..., None], jnp.nan, y)
        return self.o_proj(y.astype(x.dtype)), after

    def allocate(self, batch: int, max_seqlen: int, dtype: Any) -> Cache:
        """k and v (B, min(W, max_seqlen), G, E), seqlen_offset int32 (B,)."""
        k, v = (jnp.zeros((batch, min(self.window, max_seqlen), self.G, self.E), dtype) for _ in range(2))
        return {"k": k, "v": v, "seqlen_offset": jnp.zeros(batch, jnp.int32)}

    @compiled
    def _by_windows(self, pieces, ring: Cache) -> tuple[Float[Array, "B L HE"], Cache]:
        """A window of queries after the other, each over what the ring holds and itself."""
        B, L = pieces[3].shape
        size = min(L, self.window)
        count = -(-L // size) if L else 0

        def cut(x, fill=0):
            x = jnp.pad(x, ((0, 0), (0, count * size - L)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
            return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

        def body(ring, piece):
            k, v = (
                jnp.concatenate([ring[name].astype(x.dtype), x], 1) for name, x in (("k", piece[1]), ("v", piece[2]))
            )
            y = self._attend(piece, k, v, jnp.concatenate([_held(ring), piece[3]], 1))
            return self._store(ring, piece), y

        q, k, v, position = pieces
        ring, y = jax.lax.scan(body, ring, (cut(q), cut(k), cut(v), cut(position, -1)))
        return jnp.moveaxis(y, 0, 1).reshape(B, count * size, -1)[:, :L], ring

    def _store(self, ring: Cache, piece) -> Cache:
        """The ring after the valid steps of a piece."""
        _, k, v, position = piece
        slots = ring["k"].shape[1]
        seen = ring["seqlen_offset"] + jnp.sum(position >= 0, 1, dtype=jnp.int32)
        kept = (position >= 0) & (position >= seen[:, None] - slots)
        where = jnp.arange(k.shape[0])[:, None], jnp.where(kept, position % slots, slots)
        k, v = (ring[name].at[where].set(x.astype(ring[name].dtype), mode="drop") for name, x in (("k", k), ("v", v)))
        return {"k": k, "v": v, "seqlen_offset": seen}

    def _attend(self, piece, k: Array, v: Array, held: Int[Array, "B S"]) -> Float[Array, "B L HE"]:
        """Attention of the queries over keys at the positions `held`; -1 is none."""
        q, position = piece[0], piece[3][:, :, None]
        held = held[:, None]
        seen = (held >= 0) & (held <= position) & (held > position - self.window)
        return attention(q, k, v, seen | (position < 0), self.E**-0.5, self.precision)


def _held(ring: Cache) -> Int[Array, "B S"]:
    """The position that each slot holds, or -1."""
    slots = ring["k"].shape[1]
    last = ring["seqlen_offset"][:, None] - 1
    position = last - (last - jnp.arange(slots)) % slots
    return jnp.where(position >= 0, position, -1)


class MLP(nnx.Module):
    """down_proj(activation(gate_proj(x)) up_proj(x)), intermediate_size // 2 wide inside."""

    def __init__(self, config: Any, *, param_dtype: Any, precision: Any, rngs: nnx.Rngs):
        H, hidden = config.hidden_size, config.intermediate_size // 2
        std = math.sqrt(config.w_init_variance_scale / config.conv1d_width)
        common: dict[str, Any] = {"param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        self.activation = ACTIVATIONS[config.hidden_activation]
        self.gate_proj, self.up_proj = dense(H, hidden, std, **common), dense(H, hidden, std, **common)
        self.down_proj = dense(hidden, H, std, **common)

    def __call__(self, x: Float[Array, "*L H"]) -> Float[Array, "*L H"]:
        """The same shape and dtype."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _tanh_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"gelu_pytorch_tanh": _tanh_gelu, "gelu": _gelu}


def dense(
    in_features: int,
    out_features: int,
    std: float,
    *,
    bias: bool = True,
    param_dtype: Any,
    precision: Any,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer of normal weights and zero bias."""
    return nnx.Linear(
        in_features, out_features, use_bias=bias, kernel_init=nnx.initializers.normal(std),
        param_dtype=param_dtype, precision=precision, rngs=rngs,
    )  # fmt: skip
