"""Proof that the JAX side computes what the PyTorch references compute, on real reference weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modules import assert_identical, compare_modules

__all__ = ["assert_identical", "compare_modules"]


def __getattr__(name: str):
    if name in __all__:
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
