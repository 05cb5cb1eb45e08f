"""lrnnx's multi-head attention, with a key-value cache."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spyx.ops import causal_conv1d
from spyx.ops.dtypes import state_dtype, widen
from spyx.ops.scan import check_lengths

from ..core.base import LRNN
from ..core.discretization import Reference
from ..core.layers import depthwise_conv, linear, taps
from ..interop import torch_in_torch_out
from ..random import default_rngs

Cache = dict[str, Array]


class MHA(LRNN):
    """Multi-head self-attention: (B, L, embed_dim) -> (B, L, embed_dim).

    Args:
        embed_dim: width of input and output.
        num_heads: heads of the queries.
        num_heads_kv: heads of keys and values, a divisor of `num_heads`; None is `num_heads`.
        head_dim: width of a head; None is embed_dim / num_heads.
        mlp_dim: width of a gated MLP computed beside the attention, rounded up to a multiple of 256; 0 is none.
        qkv_proj_bias, out_proj_bias: biases of in_proj and out_proj.
        softmax_scale: of the scores; None is 1 / sqrt(head_dim).
        causal: a step sees itself and what came before. Without it there is no step and no cache.
        layer_idx: no effect.
        d_conv: taps of a causal depthwise convolution of queries, keys and values; 0 is none.
        rotary_emb_dim: leading part of each head, even, that is rotated by its position; 0 is none.
        rotary_emb_base: base of the rotation's frequencies.
        rotary_emb_interleaved: rotate neighbouring pairs instead of the two halves.
        device: None or "cpu", no effect.
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
        reference: "lrnnx" or "paper"; for this class they are the same arithmetic.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: in_proj.weight (head_dim (num_heads + 2 num_heads_kv) + mlp_dim, embed_dim), conv1d.weight, conv1d.bias,
    out_proj.weight (embed_dim, head_dim num_heads + mlp_dim / 2), biases. Cache: kv_cache (B, max_seqlen, 2,
    num_heads_kv, head_dim), conv_state (B, qkv width, d_conv) if there is a convolution, seqlen_offset int32 (B,). Past
    max_seqlen steps the output is NaN.

    Raises:
        ValueError: sizes that are not integers or do not divide, an odd or too wide `rotary_emb_dim`, a device other
            than the CPU.

    Source: arXiv:1706.03762, grouped queries arXiv:2305.13245, rotary positions arXiv:2104.09864; lrnnx 1.0.0
    `lrnnx.layers.mha`.
    """

    _cache_advice: ClassVar[str] = "make one with allocate_inference_cache(batch_size, max_seqlen)"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
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
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self._check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_heads_kv=num_heads_kv)
        self._check_sizes(0, mlp_dim=mlp_dim, d_conv=d_conv, rotary_emb_dim=rotary_emb_dim)
        if num_heads % num_heads_kv:
            raise ValueError(f"MHA: num_heads_kv must divide num_heads, got {num_heads_kv} and {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"MHA: num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
            head_dim = embed_dim // num_heads
        self._check_sizes(head_dim=head_dim)
        if rotary_emb_dim % 2 or rotary_emb_dim > head_dim:
            raise ValueError(f"MHA: rotary_emb_dim must be even and at most {head_dim}, got {rotary_emb_dim}")
        if not rotary_emb_base > 0:
            raise ValueError(f"MHA: rotary_emb_base must be positive, got {rotary_emb_base}")
        self.d_model, self.num_heads, self.num_heads_kv, self.head_dim = embed_dim, num_heads, num_heads_kv, head_dim
        self.mlp_dim, self.d_conv = math.ceil(mlp_dim / 256) * 256, d_conv
        self.causal, self.layer_idx = causal, layer_idx
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        common: dict[str, Any] = {
            "param_dtype": self.param_dtype, "precision": precision, "rngs": default_rngs(rngs)
        }  # fmt: skip
        self.in_proj = linear(embed_dim, self._qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **common)
        if d_conv:
            self.conv1d = depthwise_conv(self._qkv_dim, d_conv, **common)
        self.out_proj = linear(head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **common)

    @property
    def _qkv_dim(self) -> int:
        return self.head_dim * (self.num_heads + 2 * self.num_heads_kv)

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """Attend over whole sequences.

        Args:
            x: real floating point, (B, L, embed_dim).
            lengths: int (B,): valid steps of each row; the rest is attended by none, outputs past them are 0.
            inference_cache: continue after what it holds.

        Returns:
            y (B, L, embed_dim); with a cache, `(y, cache)`.

        Raises:
            ValueError: wrong rank or width; a cache, but the layer is not causal; more steps than it has room for.
        """
        x = self._input(x, "(B, L, H)")
        B, L, _ = x.shape
        valid = jnp.ones((B, L), bool)
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            check_lengths(lengths, (L, B))
            valid = jnp.arange(L) < lengths[:, None]
            x = jnp.where(valid[..., None], x, 0)
        if inference_cache is not None:
            self._check_cache(inference_cache, B, L)
        y, cache = self._attend(x, valid, lengths, inference_cache)
        y = jnp.where(valid[..., None], y, 0).astype(x.dtype)
        return y if inference_cache is None else (y, cache)

    @torch_in_torch_out
    def step(self, x: Float[Array, "B 1 H"], inference_cache: Cache) -> tuple[Float[Array, "B 1 H"], Cache]:
        """One step: `(y, cache)` from x (B, 1, embed_dim) and the cache before it, which is left as it is.

        Past its max_seqlen steps y is NaN.

        Raises:
            ValueError: wrong rank or width, more than one step, a cache that does not fit, or the layer is not causal.
        """
        x = self._input(x, "(B, 1, H)")
        if x.shape[1] != 1:
            raise ValueError(f"MHA: step takes one step, (B, 1, H), got shape {x.shape}; call the layer for more")
        y, cache = self._advance(x[:, 0], inference_cache)
        return y[:, None], cache

    def _advance(self, x: Float[Array, "B H"], cache: Cache, timesteps: Array | None = None) -> tuple[Array, Cache]:
        self._check_cache(cache, x.shape[0], 1)
        y, cache = self(x[:, None], inference_cache=cache)
        return y[:, 0], cache

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: DTypeLike | None = None) -> Cache:
        """Room for the keys and values of `max_seqlen` steps.

        Raises:
            ValueError: the layer is not causal.
        """
        self._check_sizes(batch_size=batch_size, max_seqlen=max_seqlen)
        self._check_causal()
        dtype = dtype or self.param_dtype
        cache = {
            "kv_cache": jnp.zeros((batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim), dtype),
            "seqlen_offset": jnp.zeros((batch_size,), jnp.int32),
        }
        if self.d_conv:
            cache["conv_state"] = jnp.zeros((batch_size, self._qkv_dim, self.d_conv), dtype)
        return cache

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError(
                "MHA with causal=False sees the whole sequence: it has neither a step nor a cache. Construct it with "
                'causal=True (in a language model: mixer_kwargs={"attn": {"causal": True, ...}}, or reference="paper")'
            )

    def _check_cache(self, cache: Cache, B: int, L: int) -> None:
        self._check_causal()
        keys = cache.get("kv_cache") if isinstance(cache, dict) else None
        room = (*getattr(keys, "shape", ()), 1, 1)[1]
        shapes = {"kv_cache": [(B, room, 2, self.num_heads_kv, self.head_dim)], "seqlen_offset": [(B,)]}
        if self.d_conv:
            shapes["conv_state"] = [(B, self._qkv_dim, self.d_conv)]
        self._check_entries(cache, shapes)
        if room < L:
            raise ValueError(f"MHA: the cache has room for {room} steps, got {L}: allocate it with a larger max_seqlen")

    def _attend(self, x, valid: Bool[Array, "B L"], lengths, cache: Cache | None):
        B, L, _ = x.shape
        mixed = self.in_proj(x)
        qkv, gated = mixed[..., : self._qkv_dim], mixed[..., self._qkv_dim :]
        after: Cache = {}
        if self.d_conv:
            before = None if cache is None else cache["conv_state"]
            qkv, after["conv_state"] = causal_conv1d(
                jnp.swapaxes(qkv, 0, 1), *taps(self.conv1d), before, lengths=lengths, return_state=True
            )
            qkv = jnp.swapaxes(qkv, 0, 1)
        q, kv = jnp.split(qkv, [self.num_heads * self.head_dim], -1)
        q = q.reshape(B, L, self.num_heads, self.head_dim)
        kv = kv.reshape(B, L, 2, self.num_heads_kv, self.head_dim)
        offset = jnp.zeros((B,), jnp.int32) if cache is None else cache["seqlen_offset"]
        position = offset[:, None] + jnp.arange(L)
        q, kv = self._rotate(q, position), jnp.stack([self._rotate(kv[:, :, 0], position), kv[:, :, 1]], 2)
        if cache is None:
            earlier = position[:, None] <= position[..., None]
            seen = valid[:, None] & earlier if self.causal else jnp.broadcast_to(valid[:, None], (B, L, L))
        else:
            held = cache["kv_cache"]
            room = held.shape[1]
            slots = jnp.where(valid, position, room)
            kv = held.at[jnp.arange(B)[:, None], slots].set(kv.astype(held.dtype), mode="drop")
            after |= {"kv_cache": kv, "seqlen_offset": offset + jnp.sum(valid, 1, dtype=jnp.int32)}
            seen = jnp.arange(room) <= position[..., None]
            q = jnp.where((valid & (position >= room))[..., None, None], jnp.nan, q)
        k, v = kv[:, :, 0], kv[:, :, 1]
        context = attention(q, k, v, seen | ~valid[..., None], self.softmax_scale, self.precision).astype(mixed.dtype)
        if self.mlp_dim:
            up, gate = jnp.split(gated, 2, -1)
            context = jnp.concatenate([context, up * jax.nn.silu(gate)], -1)
        return self.out_proj(context), after

    def _rotate(self, x: Float[Array, "B L G E"], position: Int[Array, "B L"]) -> Float[Array, "B L G E"]:
        return rotate(x, position, self.rotary_emb_dim, self.rotary_emb_base, self.rotary_emb_interleaved)


def attention(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    seen: Bool[Array, "B L S"],
    scale: float,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "B L HE"]:
    """softmax(scale q k) v over the steps that are `seen`, in float32 or wider.

    Args:
        q, k, v: H heads of queries, G of keys and values, a divisor of H: consecutive queries share one.
        seen: which of the S keys each of the L queries sees; at least one, or the result is NaN.
        scale: of the scores.
        precision: of both products, as in `jax.lax.dot`.

    Source: arXiv:1706.03762; grouped queries arXiv:2305.13245.
    """
    B, L, H, E = q.shape
    G, dtype = k.shape[2], state_dtype(q, k)
    q, k, v = (x.astype(dtype) for x in (q.reshape(B, L, G, H // G, E), k, v))
    scores = jnp.einsum("blgrd,bsgd->bgrls", q, k, precision=precision) * scale
    weights = jax.nn.softmax(scores, -1, where=seen[:, None, None])
    return jnp.einsum("bgrls,bsgd->blgrd", weights, v, precision=precision).reshape(B, L, H * E)


def rotate(
    x: Float[Array, "B L G E"], position: Int[Array, "B L"], width: int, base: float, interleaved: bool = False
) -> Float[Array, "B L G E"]:
    """Rotary positions: the pair i of `width` leading channels turned by position * base^(-2 i / width) radians.

    Args:
        x: queries or keys.
        position: of each step.
        width: even, at most E; the other channels stay as they are.
        base: of the frequencies.
        interleaved: pairs are neighbours; otherwise pair i is the channels i and i + width / 2.

    Returns:
        in the dtype of `x`; computed in float32 or wider.

    Source: arXiv:2104.09864.
    """
    if not width:
        return x
    wide = widen(x[..., :width])
    frequency = base ** (-jnp.arange(0, width, 2, dtype=wide.dtype) / width)
    angle = (position[..., None] * frequency)[:, :, None]
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, -1)
    parts = a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)
    turned = jnp.stack(parts, -1).reshape(wide.shape) if interleaved else jnp.concatenate(parts, -1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], -1)
