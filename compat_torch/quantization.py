"""Rounded weights of a language model, and what they cost on a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx import quant
from spyx.ops.scan import check_lengths


class WeightReport(NamedTuple):
    """What `quantize_weights` did; `str()` is a table.

    Attributes:
        layers: types, bits and bytes of each module; `layers.bytes_before` and `layers.bytes_after` are the sums.
        loss_before, loss_after: mean cross entropy of each next token of the text, in nats.
    """

    layers: quant.Report
    loss_before: float
    loss_after: float

    def __str__(self) -> str:
        return f"{self.layers}\nloss on the text: {self.loss_before:.4f} -> {self.loss_after:.4f} nats a token"


def quantize_weights(
    model: Any,
    text_ids: Int[Array, "B L"],
    weight_qtype: DTypeLike = "int8",
    *,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Any, WeightReport]:
    """A copy of a language model with the weights of its dense layers stored rounded, and a report.

    Embedding, a head tied to it, convolutions, norms, all that makes the recurrence (A_log, D, ...) and dense layers
    that are read without being called (x_proj of S7) stay as they are. The copy is called, steps, and
    generates as the model does. It takes less memory; on a CPU it is not faster. See `spyx.quant.quantize` for how to
    save it: `state_dict` and `save_pretrained` refuse rounded weights.

    Args:
        model: a language model of compat_torch.
        text_ids: integer, shape (B, L), L at least 2: the text that the loss is measured on.
        weight_qtype: as in `spyx.quant.weights_only_rules`; a format with tiles needs widths that are multiples.
        lengths: int, shape (B,): valid tokens of each row.

    Returns:
        `(model, report)`.

    Raises:
        ImportError: without qwix. ValueError: an unknown type, a model already quantised. ValueError, TypeError: as
            `mean_loss`.

    Source: see `spyx.quant`, which takes other rules too.
    """
    before = mean_loss(model, text_ids, lengths)
    rules = quant.weights_only_rules(weight_qtype, op_names=("dot_general",))
    rounded = quant.quantize(model, jnp.asarray(text_ids)[:, :1], rules=rules, mode="ptq")
    return rounded, WeightReport(quant.report(model, rounded), before, mean_loss(rounded, text_ids, lengths))


def mean_loss(model: Any, text_ids: Int[Array, "B L"], lengths: Int[Array, " B"] | None = None) -> float:
    """Mean cross entropy of each next token, in nats.

    Args:
        model: a language model of compat_torch.
        text_ids: integer, shape (B, L), L at least 2.
        lengths: int, shape (B,): valid tokens of each row.

    Raises:
        ValueError: no row has two valid tokens, ids outside the vocabulary, lengths that are not (B,). TypeError: ids
            or lengths that are not integers.
    """
    ids = jnp.asarray(text_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"mean_loss needs integer token ids (B, L), got {ids.dtype}")
    if lengths is not None:
        check_lengths(jnp.asarray(lengths), ids.shape[::-1])
    valid = jnp.full(ids.shape[:1], ids.shape[-1] if ids.ndim else 0) if lengths is None else jnp.asarray(lengths)
    if ids.ndim != 2 or ids.shape[1] < 2 or not (valid > 1).any():
        raise ValueError(f"mean_loss needs token ids (B, L) with at least 2 valid ones in a row, got {ids.shape}")
    ids = jnp.where(jnp.arange(ids.shape[1]) < valid[:, None], ids, 0)
    total, count, vocabulary = _next_token_loss(model, ids, valid)
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"mean_loss: token ids must be from 0 to {vocabulary - 1}, got {ids.min()} to {ids.max()}")
    return float(total / count)


@nnx.jit
def _next_token_loss(model: Any, ids: Int[Array, "B L"], lengths: Int[Array, " B"]) -> tuple[Array, Array, int]:
    logits: Float[Array, "B L V"] = model(ids[:, :-1]).logits
    each = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), ids[:, 1:, None], -1)[..., 0]
    counted = jnp.arange(1, ids.shape[1]) < lengths[:, None]
    return -jnp.sum(jnp.where(counted, each, 0)), jnp.sum(counted), logits.shape[-1]
