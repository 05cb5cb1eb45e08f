"""Pooling of sequences with lengths: over all steps, or over windows of them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spyx.ops.dtypes import widen
from spyx.ops.scan import check_lengths

from ..core.discretization import Reference
from ..interop import torch_in_torch_out

Pooling = Literal["mean", "last", "max"]
IntermediatePooling = Literal["none", "stride", "mean", "max"]
Pooled = tuple[Float[Array, "..."], Float[Array, "B L"] | None, Int[Array, " B"] | None]


class SequencePooling(nnx.Module):
    """One vector of a sequence, or with `stride` > 1 one of every `stride` steps.

    Args:
        pooling_type: "last", "mean" or "max" of the valid steps; with `stride` > 1 "stride" (the first of each window),
            "mean" or "max".
        stride: steps of a window.
        reference: see the table.

    A row without valid steps pools to 0.

    | stride > 1 | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | windows of "mean" and "max" | the L // stride whole ones: what is left of L is dropped | all |
    | "mean" | divides by stride, where part of the window is padding too | divides by the number of valid steps |
    | integration_timesteps of "stride" | those of the steps that are kept | summed over the window |

    Under "paper" a padded row is therefore pooled as it is without its padding, whatever its length.

    Not as in lrnnx 1.0.0, whatever `reference`: there a "max" window of padding alone is -1e9, which drowns whatever
    goes through an FFT with it, and the sums of `integration_timesteps` contain those of the padding.

    Raises:
        ValueError: unknown pooling_type, or one that does not go with `stride`; stride not a positive integer.

    Source: Event-SSM (arXiv:2404.18508); lrnnx 1.0.0 `lrnnx.architectures.classifier`.
    """

    def __init__(self, pooling_type: str = "last", stride: int = 1, *, reference: Reference = "lrnnx"):
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise ValueError(f"SequencePooling: stride must be a positive integer, got {stride!r}")
        known = get_args(Pooling) if stride == 1 else get_args(IntermediatePooling)[1:]
        if pooling_type not in known:
            raise ValueError(
                f"SequencePooling: pooling_type must be one of {known} with stride={stride}, got {pooling_type!r}"
            )
        if reference not in get_args(Reference):
            raise ValueError(f"SequencePooling: reference must be one of {get_args(Reference)}, got {reference!r}")
        self.pooling_type, self.stride, self.reference = pooling_type, stride, reference

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        lengths: Int[Array, " B"] | int | None = None,
        integration_timesteps: Float[Array, "B L"] | None = None,
    ) -> Pooled:
        """`(x, integration_timesteps, lengths)` after pooling.

        Args:
            x: shape (B, L, H).
            lengths: valid steps of each row; the rest, even NaN, reaches nothing.
            integration_timesteps: time since the event before, shape (B, L).

        Returns:
            x (B, H), and the others as they came; with `stride` > 1 x (B, L', H), integration_timesteps (B, L')
            summed over the windows, and the number of windows with a valid step of each row.

        Raises:
            ValueError: wrong rank, or lrnnx's "mean" or "max" of fewer than `stride` steps. TypeError: lengths that are
                not integers.
        """
        x = jnp.asarray(x)
        if x.ndim != 3:
            raise ValueError(f"SequencePooling expects (B, L, H), got shape {x.shape}")
        B, L, _ = x.shape
        lengths = per_row(lengths, B, L)
        valid = valid_steps(lengths, B, L)
        if self.stride == 1:
            return self._of_all(x, valid), integration_timesteps, lengths
        kept = L if self.pooling_type == "stride" or self.reference == "paper" else L // self.stride * self.stride
        if kept == 0 and self.pooling_type != "stride" and self.reference == "lrnnx":
            raise ValueError(
                f"SequencePooling: {self.pooling_type!r} needs at least stride = {self.stride} steps, got {L}; "
                'reference="paper" pools fewer'
            )
        if integration_timesteps is not None:
            integration_timesteps = self._of_timesteps(integration_timesteps, valid, kept)
        if self.pooling_type == "stride":
            x = x[:, :: self.stride]
        else:
            x = self._of_windows(self._windows(x, kept), self._windows(valid, kept))
        if lengths is not None:
            lengths = jnp.minimum(-(-lengths // self.stride), x.shape[1])
        return x, integration_timesteps, lengths

    def _of_all(self, x: Float[Array, "B L H"], valid: Bool[Array, "B L"]) -> Float[Array, "B H"]:
        if self.pooling_type == "last":
            last = jnp.max(jnp.where(valid, jnp.arange(x.shape[1]), -1), 1, initial=-1)
            found = jnp.take_along_axis(x, last[:, None, None], 1, mode="fill", fill_value=0)[:, 0]
            return jnp.where(last[:, None] < 0, 0, found)
        if self.pooling_type == "mean":
            return _mean(x, valid)
        return _max(x, valid)

    def _of_windows(self, x: Float[Array, "B W K H"], valid: Bool[Array, "B W K"]) -> Float[Array, "B W H"]:
        if self.pooling_type == "max":
            return _max(x, valid)
        return _mean(x, valid, self.stride if self.reference == "lrnnx" else None)

    def _of_timesteps(self, timesteps: Any, valid: Bool[Array, "B L"], kept: int) -> Float[Array, "B W"]:
        timesteps = jnp.where(valid, jnp.asarray(timesteps).reshape(valid.shape), 0)
        if self.pooling_type == "stride" and self.reference == "lrnnx":
            return timesteps[:, :: self.stride]
        return jnp.sum(self._windows(timesteps, kept), 2)

    def _windows(self, x: Array, kept: int) -> Array:
        """The first `kept` steps in windows of `stride`, (B, W, K, ...), filled up with zeros."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, -kept % self.stride)
        return jnp.pad(x[:, :kept], widths).reshape(x.shape[0], -(-kept // self.stride), self.stride, *x.shape[2:])


def per_row(lengths: Any, B: int, L: int) -> Int[Array, " B"] | None:
    """`lengths` of each row from an integer, an array (B,), or None.

    Raises:
        ValueError: wrong shape. TypeError: not integers.
    """
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.ndim == 0:
        lengths = jnp.broadcast_to(lengths, (B,))
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape (B,) = {(B,)}, or be one integer, got shape {lengths.shape}")
    check_lengths(lengths, (L, B))
    return jnp.clip(lengths.astype(jnp.int32), 0, L)


def valid_steps(lengths: Int[Array, " B"] | None, B: int, L: int) -> Bool[Array, "B L"]:
    """Which steps of each row count."""
    return jnp.ones((B, L), bool) if lengths is None else jnp.arange(L) < lengths[:, None]


def _mean(x: Float[Array, "*B K H"], valid: Bool[Array, "*B K"], count: int | None = None) -> Float[Array, "*B H"]:
    """Of the valid steps, or their sum over `count`; 0 if there are none. Sums are float32 or wider."""
    total = jnp.sum(widen(jnp.where(valid[..., None], x, 0)), -2)
    if count is None:
        return (total / jnp.maximum(jnp.sum(valid, -1), 1)[..., None]).astype(x.dtype)
    return (total / count).astype(x.dtype)


def _max(x: Float[Array, "*B K H"], valid: Bool[Array, "*B K"]) -> Float[Array, "*B H"]:
    """Of the valid steps; 0 if there are none.

    By index: the gradient of a maximum goes to the values equal to it, and a value that the compiler computes once more
    for its gradient may differ by a rounding.
    """
    if x.shape[-2] == 0:
        return jnp.zeros((*x.shape[:-2], x.shape[-1]), x.dtype)
    at = jnp.argmax(jnp.where(valid[..., None], x, -jnp.inf), -2, keepdims=True)
    largest = jnp.take_along_axis(x, at, -2)[..., 0, :]
    return jnp.where(jnp.any(valid, -1)[..., None], largest, 0)
