"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """Settings as arrays, so that other values are no other program.

    Attributes:
        temperature: 0 takes the largest logit.
        top_k: how many of the largest logits are left; the vocabulary is all of them.
        top_p: probability that is left; 1 is all of it.
        repetition_penalty: 1 is none.
    """

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    repetition_penalty: np.float32

    @classmethod
    def of(
        cls,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float | None,
        vocabulary: int,
    ) -> Sampling:
        """Checked settings; None is without.

        Raises:
            ValueError: out of range, or top_k or top_p without a temperature.
        """
        temperature = 0.0 if temperature is None else temperature
        if not _is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"generate: temperature must be a number, at least 0, got {temperature!r}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
            raise ValueError(f"generate: top_k must be a positive integer, got {top_k!r}")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"generate: top_p must be in (0, 1], got {top_p!r}")
        penalty = 1.0 if repetition_penalty is None else repetition_penalty
        if not _is_number(penalty) or not 0 < penalty < math.inf:
            raise ValueError(f"generate: repetition_penalty must be a positive number, got {penalty!r}")
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise ValueError(
                f"generate: top_k={top_k} and top_p={top_p} need a temperature: without one the largest logit is taken"
            )
        return cls(
            np.float32(temperature), np.int32(min(top_k or vocabulary, vocabulary)),
            np.float32(1 if top_p is None else top_p), np.float32(penalty),
        )  # fmt: skip


def sample(
    key: Key[Array, ""], logits: Float[Array, "B V"], seen: Bool[Array, "B V"], settings: Sampling
) -> Int[Array, " B"]:
    """The next token of each row.

    Args:
        key: for sampling.
        logits: (B, vocabulary), any floating point.
        seen: tokens that the row already has.
        settings: see `Sampling`.
    """
    logits = penalised(logits, seen, settings)
    return jax.lax.cond(
        settings.temperature > 0,
        lambda: jax.random.categorical(key, filtered(logits, settings)).astype(jnp.int32),
        lambda: jnp.argmax(logits, -1).astype(jnp.int32),
    )


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], settings: Sampling) -> Float[Array, "B V"]:
    """Logits in float32 after the repetition penalty."""
    logits = logits.astype(jnp.float32)
    penalty = settings.repetition_penalty
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Float[Array, "B V"], settings: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature; -inf where top_k, and then top_p, leave a token out."""
    logits = logits / settings.temperature
    narrowing = (settings.top_k < logits.shape[-1]) | (settings.top_p < 1)
    return jax.lax.cond(narrowing, lambda: _narrowed(logits, settings), lambda: logits)


def _narrowed(logits: Float[Array, "B V"], settings: Sampling) -> Float[Array, "B V"]:
    count = _threshold(logits, jnp.ones_like(logits), settings.top_k.astype(jnp.float32))
    logits = jnp.where(logits < count, -jnp.inf, logits)
    mass = _threshold(logits, jax.nn.softmax(logits, -1), settings.top_p)
    return jnp.where((logits < mass) & (settings.top_p < 1), -jnp.inf, logits)


def _threshold(x: Float[Array, "B V"], weights: Float[Array, "B V"], goal: ArrayLike) -> Float[Array, "B 1"]:
    """The largest t of each row for which the weights where x >= t reach the goal; found bit by bit, without a sort."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    ordered = jnp.where(bits >> 31, ~bits, bits | _SIGN)

    def body(n, found):
        candidate = found | (_SIGN >> n.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(ordered >= candidate, weights, 0), -1, keepdims=True) >= goal
        return jnp.where(reached, candidate, found)

    found = jax.lax.fori_loop(0, 32, body, jnp.zeros((x.shape[0], 1), jnp.uint32))
    bits = jnp.where(found >> 31, found & ~_SIGN, ~found)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


_SIGN = np.uint32(1 << 31)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
