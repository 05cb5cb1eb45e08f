"""The state-space dual scan by the kernels of `spyx.ops.pallas` and `.native` where they fit, else in plain JAX."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import _ssd_native
from ._recomputed import recomputed
from ._ssd_runs import Options, Values, chunked
from .dispatch import platform_primitive


def fits(kernels: ModuleType, o: Options, values: Values) -> bool:
    """Whether `kernels` (`spyx.ops.pallas.tpu` or `.gpu`) take these values."""
    return _precision(o) is not None and kernels.ssd_fits(*values)


def forward(kernels: Any, o: Options, values: Values, reset: Array | None) -> tuple[Array, Array]:
    """As `_ssd_runs.chunked`; the length of a chunk is the kernels' own."""
    options: dict[str, Any] = {"reverse": o.reverse, "precision": _precision(o), "dtype": o.dtype}
    return kernels.ssd_forward(*_arguments(values), reset, **options)


def backward(kernels: Any, o: Options, values: Values, reset: Array | None, cotangents: tuple[Array, Array]) -> Values:
    """Cotangents of the values from those of `(y, last state)`; the states are computed anew, not kept."""
    g = kernels.ssd_backward(
        *_arguments(values), *cotangents, reset, reverse=o.reverse, precision=_precision(o)
    )  # fmt: skip
    return Values(*(d.astype(v.dtype) for d, v in zip(g, values, strict=True)))


def _arguments(values: Values) -> Values:
    """B and C in one dtype."""
    dtype = jnp.promote_types(values.B.dtype, values.C.dtype)
    return values._replace(B=values.B.astype(dtype), C=values.C.astype(dtype))


def _precision(o: Options) -> jax.lax.Precision | None:
    """What the kernels' products are computed in: DEFAULT, else HIGHEST; None for a `DotAlgorithm`."""
    parts = o.precision if isinstance(o.precision, tuple) else (o.precision,)
    try:
        default = {jax.lax.Precision(part) for part in parts} == {jax.lax.Precision.DEFAULT}
    except ValueError:
        return None
    return jax.lax.Precision.DEFAULT if default else jax.lax.Precision.HIGHEST


def _chosen(platform: str, o: Options, values: Values) -> ModuleType | None:
    """The module of kernels for a platform, or None where they do not fit."""
    kernels = importlib.import_module(f".pallas.{platform}", __package__)
    if fits(kernels, o, values):
        return kernels
    if o.method == "pallas":
        raise ValueError(
            f'method="pallas": the {platform} kernels take float32 or bfloat16 values, nothing empty, P <= 64 and '
            "N <= 128 on GPU, P and N <= 256 and 4 MiB of states for each group on TPU, and a precision of "
            f"jax.lax.Precision; got x {values.x.dtype}{list(values.x.shape)}, B {values.B.dtype}"
            f'{list(values.B.shape)}, dt {values.dt.dtype}, precision {o.precision!r}; use method="auto"'
        )
    return None


def _plain_forward(values, reset, *, o: Options):
    return chunked(o, values, reset)


def _plain_backward(values, reset, cotangents, *, o: Options):
    return jax.vjp(lambda v: chunked(o, v, reset), values)[1](cotangents)[0]


def _cpu_forward(values, reset, *, o: Options):
    if o.method == "pallas":
        raise ValueError('method="pallas": there are kernels for TPU and NVIDIA GPU, none for CPU; use method="auto"')
    return chunked(o, values, reset)


def _in_native(o: Options, values: Values) -> bool:
    return o.method == "auto" and _precision(o) is not None and _ssd_native.fits(values)


def _native_forward(values, reset, *, o: Options):
    if _in_native(o, values):
        return _ssd_native.forward(o, values, reset)
    return _cpu_forward(values, reset, o=o)


def _native_backward(values, reset, cotangents, *, o: Options):
    if _in_native(o, values):
        return _ssd_native.backward(o, values, reset, cotangents)
    return _plain_backward(values, reset, cotangents, o=o)


def _kernel_forward(platform: str, values, reset, *, o: Options):
    kernels = _chosen(platform, o, values)
    return chunked(o, values, reset) if kernels is None else forward(kernels, o, values, reset)


def _kernel_backward(platform: str, values, reset, cotangents, *, o: Options):
    kernels = _chosen(platform, o, values)
    if kernels is None:
        return _plain_backward(values, reset, cotangents, o=o)
    return backward(kernels, o, values, reset, cotangents)


_forward_by_platform = platform_primitive(
    "ssd", _plain_forward,
    cpu=_cpu_forward, native=_native_forward,
    cuda=partial(_kernel_forward, "gpu"), tpu=partial(_kernel_forward, "tpu"),
)  # fmt: skip
_backward_by_platform = platform_primitive(
    "ssd_backward", _plain_backward,
    native=_native_backward, cuda=partial(_kernel_backward, "gpu"), tpu=partial(_kernel_backward, "tpu"),
)  # fmt: skip


def _forward(o: Options, values: Values, reset: Array | None):
    return _forward_by_platform(values, reset, o=o), ()


def _backward(o: Options, values: Values, reset: Array | None, saved, cotangents):
    return _backward_by_platform(values, reset, cotangents, o=o)


by_platform = recomputed(_forward, _backward, chunked)
