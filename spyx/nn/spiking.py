"""Integrate-and-fire neurons with reset.

V is the membrane potential, x the input, s the spikes, theta the threshold; decays are clipped to [0, 1]. The spikes of
a step come from the membrane potential before its input: an input is seen in the spikes one step later.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from ..axn import Activation
from ._neuron import Precision, Shape, Spiking, Threshold, clipped


class _Integrate(Spiking):
    """V <- beta V + x + s W - s theta, with or without beta and W."""

    beta: nnx.Param | None = None

    def _advance(self, x: Array, state: list[Array]) -> tuple[Array, Array]:
        (V,), theta = state, self._theta()
        spikes = self._fire(V - theta)
        kept = V if self.beta is None else clipped(self.beta) * V
        return spikes, self._receive(kept + x, spikes) - spikes * theta


class IF(_Integrate):
    """Integrate-and-fire: s = spike(V - theta), V <- V + x - s theta.

    Args:
        hidden_shape: shape of the layer without the batch axis.
        threshold: theta: a number, an array that broadcasts against `hidden_shape`, or an `nnx.Param` (then trained).
        activation: spike function of `spyx.axn`; None is `superspike(25)`.
        param_dtype: the state is float32 or wider, as this.
        rngs: without effect, there is nothing to draw.

    State: V, shape (B, *hidden_shape).

    Raises:
        ValueError: bad `hidden_shape` or shape of `threshold`. TypeError: `activation` is not a function.

    Source: arXiv:2109.12894.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        super().__init__(hidden_shape, threshold, activation, param_dtype)


class LIF(_Integrate):
    """Leaky integrate-and-fire: s = spike(V - theta), V <- beta V + x - s theta.

    Args:
        hidden_shape: shape of the layer without the batch axis.
        beta: decay of V; None draws 0.5 + a truncated normal of deviation 0.25 for each unit.
        threshold: theta: a number, an array that broadcasts against `hidden_shape`, or an `nnx.Param` (then trained).
        activation: spike function of `spyx.axn`; None is `superspike(25)`.
        param_dtype: of the parameters; the state is float32 or wider.
        rngs: random streams; one key of `params` for each decay that is None.

    Parameters: beta, of shape `hidden_shape`, or as given.
    State: V, shape (B, *hidden_shape).

    Raises:
        ValueError: bad `hidden_shape`, or a shape that does not broadcast against it. TypeError: `activation` is not a
            function.

    Source: arXiv:2109.12894.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        beta: ArrayLike | None = None,
        threshold: Threshold = 1.0,
        activation: Activation | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self.beta = self._decay("beta", beta, rngs)


class RIF(_Integrate):
    """Recurrent integrate-and-fire: s = spike(V - theta), V <- V + x + s W - s theta.

    Args: as `IF`, and
        precision: of the product s W, as in `jax.lax.dot`.
        rngs: random streams; one key of `params`.

    Parameters: recurrent_w, shape (*hidden_shape, *hidden_shape), from neuron first; truncated normal, deviation 0.01.
    State: V, shape (B, *hidden_shape).

    Raises:
        As `IF`.

    Source: arXiv:1901.09948.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        precision: Precision = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self._init_recurrent(precision, rngs)


class RLIF(_Integrate):
    """Recurrent leaky integrate-and-fire: s = spike(V - theta), V <- beta V + x + s W - s theta.

    Args: as `LIF`, and
        precision: of the product s W, as in `jax.lax.dot`.

    Parameters: recurrent_w, as in `RIF`; beta, as in `LIF`.
    State: V, shape (B, *hidden_shape).

    Raises:
        As `LIF`.

    Source: arXiv:1901.09948.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        beta: ArrayLike | None = None,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        precision: Precision = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self._init_recurrent(precision, rngs)
        self.beta = self._decay("beta", beta, rngs)


class ALIF(Spiking):
    """Leaky integrate-and-fire with a threshold that adapts: theta_t = theta + T.

    s = spike(V - theta_t), V <- beta V + x - s theta_t, T <- gamma T + (1 - gamma) s.

    Args: as `LIF`, and
        gamma: decay of the adaptation T; None is drawn as beta, after it.

    Parameters: beta, gamma, each of shape `hidden_shape`, or as given.
    State: V and T side by side, shape (B, ..., 2 n) for a hidden_shape (..., n).

    Raises:
        As `LIF`.

    Source: Bellec et al. 2018 (arXiv:1803.09574).
    """

    _parts = 2

    def __init__(
        self,
        hidden_shape: Shape,
        beta: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self.beta = self._decay("beta", beta, rngs)
        self.gamma = self._decay("gamma", gamma, rngs)

    def _advance(self, x: Array, state: list[Array]) -> tuple[Array, Array, Array]:
        V, T = state
        gamma, theta = clipped(self.gamma), self._theta() + T
        spikes = self._fire(V - theta)
        V = clipped(self.beta) * V + x - spikes * theta
        return spikes, V, gamma * T + (1 - gamma) * spikes


class _CurrentBased(Spiking):
    """I <- alpha I + x + s W, V <- beta (V - s theta) + I, with or without W."""

    _parts = 2
    alpha: nnx.Param
    beta: nnx.Param

    def _advance(self, x: Array, state: list[Array]) -> tuple[Array, Array, Array]:
        (V, current), theta = state, self._theta()
        spikes = self._fire(V - theta)
        current = self._receive(clipped(self.alpha) * current + x, spikes)
        return spikes, clipped(self.beta) * (V - spikes * theta) + current, current


class CuBaLIF(_CurrentBased):
    """Current-based leaky integrate-and-fire: the input charges a synaptic current I that decays too.

    s = spike(V - theta), I <- alpha I + x, V <- beta (V - s theta) + I.

    Args: as `LIF`, and
        alpha: decay of I; None is drawn as beta, before it.

    Parameters: alpha, beta, each of shape `hidden_shape`, or as given.
    State: V and I side by side, shape (B, ..., 2 n) for a hidden_shape (..., n).

    Raises:
        As `LIF`.

    Source: arXiv:1901.09948.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        alpha: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self.alpha = self._decay("alpha", alpha, rngs)
        self.beta = self._decay("beta", beta, rngs)


class RCuBaLIF(_CurrentBased):
    """Recurrent `CuBaLIF`: I <- alpha I + x + s W.

    Args: as `CuBaLIF`, and
        precision: of the product s W, as in `jax.lax.dot`.

    Parameters: recurrent_w, as in `RIF`; alpha, beta, as in `CuBaLIF`.
    State: V and I side by side, shape (B, ..., 2 n) for a hidden_shape (..., n).

    Raises:
        As `LIF`.

    Source: arXiv:1901.09948.
    """

    def __init__(
        self,
        hidden_shape: Shape,
        alpha: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        threshold: Threshold = 1,
        activation: Activation | None = None,
        *,
        precision: Precision = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(hidden_shape, threshold, activation, param_dtype)
        self._init_recurrent(precision, rngs)
        self.alpha = self._decay("alpha", alpha, rngs)
        self.beta = self._decay("beta", beta, rngs)
