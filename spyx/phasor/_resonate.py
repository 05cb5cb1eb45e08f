"""Neurons that oscillate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Num

from ..axn import Activation, superspike
from ..nn._neuron import Shape, as_shape
from ..ops import linear_scan
from ._codes import unit


class ResonateFire(nnx.Module):
    """Resonate-and-fire neurons without reset: z_t = a z_{t-1} + x_t, spike where Re(z_t) > threshold.

    a = exp(dt (-lambda + i omega)) with lambda = softplus(raw_lambda), so |a| <= 1. Without a reset the recurrence is
    linear: `parallel` runs a whole sequence by `spyx.ops.linear_scan` and equals calling step by step.

    Args:
        hidden_shape: shape of the layer, without batch.
        lambda_init: decay, >= 0, one for all units; None draws one for each.
        omega_init: angular frequency in radians per time unit, one for all units; None draws one for each, around 1.
        threshold: of the real part.
        dt: time step.
        activation: spike function of Re(z) - threshold; None is `spyx.axn.superspike()`.
        rngs: random streams; a key of `params` for each of lambda, omega that is drawn, in this order.

    Parameters: raw_lambda, omega: hidden_shape, or () where given.

    Raises:
        ValueError: bad `hidden_shape`, dt not positive, or lambda_init negative.

    Source: Izhikevich 2001, Resonate-and-fire neurons (Neural Networks 14); without reset, arXiv:2504.00719.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        lambda_init: float | None = None,
        omega_init: float | None = None,
        threshold: float = 1.0,
        dt: float = 1.0,
        activation: Activation | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        if not dt > 0:
            raise ValueError(f"ResonateFire: dt must be positive, got {dt}")
        if lambda_init is not None and not lambda_init >= 0:
            raise ValueError(f"ResonateFire: lambda_init must be at least 0, got {lambda_init}")
        self.hidden_shape = as_shape("ResonateFire: hidden_shape", hidden_shape)
        self.threshold = threshold
        self.dt = dt
        self.spike = superspike() if activation is None else activation
        if lambda_init is None:
            raw = _around(0.5, 0.25, self.hidden_shape, rngs)
        else:
            decay = jnp.float32(lambda_init)
            raw = decay + jnp.log(-jnp.expm1(-decay))
        self.raw_lambda = nnx.Param(raw)
        drawn = omega_init is None
        self.omega = nnx.Param(_around(1.0, 0.5, self.hidden_shape, rngs) if drawn else jnp.float32(omega_init))

    @property
    def decay(self) -> Float[Array, "*H"]:
        """lambda = softplus(raw_lambda), per time unit."""
        return jax.nn.softplus(self.raw_lambda[...])

    @property
    def a(self) -> Complex[Array, "*H"]:
        """The pole exp(dt (-lambda + i omega))."""
        return jnp.exp(self.dt * -self.decay) * unit(self.dt * self.omega[...])

    def initial_state(self, batch_size: int) -> Complex[Array, "B *H"]:
        """Zero state, complex, shape (batch_size, *hidden_shape)."""
        return jnp.zeros((batch_size, *self.hidden_shape), self.a.dtype)

    def __call__(
        self, x: Float[Array, "B *H"], z: Complex[Array, "B *H"]
    ) -> tuple[Float[Array, "B *H"], Complex[Array, "B *H"]]:
        """One step: `(spikes, z)` from real input and the state before it.

        Raises:
            ValueError: wrong shape, of the state too. TypeError: complex input.
        """
        x, z = self._input(x, "[B"), jnp.asarray(z)
        if z.shape != x.shape:
            raise ValueError(f"ResonateFire expects a state of shape {x.shape} for this input, got {z.shape}")
        z = self.a * z + x
        return self._fire(z, x), z

    def parallel(
        self, x: Float[Array, "T B *H"], z: Complex[Array, "B *H"] | None = None, *, return_state: bool = False
    ) -> Any:
        """A whole time-major sequence.

        Args:
            x: real input, shape (T, B, *hidden_shape).
            z: state before the first step, (B, *hidden_shape); None is zero.
            return_state: also return the state after the last step.

        Returns:
            Spikes of the shape of `x`; with `return_state`, `(spikes, z)`.

        Raises:
            ValueError: wrong shape. TypeError: complex input.
        """
        x = self._input(x, "[T, B")
        states, z = linear_scan(self.a, x, z)
        spikes = self._fire(states, x)
        return (spikes, z) if return_state else spikes

    def _input(self, x: Num[Array, "..."], leading: str) -> Float[Array, "..."]:
        x = jnp.asarray(x)
        if jnp.iscomplexobj(x):
            raise TypeError(f"ResonateFire expects real input, got {x.dtype}")
        axes = leading.count(",") + 1
        if x.ndim != axes + len(self.hidden_shape) or x.shape[axes:] != self.hidden_shape:
            raise ValueError(
                f"ResonateFire expects {leading}, *hidden_shape] with hidden_shape={self.hidden_shape}, got {x.shape}"
            )
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)

    def _fire(self, z, x) -> Float[Array, "..."]:
        return self.spike(jnp.real(z) - self.threshold).astype(x.dtype)


def _around(mean: float, stddev: float, shape: tuple[int, ...], rngs: nnx.Rngs) -> Float[Array, "*H"]:
    return nnx.initializers.truncated_normal(stddev=stddev)(rngs.params(), shape) + mean
