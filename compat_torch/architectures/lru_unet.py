"""lrnnx's U-Net of LRU layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..core.base import LRNN, check_sizes, parameter_dtype
from ..core.discretization import Reference
from ..core.layers import symmetric_uniform
from ..errors import ReferenceDefectWarning
from ..interop import torch_in_torch_out
from ..layers.block import layer_norm
from ..models.lti import LRU
from ..random import default_rngs


class LRUBlock(nnx.Module):
    """An LRU with as many states as channels: (B, T, H) -> (B, T, H).

    Args:
        N: number of states.
        H: number of channels.
        **kwargs: keyword-only arguments of `LRU`.

    Parameters: lru_layer.*.
    """

    def __init__(self, N: int, H: int, **kwargs: Any):
        self.lru_layer = LRU(H, N, **kwargs)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """The layer."""
        return self.lru_layer(x)


class LayerNormFeature(nnx.Module):
    """LayerNorm of the channels: (B, T, H) -> (B, T, H). Parameters: norm.{weight, bias}."""

    def __init__(self, num_features: int, *, param_dtype: DTypeLike = jnp.float32):
        self.norm = layer_norm(num_features, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """The normalised channels."""
        return self.norm(x)


class DownPool1D(nnx.Module):
    """Convolution over windows of `downsample_factor` steps: (B, T, in_channels) -> (B, T / factor, out_channels).

    Args:
        in_channels: channels of the input.
        downsample_factor: steps of a window; it must divide T.
        out_channels: channels of the output; None is 2 in_channels.
        param_dtype, precision, rngs: as in `LRUUnet`.

    Parameters: conv.weight (out_channels, in_channels, factor), conv.bias.

    Raises:
        ValueError: a size that is not a positive integer. TypeError: `param_dtype` is not real floating point.
    """

    def __init__(
        self,
        in_channels: int,
        downsample_factor: int = 2,
        *,
        out_channels: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = "highest",
        rngs: nnx.Rngs | None = None,
    ):
        check_sizes("DownPool1D", in_channels=in_channels, downsample_factor=downsample_factor)
        width = 2 * in_channels if out_channels is None else out_channels
        check_sizes("DownPool1D", out_channels=width)
        self.factor = downsample_factor
        init = symmetric_uniform((in_channels * downsample_factor) ** -0.5)
        dtype = parameter_dtype("DownPool1D", None, param_dtype)
        self.conv = nnx.Conv(
            in_channels, width, (downsample_factor,), downsample_factor, padding="VALID",
            kernel_init=init, bias_init=init, param_dtype=dtype, precision=precision, rngs=default_rngs(rngs),
        )  # fmt: skip

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B S O"]:
        """One step of each window.

        Raises:
            ValueError: T is not a multiple of the factor.
        """
        if x.shape[1] % self.factor:
            raise ValueError(f"DownPool1D: the length must be a multiple of {self.factor}, got {x.shape[1]}: pad it")
        return self.conv(x)


class UpPool1D(nnx.Module):
    """Transposed convolution, `upsample_factor` steps of each: (B, S, in_channels) -> (B, S factor, out_channels).

    Args:
        in_channels: channels of the input.
        upsample_factor: see above.
        causal: delay the output, see `shift`.
        out_channels: channels of the output; None is in_channels / 2.
        shift: steps of the delay. Step s of the input knows the window of its factor steps to the last one, so that
            upsample_factor - 1 makes the output causal.
        param_dtype, precision, rngs: as in `LRUUnet`.

    Parameters: deconv.weight (in_channels, out_channels, factor), deconv.bias.

    Raises:
        ValueError: a size that is not a positive integer, a negative shift. TypeError: `param_dtype` is not real
            floating point.
    """

    def __init__(
        self,
        in_channels: int,
        upsample_factor: int = 2,
        causal: bool = True,
        *,
        out_channels: int | None = None,
        shift: int = 1,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = "highest",
        rngs: nnx.Rngs | None = None,
    ):
        check_sizes("UpPool1D", in_channels=in_channels, upsample_factor=upsample_factor)
        check_sizes("UpPool1D", 0, shift=shift)
        width = in_channels // 2 if out_channels is None else out_channels
        check_sizes("UpPool1D", out_channels=width)
        self.factor, self.causal, self.shift = upsample_factor, causal, shift
        init = symmetric_uniform((width * upsample_factor) ** -0.5)
        dtype = parameter_dtype("UpPool1D", None, param_dtype)
        self.deconv = nnx.ConvTranspose(
            in_channels, width, (upsample_factor,), (upsample_factor,), padding="VALID", transpose_kernel=True,
            kernel_init=init, bias_init=init, param_dtype=dtype, precision=precision, rngs=default_rngs(rngs),
        )  # fmt: skip

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B T O"]:
        """The steps of every window, delayed where `causal`; zeros come in."""
        y = self.deconv(x)
        if not self.causal:
            return y
        return jnp.pad(y, ((0, 0), (self.shift, 0), (0, 0)))[:, : y.shape[1]]


class LRUUnet(LRNN):
    """A U-Net along time: (B, in_channels, T) -> (B, out_channels, T), for any T.

    Going down, every level is LRU, LayerNorm, SiLU, and a strided convolution; two such blocks at the bottom; going up,
    every level is a transposed convolution, the sum with what went down there, LRU, LayerNorm, SiLU; then one block
    more, an LRU, and a projection if out_channels is another number than in_channels. LayerNorm is left out where there
    is one channel. T is padded with zeros to a multiple of the product of `resample_factors`.

    Args:
        in_channels, out_channels: channels of input and output.
        channels: channels after each down-sampling.
        resample_factors: by which each level shortens time, as many as `channels`.
        pre_conv: must be False: lrnnx has no such convolution.
        causal: delay the output of every up-sampling, see the table.
        dtype: of the output; None is that of the input.
        reference: see the table.
        precision: of every convolution and matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: down_ssms.i.0.0.lru_layer.*, down_ssms.i.0.1.norm.*, down_ssms.i.1.conv.*, hid_ssms.i.{0, 1}.*,
    up_ssms.i.0.deconv.*, up_ssms.i.1.{0, 1}.*, last_ssms.i.{0, 1}.*, final_proj.weight.

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | causal=True delays by | one step, which is causal for factor 2 only (one warning) | factor - 1 steps |

    The warning says how many later inputs reach an output: two with the default factors (4, 2). A new model that is to
    be causal takes reference="paper".

    lrnnx 1.0.0 cannot construct this class: it gives `LRU` names of arguments that it does not have. Apart from this,
    it reads the number of `channels` only and doubles the width at each level: that is channels=[2 in_channels,
    4 in_channels, ...] here.

    Raises:
        ValueError: sizes, lists of different lengths, no level at all, pre_conv=True. TypeError: `channels` or
            `resample_factors` is not a list.

    Source: the aTENNuate network (arXiv:2409.03377); lrnnx 1.0.0 `lrnnx.architectures.lru_unet`.
    """

    _time_axis = 2

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (8, 16),
        resample_factors: Sequence[int] = (4, 2),
        pre_conv: bool = False,
        causal: bool = True,
        dtype: DTypeLike | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(in_channels=in_channels, out_channels=out_channels)
        for name, given in (("channels", channels), ("resample_factors", resample_factors)):
            if not isinstance(given, Sequence):
                raise TypeError(f"{self._name}: {name} must be a list of integers, one for each level, got {given!r}")
        if len(channels) != len(resample_factors) or not channels:
            raise ValueError(
                f"{self._name}: channels and resample_factors must have the same length, at least 1, got "
                f"{list(channels)} and {list(resample_factors)}"
            )
        for i, (width, factor) in enumerate(zip(channels, resample_factors, strict=True)):
            self._check_sizes(**{f"channels[{i}]": width, f"resample_factors[{i}]": factor})
        if pre_conv:
            raise ValueError(f"{self._name}: pre_conv={pre_conv!r} is not supported: pass False")
        if causal and reference == "lrnnx" and (later := _lookahead(resample_factors)):
            warnings.warn(
                f'{self._name}(causal=True, reference="lrnnx") delays by one step at each level, as lrnnx 1.0.0 does: '
                f"with resample_factors={list(resample_factors)} output t depends on inputs up to t + {later}. "
                'reference="paper" is causal.',
                ReferenceDefectWarning,
                stacklevel=2,
            )
        self.in_channels, self.out_channels, self.causal = in_channels, out_channels, bool(causal)
        self.channels, self.resample_factors = (in_channels, *channels), tuple(resample_factors)
        self.total_downsample, self.depth = math.prod(resample_factors), len(channels)
        rngs = default_rngs(rngs)
        conv: dict[str, Any] = {"param_dtype": self.param_dtype, "precision": precision, "rngs": rngs}

        def block(width: int, activation: bool = True) -> nnx.List:
            layers: list[Any] = [LRUBlock(width, width, reference=reference, **conv)]
            if activation and width > 1:
                layers.append(LayerNormFeature(width, param_dtype=self.param_dtype))
            return nnx.List(layers)

        levels = list(zip(self.channels, channels, resample_factors, strict=False))
        self.down_ssms = nnx.List(
            nnx.List([block(outer), DownPool1D(outer, factor, out_channels=inner, **conv)])
            for outer, inner, factor in levels
        )
        self.hid_ssms = nnx.List([block(channels[-1]), block(channels[-1])])
        self.up_ssms = nnx.List(
            nnx.List(
                [
                    UpPool1D(
                        inner, factor, self.causal, out_channels=outer,
                        shift=1 if reference == "lrnnx" else factor - 1, **conv,
                    ),
                    block(outer),
                ]
            )
            for outer, inner, factor in reversed(levels)
        )  # fmt: skip
        self.last_ssms = nnx.List([block(in_channels), block(in_channels, activation=False)])
        if in_channels != out_channels:
            init = symmetric_uniform(in_channels**-0.5)
            self.final_proj = nnx.Conv(in_channels, out_channels, (1,), use_bias=False, kernel_init=init, **conv)

    @torch_in_torch_out
    def __call__(self, x: Float[Array, "B C T"]) -> Float[Array, "B O T"]:
        """The output, (B, out_channels, T), in `dtype` or else the dtype of `x`.

        Args:
            x: real floating point, shape (B, in_channels, T).

        Raises:
            ValueError: wrong rank or number of channels. TypeError: wrong dtype.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{self._name} expects input (B, C, T) with C = in_channels = {self.in_channels}, got shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self._name} expects real floating point input (B, C, T), got {x.dtype}")
        dtype, T = self.dtype or x.dtype, x.shape[2]
        h = jnp.swapaxes(x, 1, 2).astype(dtype)
        windows = max(1, -(-T // self.total_downsample))
        h = jnp.pad(h, ((0, 0), (0, windows * self.total_downsample - T), (0, 0)))
        skips = []
        for ssm, down in self.down_ssms:
            skips.append(h)
            h = down(_apply(ssm, h))
        for ssm in self.hid_ssms:
            h = _apply(ssm, h)
        for (up, ssm), skip in zip(self.up_ssms, reversed(skips), strict=True):
            h = _apply(ssm, up(h) + skip)
        first, last = self.last_ssms
        h = _apply(last, _apply(first, h), activation=False)
        if hasattr(self, "final_proj"):
            h = self.final_proj(h)
        return jnp.swapaxes(h[:, :T], 1, 2).astype(dtype)


def _lookahead(factors: Sequence[int]) -> int:
    """How many later steps reach an output with one step of delay at each level: those of the worst depth."""
    reached, farthest, width = 0, 0, 1
    for factor in factors:
        reached += (factor - 2) * width
        farthest, width = max(farthest, reached), width * factor
    return farthest


def _apply(ssm: Any, x: Float[Array, "B T H"], activation: bool = True) -> Float[Array, "B T H"]:
    for layer in ssm:
        x = layer(x)
    return jax.nn.silu(x) if activation else x
