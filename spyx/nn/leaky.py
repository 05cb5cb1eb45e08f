"""Leaky integrators without reset: linear in the state, so a whole sequence is one `spyx.ops.linear_scan`."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from ..axn import Activation
from ..ops import linear_scan
from ._neuron import Neuron, Shape, Spiking, Threshold, clipped, layout


class _Leaky(Neuron):
    """V <- beta V + x, out = `_read(V)`."""

    beta: nnx.Param

    def _read(self, V: Array) -> Array:
        raise NotImplementedError

    def _advance(self, x: Array, state: list[Array]) -> tuple[Array, Array]:
        V = clipped(self.beta) * state[0] + x
        return self._read(V), V

    def parallel(
        self,
        x: Num[Array, "T B *hidden"],
        state: Float[Array, "B *hidden"] | None = None,
        *,
        return_state: bool = False,
    ) -> Float[Array, "T B *hidden"] | tuple[Float[Array, "T B *hidden"], Float[Array, "B *hidden"]]:
        """The whole sequence in one linear recurrence: what `spyx.nn.run` computes, without its T dependent steps.

        Args:
            x: real, shape (T, B, *hidden_shape).
            state: before the first step; None is zero.
            return_state: also return the state after the last step.

        Returns:
            The outputs, shape (T, B, *hidden_shape), in the dtype of `x` if that is floating point; with
            `return_state`, `(outputs, state)`.

        Raises:
            ValueError: shapes do not fit. TypeError: complex input.
        """
        x, dtype = self._input(x)
        if x.ndim == len(self.hidden_shape):
            raise ValueError(f"{type(self).__name__} expects {layout('T, B', self.hidden_shape)}; got shape {x.shape}.")
        if state is not None:
            state = self._state(state, x.shape[1:])
        V, last = linear_scan(clipped(self.beta), x, state)
        out = self._read(V).astype(dtype)
        return (out, last if state is None else last.astype(state.dtype)) if return_state else out


class LI(_Leaky):
    """Leaky integrator, no spikes: V <- beta V + x, and V is the output.

    Args:
        layer_shape: shape of the layer without the batch axis.
        beta: decay of V, clipped to [0, 1]; None is 0.8 for each unit.
        param_dtype: of the parameters; the state is float32 or wider.
        rngs: without effect, nothing is drawn.

    Parameters: beta, of shape `layer_shape`, or as given.
    State: V, shape (B, *layer_shape).

    Raises:
        ValueError: bad `layer_shape`, or beta does not broadcast against it.

    Source: arXiv:1901.09948.
    """

    def __init__(
        self,
        layer_shape: Shape,
        beta: ArrayLike | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        super().__init__(layer_shape, param_dtype, name="layer_shape")
        value = jnp.full(self.hidden_shape, 0.8) if beta is None else self._constant("beta", beta)
        self.beta = nnx.Param(value.astype(param_dtype))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of the layer without the batch axis."""
        return self.hidden_shape

    def _read(self, V: Array) -> Array:
        return V


class PSU_LIF(_Leaky, Spiking):
    """Leaky integrate-and-fire without reset: V <- beta V + x, s = spike(V - theta).

    The spikes come from the membrane potential after the input, unlike those of `LIF`.

    Args:
        hidden_shape: shape of the layer without the batch axis.
        beta: decay of V, clipped to [0, 1]; None draws 0.5 + a truncated normal of deviation 0.25 for each unit.
        threshold: theta: a number, an array that broadcasts against `hidden_shape`, or an `nnx.Param` (then trained).
        activation: spike function of `spyx.axn`; None is `superspike(25)`.
        param_dtype: of the parameters; the state is float32 or wider.
        rngs: random streams; one key of `params` if beta is None.

    Parameters: beta, of shape `hidden_shape`, or as given.
    State: V, shape (B, *hidden_shape).

    Raises:
        ValueError: bad `hidden_shape`, or a shape that does not broadcast against it. TypeError: `activation` is not a
            function.

    Source: without reset, in parallel: PSN (arXiv:2304.12760), PSU (arXiv:2402.00449); with a scalar decay as here:
        spyx 1.0.0.
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

    def _read(self, V: Array) -> Array:
        return self._fire(V - self._theta())


class AssociativeLIF(PSU_LIF):
    """`PSU_LIF` under the name that users of snnTorch look for, with the conversion of its decay.

    snnTorch's `StateLeaky` reads beta as a time constant 1 / (1 - beta), so its decay of one step is exp(beta - 1). Its
    `AssociativeLeaky` is another model (a matrix state with keys and values), not this one.
    """

    @staticmethod
    def beta_from_snntorch(beta_snn: ArrayLike) -> Float[Array, "..."]:
        """The beta of this class for the beta of snnTorch's `StateLeaky`: exp(beta_snn - 1)."""
        return jnp.exp(jnp.asarray(beta_snn) - 1.0)

    @staticmethod
    def snntorch_beta_from_beta(beta: ArrayLike) -> Float[Array, "..."]:
        """The beta of snnTorch's `StateLeaky` for one of this class: 1 + log(beta)."""
        return 1.0 + jnp.log(jnp.asarray(beta))
