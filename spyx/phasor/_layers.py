"""Layers of phasors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Num

from ..ops.dtypes import to_complex
from ._codes import check_sizes, phase_of, phase_to_spikes, real_to_phasor, spikes_to_phase, unit


class PhasorLinear(nnx.Module):
    """Complex dense layer: z (..., in_features) -> z kernel + bias (..., out_features).

    Args:
        in_features: width of the input.
        out_features: width of the output.
        use_bias: add a complex bias, zero at first.
        param_dtype: of the parameters.
        precision: of the matrix products, as in `jax.lax.dot`.
        rngs: random streams; one key of `params` is used. At first, mean |kernel|^2 = 1 / in_features.

    Parameters: kernel_re, kernel_im (in_features, out_features); bias_re, bias_im (out_features,) or None.

    Raises:
        ValueError: a size that is not a positive integer.

    Source: arXiv:2204.00507.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = True,
        *,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        check_sizes("PhasorLinear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.use_bias = use_bias
        self.precision = precision
        scale = jnp.sqrt(1.0 / (2.0 * in_features))
        k_re, k_im = jax.random.split(rngs.params())
        shape = (in_features, out_features)
        self.kernel_re = nnx.Param((jax.random.normal(k_re, shape) * scale).astype(param_dtype))
        self.kernel_im = nnx.Param((jax.random.normal(k_im, shape) * scale).astype(param_dtype))
        self.bias_re = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.bias_im = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    @property
    def kernel(self) -> Complex[Array, "I O"]:
        """kernel_re + i kernel_im."""
        return to_complex(self.kernel_re[...], self.kernel_im[...])

    @property
    def bias(self) -> Complex[Array, " O"] | None:
        """bias_re + i bias_im, or None."""
        if self.bias_re is None or self.bias_im is None:
            return None
        return to_complex(self.bias_re[...], self.bias_im[...])

    def __call__(self, z: Complex[Array, "*B I"]) -> Complex[Array, "*B O"]:
        """The layer's output.

        Raises:
            TypeError: real input. ValueError: wrong width.
        """
        z = jnp.asarray(z)
        if not jnp.iscomplexobj(z):
            raise TypeError(f"PhasorLinear expects complex input, got {z.dtype}: use real_to_phasor first")
        if z.ndim < 1 or z.shape[-1] != self.in_features:
            raise ValueError(f"PhasorLinear expects (..., in_features={self.in_features}), got shape {z.shape}")
        out = jnp.matmul(z, self.kernel, precision=self.precision)
        return out if self.bias is None else out + self.bias


class PhasorActivation(nnx.Module):
    """z / (|z| + eps): the phase is kept, the magnitude becomes 1. Values and gradients are finite at 0 too.

    Args:
        eps: positive; magnitudes below it stay small instead of becoming 1.

    Raises:
        ValueError: `eps` is not positive.

    Source: arXiv:1901.07718.
    """

    def __init__(self, eps: float = 1e-8):
        if not eps > 0:
            raise ValueError(f"PhasorActivation: eps must be positive, got {eps}")
        self.eps = eps

    def __call__(self, z: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """Phasors of the shape of `z`."""
        return z / (jnp.abs(z) + self.eps).astype(z.dtype)


class PhasorReadout(nnx.Module):
    """Real part of a complex dense layer without bias: (..., in_features) -> real (..., out_features).

    Args:
        in_features, out_features, param_dtype, precision, rngs: as in `PhasorLinear`, which it holds as `proj`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        self.proj = PhasorLinear(
            in_features, out_features, use_bias=False, param_dtype=param_dtype, precision=precision, rngs=rngs
        )

    def __call__(self, z: Complex[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Logits."""
        return jnp.real(self.proj(z))


class PhasorMLP(nnx.Module):
    """real_to_phasor, then `depth` times PhasorLinear and PhasorActivation, then PhasorReadout.

    Args:
        in_features: width of the input.
        hidden_features: width of the hidden layers.
        out_features: number of logits.
        depth: number of hidden layers.
        param_dtype, precision: as in `PhasorLinear`.
        rngs: random streams; one key of `params` for each layer, in order.

    Attributes: layers, alternately PhasorLinear and PhasorActivation; readout.

    Raises:
        ValueError: a size or depth that is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        depth: int = 2,
        *,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ):
        check_sizes("PhasorMLP", depth=depth)
        common: dict[str, Any] = {"param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        widths = [in_features] + [hidden_features] * depth
        self.layers = nnx.List()
        for width in widths[:-1]:
            self.layers += [PhasorLinear(width, hidden_features, **common), PhasorActivation()]
        self.readout = PhasorReadout(hidden_features, out_features, **common)

    def __call__(self, x: Num[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Logits (..., out_features) of real values, or of phasors, (..., in_features)."""
        z = x if jnp.iscomplexobj(x) else real_to_phasor(x)
        for layer in self.layers:
            z = layer(z)
        return self.readout(z)


class SpikingPhasor(nnx.Module):
    """A trained PhasorLinear and its PhasorActivation between spikes: (T, B, in_features) -> (T, B, out_features).

    A unit that never fires counts as phase 0.

    Args:
        phasor_layer: the layer; it is shared, not copied.
        period_T: ticks of a cycle.

    Raises:
        ValueError: `period_T` is not a positive integer. TypeError: not a PhasorLinear.

    Source: arXiv:2204.00507.
    """

    def __init__(self, phasor_layer: PhasorLinear, period_T: int):
        check_sizes("SpikingPhasor", period_T=period_T)
        if not isinstance(phasor_layer, PhasorLinear):
            raise TypeError(f"SpikingPhasor: phasor_layer must be a PhasorLinear, got {type(phasor_layer).__name__}")
        self.layer = phasor_layer
        self.activation = PhasorActivation()
        self.T = period_T

    def __call__(self, spikes: Float[Array, "T B I"]) -> Float[Array, "T B O"]:
        """One cycle of spikes from one cycle of spikes.

        Raises:
            ValueError: not period_T ticks, or wrong width.
        """
        z = self.activation(self.layer(unit(spikes_to_phase(spikes, self.T))))
        return phase_to_spikes(phase_of(z), self.T)
