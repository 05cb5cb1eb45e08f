"""Tokens from a language model, in one compiled loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from . import interop
from ._sampling import Sampling, sample
from .random import default_rngs

__all__ = ["GenerationCache", "generate"]

_METHODS = ("prefill", "step", "allocate_inference_cache")
_SHORTEST_PREFILL = 16
_SHORTEST_BUFFER = 64
_FEWEST_ENDS = 4
_BETWEEN_CALLBACKS = 0.03  # seconds


class GenerationCache(NamedTuple):
    """Where a generation stands: a pytree of arrays, to be handed back to `generate`.

    Attributes:
        state: the model's cache after every token but the last of each row.
        pending: int (B,): the last token of each row.
        finished: bool (B,): rows that have ended with an `eos_token_id`.
        seen: bool (B, vocabulary): tokens of the row so far, for the repetition penalty.
    """

    state: Any
    pending: Int[Array, " B"]
    finished: Bool[Array, " B"]
    seen: Bool[Array, "B V"]


class _Loop(NamedTuple):
    """What the loop carries: `made` of the `tokens` of each row; `failed` if a row's logits were NaN."""

    cache: GenerationCache
    tokens: Int[Array, "B N"]
    made: Int[Array, ""]
    failed: Bool[Array, ""]


def generate(
    model: Any,
    input_ids: Any,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Any = None,
    rngs: nnx.Rngs | None = None,
    on_token: Callable[[np.ndarray], Any] | None = None,
    cache: Any = None,
    return_cache: bool = False,
) -> Any:
    """Continue token sequences: the prompt by the parallel form, then one compiled loop over `model.step`.

    Two programs are compiled, and again only for another shape: the prefill, for prompts padded to a power of two (16
    or more), and the loop, for `max_new_tokens` up to a power of two (64 or more). How tokens are chosen is not part
    of the shape. Call it outside of `jax.jit`.

    Args:
        model: a language model of compat_torch: it has `prefill`, `step` and `allocate_inference_cache`.
        input_ids: integer, shape (B, L): NumPy, JAX or torch. L = 0 only with a `GenerationCache`.
        max_new_tokens: at least 0.
        temperature: divides the logits before sampling; None or 0 takes the largest logit.
        top_k: sample among the k largest logits only (and those equal to the k-th).
        top_p: sample among the most probable tokens that together reach this probability, in (0, 1].
        repetition_penalty: positive; the logits of tokens that the row already has are divided by it where positive,
            multiplied where negative.
        eos_token_id: tokens that end a row.
        pad_token_id: fills rows that have ended; None is the first `eos_token_id`.
        attention_mask: 0 or 1, shape (B, L): 0 marks padding, anywhere in a row. Each row gives exactly the tokens
            that it gives alone, without its padding.
        rngs: stream `sample` of it is drawn from; None is the process-wide one (`compat_torch.manual_seed`).
        on_token: called with the new tokens, an int NumPy array (B,), in order: after every step of a slow model, in
            bursts of about 30 ms of a fast one. What it raises ends the generation.
        cache: where to continue: a `GenerationCache`, then `input_ids` are the tokens after those already there; or
            a cache of the model, which may have more room than needed (attention). It is left as it is.
        return_cache: return a `GenerationCache` too. A row that has ended goes on only if it is given new tokens.

    Returns:
        ids, of the kind and dtype of `input_ids`, shape (B, L + new): `input_ids` and after them the new tokens,
        `max_new_tokens` of them or as many as it took all rows to end; with `return_cache`, `(ids, cache)`.

    Raises:
        TypeError: not a language model, ids or mask that are not integers, a callback that cannot be called.
        ValueError: wrong shapes, a dtype of ids that cannot hold every token, ids outside of the vocabulary, an empty
            row, settings outside of their range, top_k or top_p without a temperature, a cache of another batch size;
            logits that are NaN, as those of an attention layer without room are.

    Source: order and meaning of penalty, temperature, top_k and top_p are those of transformers; nucleus sampling
    arXiv:1904.09751, repetition penalty arXiv:1909.05858.
    """
    if not issubclass(type(model), nnx.Module) or not all(hasattr(model, method) for method in _METHODS):
        raise TypeError(f"generate expects a language model of compat_torch, got {type(model).__name__}")
    vocabulary = _vocabulary(model)
    max_new_tokens = _whole("max_new_tokens", max_new_tokens, 0)
    settings = Sampling.of(temperature, top_k, top_p, repetition_penalty, vocabulary)
    ends = _ends(eos_token_id, vocabulary)
    if pad_token_id is not None and eos_token_id is None:
        raise ValueError("generate: pad_token_id fills the rows that have ended: it needs eos_token_id")
    pad = int(ends[0]) if pad_token_id is None else _whole("pad_token_id", pad_token_id, 0)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"generate: on_token must be callable, got {type(on_token).__name__}")
    given = _ids(input_ids, vocabulary)
    B = given.shape[0]
    rows, lengths = _compact(given, _mask(attention_mask, given.shape))
    state, finished, seen = cache, np.zeros(B, bool), np.zeros((B, vocabulary), bool)
    if isinstance(cache, GenerationCache):
        if cache.seen.shape != seen.shape:
            raise ValueError(f"generate: the cache is for (rows, vocabulary) {cache.seen.shape}, got {seen.shape}")
        finished, seen = np.asarray(cache.finished) & (lengths == 0), np.array(cache.seen)
        rows, lengths = np.concatenate([np.asarray(cache.pending)[:, None], rows], 1), lengths + 1
        state = cache.state
    if not lengths.all():
        raise ValueError(f"generate: rows {np.flatnonzero(lengths == 0).tolist()} have no token to start from")
    np.put_along_axis(seen, np.where(np.arange(rows.shape[1]) < lengths[:, None], rows, rows[:, :1]), True, 1)
    pending = np.take_along_axis(rows, lengths[:, None] - 1, 1)[:, 0]
    before = rows.shape[1] - 1
    room, buffer = _power_of_two(before, _SHORTEST_PREFILL), _power_of_two(max_new_tokens, _SHORTEST_BUFFER)
    if (lengths > 1).any():
        prompt = np.pad(rows[:, :-1], ((0, 0), (0, room - before)))
        state = _prefill(model, room + buffer, prompt, lengths - 1, state)
    elif state is None:
        state = model.allocate_inference_cache(B, room + buffer)
    else:
        state = jax.tree.map(jnp.array, state)
    # NumPy's, which cost less to make than JAX's outside of a program
    begin: tuple[Any, ...] = np.zeros((B, buffer), np.int32), np.int32(0), np.bool_(False)
    seen_so_far: tuple[Any, ...] = pending, finished, seen
    loop = _Loop(GenerationCache(state, *seen_so_far), *begin)
    key = default_rngs(rngs).sample() if settings.temperature > 0 else _any_key()
    advance = partial(_advance, model, return_cache, key, settings, ends, np.int32(pad))
    if on_token is None:
        loop = advance(np.int32(max_new_tokens), loop)
    else:
        loop = _stream(advance, max_new_tokens, loop, on_token)
    if loop.failed:
        raise ValueError(
            f"generate: the logits after {int(loop.made) - 1} new tokens are NaN: the weights are, or the cache given "
            "has no room for so many tokens"
        )
    new = np.asarray(loop.tokens)[:, : int(loop.made)]
    ids = _like(input_ids, np.concatenate([given, new], 1))
    return (ids, loop.cache) if return_cache else ids


def _stream(advance: Callable, max_new_tokens: int, loop: _Loop, on_token: Callable[[np.ndarray], Any]) -> _Loop:
    """The loop in pieces of about `_BETWEEN_CALLBACKS`."""
    done, piece = 0, 1
    while done < max_new_tokens:
        started = time.perf_counter()
        loop = advance(np.int32(min(done + piece, max_new_tokens)), loop)
        count, failed = int(loop.made), bool(loop.failed)
        if failed:
            break
        elapsed = time.perf_counter() - started
        for tokens in np.asarray(loop.tokens)[:, done:count].T:
            on_token(tokens)
        if count < done + piece:
            break
        piece = max(1, min(2 * piece, int(_BETWEEN_CALLBACKS * piece / elapsed)))
        done = count
    return loop


@partial(jax.jit, static_argnums=1)
def _prefill(model, room: int, ids, lengths, state):
    state = model.allocate_inference_cache(len(ids), room) if state is None else state
    return model.prefill(ids, state, lengths=lengths)[1]


@partial(jax.jit, static_argnums=1, donate_argnames="loop")
def _advance(model, keep, key, settings, ends, pad, stop, loop: _Loop) -> _Loop:
    """Steps until `stop` tokens are there or all rows have ended; with `keep` the state of such rows stands still."""
    rows, (leaves, structure) = jnp.arange(loop.tokens.shape[0]), jax.tree.flatten(model)

    def going(loop: _Loop):
        return (loop.made < stop) & ~jnp.all(loop.cache.finished) & ~loop.failed

    def body(loop: _Loop) -> _Loop:
        state, pending, finished, seen = loop.cache
        # variables of this level of tracing, which a step may change
        out, after = jax.tree.unflatten(structure, leaves).step(pending[:, None], state)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        if keep:
            after = jax.tree.map(lambda new, old: jnp.where(_along(finished, new), old, new), after, state)
        logits = out.logits[:, 0, : seen.shape[1]]
        failed = jnp.any(jnp.isnan(jnp.max(logits, -1)) & ~finished)
        chosen = sample(jax.random.fold_in(key, loop.made), logits, seen, settings)
        pending = jnp.where(finished, pending, chosen)
        seen = seen.at[rows, pending].set(True)
        tokens = jax.lax.dynamic_update_slice(
            loop.tokens, jnp.where(finished, pad, chosen)[:, None], (jnp.int32(0), loop.made)
        )
        finished = finished | jnp.any(chosen[:, None] == ends, -1)
        return _Loop(GenerationCache(after, pending, finished, seen), tokens, loop.made + 1, failed)

    return jax.lax.while_loop(going, body, loop)


@cache
def _any_key() -> Array:
    """What takes the place of a key where nothing is drawn."""
    return jax.random.key(0)


def _along(rows: Bool[Array, " B"], leaf: Array) -> Array:
    """`rows` with as many axes as `leaf`, whose first is the batch."""
    return rows.reshape(rows.shape + (1,) * (leaf.ndim - 1))


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def _vocabulary(model: Any) -> int:
    """Tokens that exist: embedding and head may have more rows."""
    size = getattr(model, "vocab_size", None)
    return model.config.vocab_size if size is None else size


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"generate: {name} must be an integer, at least {least}, got {value!r}")
    return int(value)


def _ends(eos_token_id: Any, vocabulary: int) -> Int[np.ndarray, " E"]:
    """The tokens that end a row, and -1, which none is, so that a few and none have one shape."""
    ends = [] if eos_token_id is None else [eos_token_id]
    if isinstance(eos_token_id, Sequence | np.ndarray):
        ends = list(eos_token_id)
    for token in ends:
        if _whole("eos_token_id", token, 0) >= vocabulary:
            raise ValueError(f"generate: eos_token_id must be below the vocabulary of {vocabulary}, got {token}")
    return np.array(ends + [-1] * (_FEWEST_ENDS - len(ends)), np.int32)


def _ids(input_ids: Any, vocabulary: int) -> Int[np.ndarray, "B L"]:
    ids = interop.to_numpy(input_ids) if interop.is_torch(input_ids) else np.asarray(input_ids)
    if ids.ndim != 2 or not ids.shape[0]:
        raise ValueError(f"generate expects token ids (B, L) with B at least 1, got shape {ids.shape}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"generate expects integer token ids (B, L), got {ids.dtype}")
    if ids.size and vocabulary - 1 > np.iinfo(ids.dtype).max:
        raise ValueError(f"generate: {ids.dtype} ids cannot hold all {vocabulary} tokens of the model: pass int32")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"generate: token ids must be in [0, {vocabulary}), got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "B L"]:
    if attention_mask is None:
        return np.ones(shape, bool)
    mask = interop.to_numpy(attention_mask) if interop.is_torch(attention_mask) else np.asarray(attention_mask)
    if mask.shape != shape:
        raise ValueError(f"generate: attention_mask must have the shape of input_ids, {shape}, got {mask.shape}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("generate: attention_mask must be 0 for padding and 1 elsewhere, got other values")
    return mask.astype(bool)


def _compact(ids: Int[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]):
    """The tokens that count moved to the left of each row, and how many they are."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), mask.sum(1)


def _like(given: Any, ids: Int[np.ndarray, "B N"]) -> Any:
    """`ids` of the kind and dtype of `given`; NumPy for sequences."""
    if interop.is_torch(given):
        return given.new_tensor(ids)
    if isinstance(given, jax.Array):
        return jnp.asarray(ids, given.dtype)
    return ids.astype(given.dtype) if isinstance(given, np.ndarray) else ids
