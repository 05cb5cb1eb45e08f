"""lrnnx's token and position embeddings."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..core.base import check_sizes, parameter_dtype
from ..core.layers import look_up
from ..interop import torch_in_torch_out
from ..random import default_rngs


class PositionEmbedding(nnx.Module):
    """Learned vectors of positions: integers of any shape -> (..., embedding_dim).

    Args:
        max_position_embeddings: positions 0 ... max_position_embeddings - 1 have a vector.
        embedding_dim: width.
        param_dtype: of the parameters.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: position_embedding.weight (max_position_embeddings, embedding_dim), standard normal at first.

    Raises:
        ValueError: sizes. TypeError: `param_dtype` is not real floating point.

    Source: lrnnx 1.0.0 `lrnnx.architectures.embedding`.
    """

    def __init__(
        self,
        max_position_embeddings: int,
        embedding_dim: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        sizes = {"max_position_embeddings": max_position_embeddings, "embedding_dim": embedding_dim}
        self.position_embedding = _table("PositionEmbedding", sizes, param_dtype, default_rngs(rngs))

    @torch_in_torch_out
    def __call__(self, positions: Int[Array, "*L"]) -> Float[Array, "*L E"]:
        """The vectors; NaN for a position outside of the table.

        Raises:
            TypeError: positions that are not integers.
        """
        return _look_up(self.position_embedding, positions, "PositionEmbedding expects integer positions")


class TokenEmbedding(nnx.Module):
    """Vectors of tokens: ids (B, L) -> (B, L, embedding_dim).

    Args:
        vocab_size: number of tokens.
        embedding_dim: width.
        padding_idx: this token has the zero vector at first, and no gradient; a negative one counts from the end.
        max_position_embeddings: the longest sequence, with `use_position`.
        use_position: add a learned vector of the position.
        dropout: rate, in training mode.
        param_dtype: of the parameters.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: token_embedding.weight (vocab_size, embedding_dim), standard normal at first; with `use_position`
    position_embedding.position_embedding.weight.

    Raises:
        ValueError: sizes, padding_idx outside of the vocabulary, a rate outside of [0, 1], or one of use_position and
            max_position_embeddings without the other. TypeError: `param_dtype` is not real floating point.

    Source: lrnnx 1.0.0 `lrnnx.architectures.embedding`.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_position_embeddings: int | None = None,
        use_position: bool = False,
        dropout: float = 0.1,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if use_position != (max_position_embeddings is not None):
            raise ValueError(
                "TokenEmbedding: use_position=True needs max_position_embeddings, which has no other use; got "
                f"use_position={use_position}, max_position_embeddings={max_position_embeddings}"
            )
        rngs = default_rngs(rngs)
        self.embedding_dim = embedding_dim
        sizes = {"vocab_size": vocab_size, "embedding_dim": embedding_dim}
        self.token_embedding = _table("TokenEmbedding", sizes, param_dtype, rngs)
        known = isinstance(padding_idx, Integral) and -vocab_size <= padding_idx < vocab_size
        if padding_idx is not None and not known:
            raise ValueError(f"TokenEmbedding: padding_idx must be in [{-vocab_size}, {vocab_size}), got {padding_idx}")
        self.padding_idx = None if padding_idx is None else padding_idx % vocab_size
        if self.padding_idx is not None:
            table = self.token_embedding.embedding
            table.set_value(table[...].at[self.padding_idx].set(0))
        if max_position_embeddings is not None:
            self.position_embedding = PositionEmbedding(
                max_position_embeddings, embedding_dim, param_dtype=param_dtype, rngs=rngs
            )
        self.dropout = dropout_layer("TokenEmbedding", dropout)

    @torch_in_torch_out
    def __call__(self, token_ids: Int[Array, "B L"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "B L E"]:
        """The vectors; NaN for an id outside of the vocabulary.

        Args:
            token_ids: integer, shape (B, L).
            rngs: with a stream "dropout"; needed in training mode with dropout.

        Raises:
            ValueError: wrong rank, more steps than there are positions, no `rngs` where needed.
            TypeError: ids that are not integers.
        """
        ids = jnp.asarray(token_ids)
        if ids.ndim != 2:
            raise ValueError(f"TokenEmbedding expects token ids (B, L), got shape {ids.shape}")
        vectors = _look_up(self.token_embedding, ids, "TokenEmbedding expects integer token ids (B, L)")
        if self.padding_idx is not None:
            vectors = jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(vectors), vectors)
        if hasattr(self, "position_embedding"):
            L, room = ids.shape[1], self.position_embedding.position_embedding.num_embeddings
            if room < L:
                raise ValueError(f"TokenEmbedding has positions for {room} steps (max_position_embeddings), got {L}")
            vectors = vectors + self.position_embedding(jnp.arange(L))
        return apply_dropout("TokenEmbedding", self.dropout, vectors, rngs)


def dropout_layer(owner: str, rate: float, broadcast_dims: tuple[int, ...] = ()) -> nnx.Dropout:
    """Dropout that keeps no random streams.

    Raises:
        ValueError: a rate that is not a number in [0, 1].
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate <= 1:
        raise ValueError(f"{owner}: dropout must be in [0, 1], got {rate!r}")
    return nnx.Dropout(rate, broadcast_dims=broadcast_dims)


def apply_dropout(owner: str, layer: nnx.Dropout, x: Float[Array, "..."], rngs: Any) -> Float[Array, "..."]:
    """`layer(x)`.

    Raises:
        ValueError: it is in training mode and needs `rngs`.
    """
    if rngs is None and 0 < layer.rate < 1 and not layer.deterministic:
        raise ValueError(
            f"{owner}: dropout={layer.rate} in training mode needs rngs=nnx.Rngs(dropout=...) at the call; "
            "eval() turns it off"
        )
    return layer(x, rngs=rngs)


def _table(owner: str, sizes: dict[str, int], param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    check_sizes(owner, **sizes)
    normal, dtype = nnx.initializers.normal(1.0), parameter_dtype(owner, None, param_dtype)
    return nnx.Embed(*sizes.values(), embedding_init=normal, param_dtype=dtype, rngs=rngs)


def _look_up(table: nnx.Embed, ids: Any, expected: str) -> Float[Array, "*L E"]:
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{expected}, got {ids.dtype}")
    return look_up(table.embedding[...], ids)
