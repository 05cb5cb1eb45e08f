"""Which steps form a chunk, when chunks start anew at every reset. Pure functions on arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..ops import linear_scan
from ..ops.dtypes import widen
from ..ops.scan import valid_steps
from ._layer import Lengths, Reset


class Chunks(NamedTuple):
    """The chunks of each row; K bounds their number, entries from `number` on are meaningless."""

    phase: Int[Array, "T B"]
    """Steps since the start of the chunk."""
    before: Int[Array, "T B"]
    """How many chunks have ended before a step."""
    ends: Int[Array, "K B"]
    """Last step of each chunk."""
    number: Int[Array, " B"]
    """How many chunks end."""
    last_reset: Int[Array, "T B"]
    """The last valid reset up to a step, -1 if there is none."""
    position: Int[Array, " B"]
    """Steps of the unfinished chunk after the last valid step."""

    @property
    def ends_or_start(self) -> Int[Array, "K1 B"]:
        """-1, then `ends`: when the chunk before each one ended."""
        return jnp.concatenate([jnp.full_like(self.ends, -1, shape=(1, *self.ends.shape[1:])), self.ends])

    @property
    def fresh(self) -> Bool[Array, "K B"]:
        """Whether a reset lies between the end of a chunk and that of the one before."""
        return take(self.last_reset, self.ends) > self.ends_or_start[:-1]

    def stale(self) -> Bool[Array, " B"]:
        """Whether a reset comes after the last chunk that ended."""
        return self.last_reset[-1] > take(self.ends_or_start, self.number[None])[0]


def find_chunks(
    shape: tuple[int, int], size: int, position: Int[Array, " B"] | None, lengths: Lengths, reset: Reset
) -> Chunks:
    """The chunks of T > 0 steps, each `size` steps long.

    Args:
        shape: (T, B).
        size: steps of a chunk.
        position: steps of the chunk that is open before the first step; None: every chunk must end within
            the sequence, if need be short, before a reset or at the last valid step.
        lengths, reset: as the layers take them.
    """
    T, B = shape
    steps = jnp.arange(T, dtype=jnp.int32)[:, None]
    lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    valid = valid_steps(lengths, T, 2)
    resets = valid & (jnp.zeros((T, B), bool) if reset is None else reset.reshape(T, -1))
    last_reset = jax.lax.cummax(jnp.where(resets, steps, -1))
    opened = jnp.zeros((B,), jnp.int32) if position is None else position
    origin = jnp.where(last_reset >= 0, last_reset, -opened)
    phase = (steps - origin) % size
    end = phase == size - 1
    most = (T + size - 1) // size
    if position is None:
        end |= jnp.roll(resets, -1, axis=0).at[-1].set(False) | (steps == lengths - 1)
        most = most if reset is None else T
    end &= valid
    before = jnp.cumsum(end, axis=0, dtype=jnp.int32) - end
    ends = jnp.zeros((most, B), jnp.int32)
    ends = ends.at[jnp.where(end, before, most), jnp.arange(B)].set(jnp.broadcast_to(steps, (T, B)), mode="drop")
    return Chunks(phase, before, ends, jnp.sum(end, 0, jnp.int32), last_reset, (lengths - origin[-1]) % size)


def take(v: Array, index: Int[Array, "K B"]) -> Array:
    """v[index[k, b], b] for `v` (T, B, ...); an index out of range is moved to the nearest one."""
    index = index.reshape(index.shape + (1,) * (v.ndim - 2))
    return jnp.take_along_axis(v, index, axis=0, mode="clip")


def running_mean(
    h: Float[Array, "T B D"], chunks: Chunks, total: Float[Array, "B D"], lengths: Lengths
) -> tuple[Float[Array, "T B D"], Float[Array, "B D"]]:
    """(mean of each chunk up to every step, sum over the chunk open after the last valid one), float32 or wider."""
    sums, total = linear_scan(jnp.ones(()), widen(h), total, reset=chunks.phase == 0, lengths=lengths)
    return sums / (chunks.phase[..., None] + 1), total
