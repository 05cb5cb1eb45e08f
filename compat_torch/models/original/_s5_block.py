"""s5-pytorch's residual block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int

from spyx.ops.scan import check_lengths, valid_steps

from ...core.base import LRNN
from ...core.layers import linear
from ...interop import torch_in_torch_out
from ...layers.block import layer_norm, normalise
from ...random import default_rngs
from ._s5_parameters import Initialization
from ._s5_pytorch import S5, Cache


class S5Block(LRNN):
    """Norm, S5, GELU, norm, feed-forward: (B, L, H) -> (B, L, H).

    With a = attn_norm(x): b = ff_norm(attn_dropout(gelu(s5(a)) + a)); y = ff_dropout(ff_dec(ff(b)) + b), where
    ff(b) = p gelu(q), [p, q] = ff_enc(b), or without `glu` ff_enc(b) itself. Both residuals start after the norm.

    Args:
        dim: width H.
        state_dim: number P of states.
        bidir, block_count, liquid, degree, factor_rank, bcInit: of `S5`.
        ff_mult: the feed-forward is int(ff_mult dim) wide.
        glu: see above.
        ff_dropout, attn_dropout: rates, in [0, 1]; a rate between needs `rngs` in training mode.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: s5.seq.* as in `S5`, attn_norm.{weight, bias}, ff_norm.{weight, bias} (H,), ff_enc.weight
    (2 int(ff_mult H) with glu, H), ff_dec.weight (H, int(ff_mult H)). Cache: that of `S5`.

    Raises:
        ValueError: as `S5`; a rate outside [0, 1]; ff_mult that leaves no width.

    Source: s5-pytorch 0.2.1 `s5.S5Block`.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        bidir: bool,
        block_count: int = 1,
        liquid: bool = False,
        degree: int = 1,
        factor_rank: int | None = None,
        bcInit: Initialization | None = None,
        ff_mult: float = 1.0,
        glu: bool = True,
        ff_dropout: float = 0.0,
        attn_dropout: float = 0.0,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(dim=dim, state_dim=state_dim)
        for name, rate in (("ff_dropout", ff_dropout), ("attn_dropout", attn_dropout)):
            if not 0 <= rate <= 1:
                raise ValueError(f"S5Block: {name} must be in [0, 1], got {rate}")
        hidden = int(dim * ff_mult)
        if hidden < 1:
            raise ValueError(f"S5Block: int(ff_mult * dim) must be at least 1, got ff_mult={ff_mult} and dim={dim}")
        rngs = default_rngs(rngs)
        dense: dict[str, Any] = {
            "bias": False, "param_dtype": self.param_dtype, "precision": precision, "rngs": rngs
        }  # fmt: skip
        self.d_model, self.glu = dim, bool(glu)
        self.s5 = S5(
            dim, state_dim, factor_rank, block_count,
            liquid=liquid, degree=degree, bidir=bidir, bcInit=bcInit,
            precision=precision, param_dtype=self.param_dtype, rngs=rngs,
        )  # fmt: skip
        self.attn_norm = layer_norm(dim, param_dtype=self.param_dtype)
        self.attn_dropout = nnx.Dropout(attn_dropout)
        self.ff_enc = linear(dim, 2 * hidden if glu else hidden, **dense)
        self.ff_dec = linear(hidden, dim, **dense)
        self.ff_norm = layer_norm(dim, param_dtype=self.param_dtype)
        self.ff_dropout = nnx.Dropout(ff_dropout)

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        state: Complex[Array, "B P"] | None = None,
        return_state: bool = False,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Run the block over whole sequences.

        Args:
            x: real floating point, shape (B, L, H).
            state, return_state, lengths, inference_cache: as in a call of `S5`.
            rngs: with a stream "dropout"; needed in training mode with dropout.

        Returns:
            y of shape (B, L, H) in `dtype`, or else the dtype of the input; `(y, state)` with `return_state`,
            `(y, cache)` with a cache.

        Raises:
            ValueError: as a call of `S5`; no `rngs` where needed. TypeError: wrong dtype.
        """
        x = self._input(x, "(B, L, H)")
        valid = None
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            check_lengths(lengths, (x.shape[1], x.shape[0]))
            valid = jnp.swapaxes(valid_steps(lengths, x.shape[1], 3), 0, 1)
            x = jnp.where(valid, x, 0)

        def mix(a):
            out = self.s5(a, 1.0, state, return_state, lengths, inference_cache)
            return out if isinstance(out, tuple) else (out, None)

        y, after = self._apply(mix, x, rngs)
        y = y if valid is None else jnp.where(valid, y, 0)
        return y if after is None else (y, after)

    @torch_in_torch_out
    def step(
        self, x: Float[Array, "B H"], inference_cache: Cache, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B H"], Cache]:
        """One step: `(y, cache)` from x (B, H) and the cache before it, which is left as it is.

        Args:
            x: real floating point, shape (B, H).
            inference_cache: from `allocate_inference_cache`, a call, or a step before.
            rngs: as in a call.

        Raises:
            ValueError: as a step of `S5`; no `rngs` where needed. TypeError: wrong dtype.
        """
        return self._apply(lambda a: self.s5.step(a, inference_cache), self._input(x, "(B, H)"), rngs)

    def _apply(self, mix, x: Float[Array, "*L H"], rngs: nnx.Rngs | None) -> tuple[Array, Any]:
        for name, layer in (("attn_dropout", self.attn_dropout), ("ff_dropout", self.ff_dropout)):
            if rngs is None and 0 < layer.rate < 1 and not layer.deterministic:
                raise ValueError(
                    f"S5Block: {name}={layer.rate} in training mode needs rngs=nnx.Rngs(dropout=...) at the call; "
                    "eval() turns it off"
                )
        a = normalise(self.attn_norm, x)
        y, after = mix(a)
        b = normalise(self.ff_norm, self.attn_dropout(jax.nn.gelu(y, approximate=False) + a, rngs=rngs))
        hidden = self.ff_enc(b)
        if self.glu:
            p, q = jnp.split(hidden, 2, -1)
            hidden = p * jax.nn.gelu(q, approximate=False)
        return self.ff_dropout(self.ff_dec(hidden) + b, rngs=rngs).astype(x.dtype), after

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """A cache at the start of a sequence; see `S5.allocate_inference_cache`."""
        return self.s5.allocate_inference_cache(batch_size, max_seqlen, dtype)
