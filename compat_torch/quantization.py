"""Rounded weights of a language model, and what they cost on a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from spyx import quant


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

    Embedding, a head tied to it, convolutions, norms and all that makes the recurrence (A_log, D, ...) stay as they
    are. The copy is called, steps, and generates as the model does. It takes less memory; on a CPU it is not faster.

    Args:
        model: a language model of compat_torch.
        text_ids: integer, shape (B, L), L at least 2: the text that the loss is measured on.
        weight_qtype: as in `spyx.quant.weights_only_rules`.
        lengths: int, shape (B,): valid tokens of each row.

    Returns:
        `(model, report)`.

    Raises:
        ImportError: without qwix. ValueError: an unknown type, a text without a next token, a model already quantised.

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
        ValueError: no row has two valid tokens.
    """
    ids = jnp.asarray(text_ids)
    valid = jnp.full(ids.shape[0], ids.shape[-1]) if lengths is None else jnp.asarray(lengths)
    if ids.ndim != 2 or not (valid > 1).any():
        raise ValueError(f"mean_loss needs token ids (B, L) with at least 2 valid ones in a row, got {ids.shape}")
    total, count = _next_token_loss(model, ids, valid)
    return float(total / count)


@nnx.jit
def _next_token_loss(model: Any, ids: Int[Array, "B L"], lengths: Int[Array, " B"]) -> tuple[Array, Array]:
    logits: Float[Array, "B L V"] = model(ids[:, :-1]).logits
    each = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), ids[:, 1:, None], -1)[..., 0]
    counted = jnp.arange(1, ids.shape[1]) < lengths[:, None]
    return -jnp.sum(jnp.where(counted, each, 0)), jnp.sum(counted)
