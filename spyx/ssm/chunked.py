"""A two-level hierarchy of layers: every step, and every chunk of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..ops.dtypes import state_dtype, widen
from ._chunks import find_chunks, running_mean, take
from ._layer import Lengths, Reset, SequenceLayer, check_masks, clear_padding, flip, flip_reset

Pool = Literal["mean", "last"]


class ChunkedState(NamedTuple):
    """What a `ChunkedSSM` carries; the last three are None unless it is causal, `total` also for pool="last"."""

    inner: Any
    outer: Any
    position: Int[Array, " B"] | None
    """Steps of the open chunk."""
    total: Float[Array, "B D"] | None
    """Sum of the inner outputs over the open chunk."""
    held: Float[Array, "B D"] | None
    """Output of the outer layer for the chunk before the open one."""


class ChunkedSSM(SequenceLayer):
    """An inner layer over all steps, and an outer layer over one summary of each chunk of steps.

    h = inner(u); each chunk of h is pooled; o = outer(summaries); y = h + o, with o repeated over a chunk. A summary
    thereby reaches earlier steps of its own chunk: the layer is not causal, has no `step`, and carries its state
    between calls that are split at multiples of chunk_size. With causal=True each chunk receives the outer output of
    the chunk before it, zero for the first: then any length is taken, calls may be split anywhere, and `step` exists.

    A reset starts a new chunk, so that it equals two sequences one after the other. Only a whole chunk has a
    summary when causal; otherwise the last chunk before a reset or a length may be short.

    Args:
        inner, outer: layers of one width, such as those of `spyx.ssm`. Any callable (T, B, D) -> (T, B, D) will do
            for a call with nothing but the input.
        chunk_size: steps of a chunk.
        pool: the summary of a chunk is the "mean" over its steps or its "last" step.
        causal: see above.
        reverse: run from the last step to the first (no `step`).
        dtype: of the input of `inner`, and so usually of the output; None leaves it. Parameters, their dtype and
            the precision are those of `inner` and `outer`.

    Raises:
        ValueError: a chunk_size that is not a positive integer, unknown `pool`, widths that differ.
        TypeError: inner or outer cannot be called.

    Source: spyx 1.0.0; the hierarchy is that of H-Net (arXiv:2507.07955), with chunks of fixed size.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        outer: Callable[..., Any],
        *,
        chunk_size: int,
        pool: Pool = "mean",
        causal: bool = False,
        reverse: bool = False,
        dtype: DTypeLike | None = None,
    ):
        super().__init__(reverse=reverse, dtype=dtype)
        self._check_sizes(chunk_size=chunk_size)
        if pool not in get_args(Pool):
            raise ValueError(f"ChunkedSSM: pool must be one of {get_args(Pool)}, got {pool!r}")
        for name, layer in (("inner", inner), ("outer", outer)):
            if not callable(layer):
                raise TypeError(f"ChunkedSSM: {name} must be callable, got {type(layer).__name__}")
        self.inner: Any = inner
        self.outer: Any = outer
        self.chunk_size, self.pool, self.causal = chunk_size, pool, bool(causal)
        widths = {width for width in map(_width, (inner, outer)) if width is not None}
        if len(widths) > 1:
            raise ValueError(f"ChunkedSSM: inner has width {_width(inner)}, outer {_width(outer)}; they must be equal")

    @property
    def d_model(self) -> int | None:
        """The width, None if neither inner nor outer tells theirs."""
        inner = _width(self.inner)
        return _width(self.outer) if inner is None else inner

    def initial_state(self, batch_size: int) -> ChunkedState:
        """Zero state for `batch_size` rows.

        Raises:
            TypeError: inner or outer has no state, or runs in reverse. ValueError: the width is not known.
        """
        self._require_layers("a state")
        inner, outer = self.inner.initial_state(batch_size), self.outer.initial_state(batch_size)
        if not self.causal:
            return ChunkedState(inner, outer, None, None, None)
        if self.d_model is None:
            raise ValueError("ChunkedSSM: the state needs the width, an attribute d_model of inner or outer")
        leaves = [leaf for leaf in jax.tree.leaves((inner, outer)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        zeros = jnp.zeros((batch_size, self.d_model), state_dtype(*leaves))
        position = jnp.zeros((batch_size,), jnp.int32)
        return ChunkedState(inner, outer, position, zeros if self.pool == "mean" else None, zeros)

    def __call__(
        self,
        u: Float[Array, "T B H"],
        state: ChunkedState | None = None,
        *,
        return_state: bool = False,
        lengths: Lengths = None,
        reset: Reset = None,
    ) -> Any:
        """Run both levels over a time-major sequence.

        Args:
            u: real floating point, shape (T, B, d_model); T is a multiple of chunk_size unless causal.
            state: state before the first step in scan direction; None is zero.
            return_state: also return the last state computed.
            lengths: int (B,): valid steps of each row, any number; outputs past them are 0 and the state
                returned is the one at the last valid step.
            reset: bool (T,) or (T, B): where true the state is cleared before that step and a new chunk starts.
                Unless causal, the outer layer then makes up to T steps instead of T / chunk_size.

        Returns:
            y of shape (T, B, d_model), in the dtype of the inner output; with `return_state`, `(y, state)`.

        Raises:
            ValueError: wrong rank or width, T is not a multiple of chunk_size.
            TypeError: wrong dtype, a state that is no `ChunkedState`, or more than the input given while
                inner or outer has no state or runs in reverse.
        """
        u = self._input(u)
        lengths, reset = check_masks(u, lengths, reset)
        if not self.causal and u.shape[0] % self.chunk_size:
            raise ValueError(f"ChunkedSSM: length {u.shape[0]} is not a multiple of chunk_size {self.chunk_size}")
        v = u
        if self.reverse:
            v, reset = flip(u, lengths), flip_reset(reset, lengths)
        if state is None and lengths is None and reset is None and not return_state:
            y, new = self._plain(v), None
        else:
            y, new = self._streamed(v, state, lengths, reset)
        if self.reverse:
            y = flip(y, lengths)
        return (y, new) if return_state else y

    def step(self, u_t: Float[Array, "B H"], state: ChunkedState) -> tuple[Float[Array, "B H"], ChunkedState]:
        """One step: `(y_t, state)` from u_t (B, d_model) and the state before it.

        Raises:
            ValueError: wrong rank or width; the layer is not causal or is reversed.
            TypeError: wrong dtype, a state that is no `ChunkedState`; inner or outer has no `step`.
        """
        self._refuse_reversed_step()
        if not self.causal:
            raise ValueError("ChunkedSSM with causal=False needs whole chunks: it has no step. Use causal=True.")
        self._require_layers("a step")
        u_t = self._input(u_t, step=True)
        before = self._checked(state)
        position: Any = before.position
        held: Any = before.held
        h, inner = self.inner.step(u_t, before.inner)
        summary, total = h, before.total
        if total is not None:
            total = (jnp.where((position == 0)[:, None], 0, total) + widen(h)).astype(total.dtype)
            summary = (total / self.chunk_size).astype(h.dtype)
        done = position == self.chunk_size - 1

        def ended(outer, held):
            o, new = self.outer.step(summary, outer)
            return _where(done, (new, o), (outer, held))

        outer, new_held = jax.lax.cond(jnp.any(done), ended, lambda *same: same, before.outer, held)
        position = (position + 1) % self.chunk_size
        return (h + held).astype(h.dtype), ChunkedState(inner, outer, position, total, new_held)

    def _plain(self, u: Float[Array, "T B H"]) -> Float[Array, "T B H"]:
        h = self.inner(u)
        whole = h.shape[0] // self.chunk_size
        chunks = h[: whole * self.chunk_size].reshape(whole, self.chunk_size, *h.shape[1:])
        summaries = chunks[:, -1] if self.pool == "last" else jnp.mean(widen(chunks), axis=1).astype(h.dtype)
        o = self.outer(summaries)
        if self.causal:
            o = jnp.concatenate([jnp.zeros_like(o, shape=(1, *o.shape[1:])), o])
        return (h + jnp.repeat(o, self.chunk_size, axis=0)[: h.shape[0]]).astype(h.dtype)

    def _streamed(self, u, state: ChunkedState | None, lengths: Lengths, reset: Reset) -> tuple[Array, ChunkedState]:
        self._require_layers("state, return_state, lengths and reset")
        (T, B), size = u.shape[:2], self.chunk_size
        before = self.initial_state(B) if state is None else self._checked(state)
        if T == 0:
            return u, before
        h, inner = self.inner(u, before.inner, return_state=True, lengths=lengths, reset=reset)
        chunks = find_chunks((T, B), size, before.position, lengths, reset)
        pooled, total = h, before.total
        if self.pool == "mean":
            start = jnp.zeros(h.shape[1:], widen(h).dtype) if total is None else total
            pooled, total = running_mean(h, chunks, start, lengths)
        o, outer = self.outer(
            take(pooled, chunks.ends).astype(h.dtype), before.outer, return_state=True,
            lengths=chunks.number, reset=None if reset is None else chunks.fresh,
        )  # fmt: skip
        stale = chunks.stale()
        if reset is not None:
            outer = _where(stale, self.outer.initial_state(B), outer)
        if before.held is None:
            y = clear_padding(h + take(o, chunks.before), lengths).astype(h.dtype)
            return y, ChunkedState(inner, outer, None, None, None)
        held = jnp.concatenate([before.held[None], o.astype(jnp.result_type(before.held, o))])
        since = take(chunks.ends_or_start, chunks.before)
        seen = jnp.where((chunks.last_reset > since)[..., None], 0, take(held, chunks.before))
        y = clear_padding(h + seen, lengths).astype(h.dtype)
        last = jnp.where(stale[:, None], 0, take(held, chunks.number[None])[0])
        return y, ChunkedState(inner, outer, chunks.position, total if before.total is not None else None, last)

    def _require_layers(self, what: str) -> None:
        for name, layer in (("inner", self.inner), ("outer", self.outer)):
            if not (hasattr(layer, "initial_state") and hasattr(layer, "step")) or getattr(layer, "reverse", False):
                raise TypeError(
                    f"ChunkedSSM: {what} needs layers with `initial_state` and `step` that do not run in reverse; "
                    f"{name} is {type(layer).__name__}{'(reverse=True)' if getattr(layer, 'reverse', False) else ''}"
                )

    def _checked(self, state: ChunkedState) -> ChunkedState:
        if not isinstance(state, ChunkedState) or (state.held is not None) != self.causal:
            raise TypeError(
                f"ChunkedSSM with causal={self.causal} expects the ChunkedState of its initial_state, "
                f"got {type(state).__name__}"
            )
        return state


def _width(layer: Any) -> int | None:
    return getattr(layer, "d_model", getattr(layer, "d_inner", None))


def _where(rows, new, old):
    """`new` in the rows (B,) where true, else `old`, in the dtypes of `old`; arrays have the rows first."""

    def pick(a, b):
        return jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a, b).astype(b.dtype)

    return jax.tree.map(pick, new, old)
