"""The PyTorch-shaped face of spyx: lrnnx's classes, parameter names and checkpoints, computed by JAX.

Batch-first (B, L, H). PyTorch is optional: with it, torch tensors go in and come out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spyx import __version__

    from . import checkpoint, nn, optim
    from .checkpoint import from_pretrained, load, load_into, read_state_dict
    from .decoding import decode
    from .generation import generate
    from .models.lti import LRU, S4, S4D, S5
    from .models.ltv import Mamba
    from .nn import from_torch, to_torch, wrap
    from .quantization import quantize_weights
    from .random import manual_seed
    from .state import load_state_dict, state_dict

__all__ = [
    "LRU",
    "S4",
    "S4D",
    "S5",
    "Mamba",
    "__version__",
    "checkpoint",
    "decode",
    "from_pretrained",
    "from_torch",
    "generate",
    "load",
    "load_into",
    "load_state_dict",
    "manual_seed",
    "nn",
    "optim",
    "quantize_weights",
    "read_state_dict",
    "state_dict",
    "to_torch",
    "wrap",
]

_SUBMODULES = ("checkpoint", "nn", "optim")
_HOME = {
    "LRU": "compat_torch.models.lti",
    "S4": "compat_torch.models.lti",
    "S4D": "compat_torch.models.lti",
    "S5": "compat_torch.models.lti",
    "Mamba": "compat_torch.models.ltv",
    "__version__": "spyx",
    "decode": "compat_torch.decoding",
    "from_pretrained": "compat_torch.checkpoint",
    "from_torch": "compat_torch.nn",
    "generate": "compat_torch.generation",
    "load": "compat_torch.checkpoint",
    "load_into": "compat_torch.checkpoint",
    "load_state_dict": "compat_torch.state",
    "manual_seed": "compat_torch.random",
    "quantize_weights": "compat_torch.quantization",
    "read_state_dict": "compat_torch.checkpoint",
    "state_dict": "compat_torch.state",
    "to_torch": "compat_torch.nn",
    "wrap": "compat_torch.nn",
}


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"compat_torch.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
