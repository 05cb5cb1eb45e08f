"""State-space layers, spiking neurons and linear recurrences in JAX / Flax NNX, time-major (T, B, D)."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import axn, nn, ops, phasor, quant, ssm

__all__ = ["__version__", "axn", "nn", "ops", "phasor", "quant", "ssm"]


def _refuse_upstream() -> None:
    try:
        found = metadata.version("spyx")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'spyx' {found} is installed and has the same import name as 'spyx-torch'. "
        "Mend it with two commands:\n"
        "  pip uninstall -y spyx\n"
        "  pip install --force-reinstall --no-deps spyx-torch"
    )


_refuse_upstream()


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
