"""The PyTorch-shaped face of spyx: lrnnx's classes, parameter names and checkpoints, computed by JAX.

Batch-first (B, L, H). PyTorch is optional: with it, torch tensors go in and come out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spyx import __version__

    from . import optim
    from .checkpoint import load, read_state_dict
    from .decoding import decode
    from .models.lti import LRU, S4, S4D, S5
    from .models.ltv import Mamba
    from .random import manual_seed
    from .state import load_state_dict, state_dict

__all__ = [
    "LRU",
    "S4",
    "S4D",
    "S5",
    "Mamba",
    "__version__",
    "decode",
    "load",
    "load_state_dict",
    "manual_seed",
    "optim",
    "read_state_dict",
    "state_dict",
]

_HOME = {
    "LRU": "compat_torch.models.lti",
    "S4": "compat_torch.models.lti",
    "S4D": "compat_torch.models.lti",
    "S5": "compat_torch.models.lti",
    "Mamba": "compat_torch.models.ltv",
    "__version__": "spyx",
    "decode": "compat_torch.decoding",
    "load": "compat_torch.checkpoint",
    "load_state_dict": "compat_torch.state",
    "manual_seed": "compat_torch.random",
    "read_state_dict": "compat_torch.checkpoint",
    "state_dict": "compat_torch.state",
}


def __getattr__(name: str):
    if name == "optim":
        return importlib.import_module("compat_torch.optim")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
