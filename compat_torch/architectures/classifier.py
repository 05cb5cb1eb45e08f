"""lrnnx's classifier: embedding or projection, residual blocks of any layers, pooling, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..core.base import LRNN
from ..core.discretization import Reference
from ..core.layers import linear
from ..interop import torch_in_torch_out
from ..layers.block import has_event_mode, layer_norm
from ..models.lti import LRU, S4, S4D
from ..random import default_rngs
from ._layers import LayerLike, layer_factory
from ._pooling import IntermediatePooling, Pooling, SequencePooling, per_row, valid_steps
from .embedding import TokenEmbedding, apply_dropout, dropout_layer

__all__ = ["Classifier", "ClassifierBlock", "SequencePooling"]


class ClassifierBlock(LRNN):
    """norm(x + dropout(layer(x))), then pooling over windows; the last block pools to one vector and has the head.

    Args:
        d_model: width of the stream.
        d_state: states of the layer, if it takes the argument and has not got it otherwise.
        lrnn_cls: the layer: a class, a name or a functools.partial, see `Classifier`.
        num_classes, output_dim: width of the head: num_classes, or output_dim if that is 0.
        pooling: of the last block.
        dropout: rate, in training mode.
        intermediate_pooling: over windows of `pooling_factor` steps, "none" is none.
        pooling_factor: see there; at least 2 where it is in use.
        is_final: has pooling to one vector and a head.
        reference: of the layer and of `SequencePooling`, see their tables.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the activations; None follows from input and parameters.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).
        **lrnn_params: further arguments of the layer. (One that has the name of an argument above comes in a partial.)

    Parameters: lrnn.*, norm.{weight, bias}, output_proj.{weight, bias} if final.

    Raises:
        ValueError: sizes, unknown names; a layer that does not keep the width.
        TypeError: arguments that the layer lacks or does not know.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        lrnn_cls: LayerLike,
        num_classes: int = 0,
        output_dim: int = 1,
        pooling: Pooling = "last",
        dropout: float = 0.1,
        intermediate_pooling: IntermediatePooling = "none",
        pooling_factor: int = 2,
        is_final: bool = False,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
        **lrnn_params: Any,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state, pooling_factor=pooling_factor)
        self._check_choice("intermediate_pooling", intermediate_pooling, get_args(IntermediatePooling))
        if intermediate_pooling != "none" and pooling_factor == 1:
            raise ValueError(
                f"{self._name}: intermediate_pooling={intermediate_pooling!r} needs pooling_factor >= 2, got 1"
            )
        self.d_model, self.is_final = d_model, is_final
        rngs = default_rngs(rngs)
        common: dict[str, Any] = {"precision": precision, "param_dtype": self.param_dtype, "rngs": rngs}
        fill = {"d_model": d_model, "d_state": d_state, "reference": reference, "dtype": dtype, **common}
        self.lrnn = layer_factory(lrnn_cls, lrnn_params, fill)()
        for name in ("d_model", "d_output"):
            if (width := getattr(self.lrnn, name, d_model)) != d_model:
                raise ValueError(
                    f"{self._name}: the layer {type(self.lrnn).__name__} must keep the width d_model = {d_model}, "
                    f"got {name} = {width}"
                )
        self.norm = layer_norm(d_model, param_dtype=self.param_dtype)
        self.dropout = dropout_layer(self._name, dropout)
        self.intermediate_pooling, self.pooling_factor = intermediate_pooling, pooling_factor
        if intermediate_pooling != "none":
            self.pooler = SequencePooling(intermediate_pooling, pooling_factor, reference=reference)
        if is_final:
            self.final_pooler = SequencePooling(pooling, reference=reference)
            self.output_proj = linear(d_model, head_width(self._name, num_classes, output_dim), **common)

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        integration_timesteps: Float[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """`(x, integration_timesteps, lengths)` for the next block, or the output (B, width of the head) if final.

        Args:
            x: shape (B, L, d_model).
            integration_timesteps: time since the event before, shape (B, L), for a layer with an event mode.
            lengths: int, shape (B,): valid steps of each row; the rest must be finite.
            rngs: with a stream "dropout"; needed in training mode with dropout.
        """
        y = apply_dropout(self._name, self.dropout, self._recur(x, integration_timesteps, lengths, rngs), rngs)
        x = self.norm(x + y)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        if hasattr(self, "pooler"):
            x, integration_timesteps, lengths = self.pooler(x, lengths, integration_timesteps)
        if not self.is_final:
            return x, integration_timesteps, lengths
        return self.output_proj(self.final_pooler(x, lengths)[0])

    def _recur(self, x, integration_timesteps, lengths, rngs) -> Float[Array, "B L H"]:
        if isinstance(self.lrnn, LRNN):
            extra: dict[str, Any] = {}
            if has_event_mode(self.lrnn):
                extra["integration_timesteps"] = integration_timesteps
            elif isinstance(self.lrnn, S4 | S4D):
                extra["rngs"] = rngs
            y = self.lrnn(x, lengths=lengths, **extra)
        else:
            y = self.lrnn(x, integration_timesteps, lengths)
        return y[0] if isinstance(y, tuple) else y


class Classifier(LRNN):
    """Classification or regression of sequences: (B, L, input_dim), or token ids (B, L), -> (B, classes or outputs).

    Args:
        input_dim: width of the input; without effect if `vocab_size` is given.
        num_classes: number of classes; 0 is regression.
        output_dim: width of the output of a regression.
        d_model: width of the blocks.
        d_state: states of the layers that have them.
        n_layers: number of blocks.
        lrnn_cls: the layer: a class of `compat_torch.models`; a name, such as "S4D", "S5" (the time-invariant one),
            "Mamba" or "ltv.S5"; a functools.partial of a class with arguments; or a list with one of these for each
            block. A class of another kind is called as `layer(x, integration_timesteps, lengths)`.
        pooling: of the last block: "last", "mean" or "max" of the valid steps.
        dropout: rate in blocks and embedding, in training mode.
        intermediate_pooling: after each block, or a list with one for each block: "none", "stride", "mean", "max".
        pooling_factor: steps of a window of the intermediate pooling, or a list.
        vocab_size: number of tokens: the input is token ids.
        embedding_dim: width of their vectors; None is `d_model`.
        max_position_embeddings: see the table.
        padding_idx: this token has the zero vector at first, and no gradient; without effect if there is no
            `vocab_size`.
        lrnn_params: further arguments of the layers, for all blocks or a list with a dict for each block. d_model,
            d_state, and what is keyword-only below, are filled in where a layer takes them and has not got them; S4 and
            S4D run with transposed=False.
        reference: of the layers and `SequencePooling`, see their tables, and the table below.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of activations and output; None: activations have the wider dtype of input and parameters, the output
            that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: input_proj.* or embedding.token_embedding.weight and, for embedding_dim != d_model, embed_proj.*;
    blocks.i.{lrnn, norm}.*; final_block.{lrnn, norm, output_proj}.*.

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | max_position_embeddings | no effect | a learned vector of the position is added to the token's |

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: `lrnn_params` with the names it documents
    raises, and so does `lrnn_cls` without a partial; Mamba, S4, S4D, RGLRU and S7 have no name; pooling_factor=1 raises
    in a call; `lengths` does not reach the layers (see also `SequencePooling`).

    Raises:
        ValueError: sizes, unknown names, a list of another length than `n_layers`, embedding_dim or
            max_position_embeddings without vocab_size. TypeError: arguments that a layer lacks or does not know.

    Source: Event-SSM (arXiv:2404.18508); lrnnx 1.0.0 `lrnnx.architectures.classifier`.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int = 0,
        output_dim: int = 1,
        d_model: int = 128,
        d_state: int = 64,
        n_layers: int = 4,
        lrnn_cls: LayerLike | Sequence[LayerLike] = LRU,
        pooling: Pooling = "last",
        dropout: float = 0.1,
        intermediate_pooling: IntermediatePooling | Sequence[IntermediatePooling] = "none",
        pooling_factor: int | Sequence[int] = 2,
        vocab_size: int | None = None,
        embedding_dim: int | None = None,
        max_position_embeddings: int | None = None,
        padding_idx: int | None = 0,
        lrnn_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state, n_layers=n_layers)
        self._check_choice("pooling", pooling, get_args(Pooling))
        given = {"embedding_dim": embedding_dim, "max_position_embeddings": max_position_embeddings}
        sizes = {name: value for name, value in given.items() if value is not None}
        if vocab_size is not None:
            self._check_sizes(vocab_size=vocab_size, **sizes)
        elif sizes:
            raise ValueError(f"{self._name}: {' and '.join(sizes)} need vocab_size, got None")
        self.d_model, self.pooling, self.has_embedding = d_model, pooling, vocab_size is not None
        rngs = default_rngs(rngs)
        common: dict[str, Any] = {"precision": precision, "param_dtype": self.param_dtype, "rngs": rngs}
        if vocab_size is None:
            self._check_sizes(input_dim=input_dim)
            self.input_dim = input_dim
            self.input_proj = linear(input_dim, d_model, **common)
        else:
            self.input_dim = embedding_dim or d_model
            room = max_position_embeddings if reference == "paper" else None
            self.embedding = TokenEmbedding(
                vocab_size, self.input_dim, padding_idx, room, room is not None, dropout,
                param_dtype=self.param_dtype, rngs=rngs,
            )  # fmt: skip
            if self.input_dim != d_model:
                self.embed_proj = linear(self.input_dim, d_model, **common)

        columns = {
            "lrnn_cls": lrnn_cls,
            "lrnn_params": lrnn_params or {},
            "intermediate_pooling": intermediate_pooling,
            "pooling_factor": pooling_factor,
        }
        rows = zip(*(self._for_each_block(n_layers, name, value) for name, value in columns.items()), strict=True)
        blocks = [
            ClassifierBlock(
                d_model, d_state, layer_factory(layer, params, {}), num_classes, output_dim, pooling, dropout,
                pooler, factor, i == n_layers - 1, reference=reference, dtype=dtype, **common,
            )
            for i, (layer, params, pooler, factor) in enumerate(rows)
        ]  # fmt: skip
        self.blocks, self.final_block = nnx.List(blocks[:-1]), blocks[-1]

    def _for_each_block(self, n_layers: int, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            return [value] * n_layers
        if len(value) != n_layers:
            raise ValueError(f"{self._name}: {name} must have n_layers = {n_layers} entries, got {len(value)}")
        return value

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L I"] | Int[Array, "B L"],
        lengths: Int[Array, " B"] | int | None = None,
        integration_timesteps: Float[Array, "B L"] | Float[Array, "B L 1"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B O"]:
        """Logits, or values of a regression.

        Args:
            x: real floating point, shape (B, L, input_dim); with `vocab_size` integer token ids (B, L), or their
                vectors (B, L, embedding_dim). An id outside of the vocabulary gives NaN.
            lengths: valid steps of each row: integer, shape (B,), or a Python integer for all rows. The padding, even
                NaN, reaches nothing.
            integration_timesteps: time since the event before, shape (B, L) or (B, L, 1), for the layers with an event
                mode (Mamba, ltv.S5); the others do without.
            rngs: with a stream "dropout"; needed in training mode with dropout.

        Returns:
            Shape (B, num_classes or output_dim), in `dtype`, or else the dtype of floating point `x`, or else that of
            the parameters.

        Raises:
            ValueError: wrong rank or width; integration_timesteps, but no layer with an event mode; no `rngs` where
                needed.
            TypeError: wrong dtype.
        """
        x = self._checked(x)
        B, L = x.shape[:2]
        left = per_row(lengths, B, L)
        valid = valid_steps(left, B, L)
        timesteps = self._timesteps(integration_timesteps, valid)
        h = self._embed(x, valid, rngs)
        for block in self.blocks:
            h, timesteps, left = block(h, timesteps, left, rngs=rngs)
        y = self.final_block(h, timesteps, left, rngs=rngs)
        if self.dtype is not None:
            return y.astype(self.dtype)
        return y.astype(x.dtype) if x.ndim == 3 else y

    def _checked(self, x: Any) -> Array:
        x = jnp.asarray(x)
        ids = self.has_embedding and x.ndim == 2
        if not ids and (x.ndim != 3 or x.shape[-1] != self.input_dim):
            others = "token ids (B, L) or vectors " if self.has_embedding else "input "
            raise ValueError(f"{self._name} expects {others}(B, L, {self.input_dim}), got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.integer if ids else jnp.floating):
            expected = "integer token ids (B, L)" if ids else f"real floating point input (B, L, {self.input_dim})"
            raise TypeError(f"{self._name} expects {expected}, got {x.dtype}")
        return x

    def _timesteps(self, timesteps: Any, valid: Bool[Array, "B L"]) -> Float[Array, "B L"] | None:
        if timesteps is None:
            return None
        blocks = (*self.blocks, self.final_block)
        if all(isinstance(block.lrnn, LRNN) and not has_event_mode(block.lrnn) for block in blocks):
            names = sorted({type(block.lrnn).__name__ for block in blocks})
            raise ValueError(
                f"{self._name}: integration_timesteps needs a layer with an event mode (Mamba, ltv.S5), the layers are "
                f"{', '.join(names)}"
            )
        timesteps = jnp.asarray(timesteps)
        if timesteps.shape not in (valid.shape, (*valid.shape, 1)):
            raise ValueError(
                f"{self._name}: integration_timesteps must have shape (B, L) = {valid.shape} (or a last axis of 1 "
                f"more), got {timesteps.shape}"
            )
        if not jnp.issubdtype(timesteps.dtype, jnp.floating):
            raise TypeError(f"{self._name}: integration_timesteps must be floating point, got {timesteps.dtype}")
        return jnp.where(valid, timesteps.reshape(valid.shape), 0)

    def _embed(self, x: Array, valid: Bool[Array, "B L"], rngs: Any) -> Float[Array, "B L H"]:
        x = jnp.where(valid if x.ndim == 2 else valid[..., None], x, 0)
        h = self.embedding(x, rngs=rngs) if x.ndim == 2 else x
        if self.dtype is not None:
            h = h.astype(self.dtype)
        if not self.has_embedding:
            h = self.input_proj(h)
        elif hasattr(self, "embed_proj"):
            h = self.embed_proj(h)
        return h if self.dtype is None else h.astype(self.dtype)


def head_width(owner: str, num_classes: int, output_dim: int) -> int:
    """Outputs of the head: `num_classes`, or `output_dim` if that is 0."""
    for name, value, least in (("num_classes", num_classes, 0), ("output_dim", output_dim, 0 if num_classes else 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner}: {name} must be an integer, at least {least}, got {value!r}")
    return num_classes or output_dim
