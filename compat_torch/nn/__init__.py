"""The classes of compat_torch as torch.nn.Module, computed by JAX. Needs PyTorch."""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("compat_torch.nn needs PyTorch: pip install 'spyx-torch[torch]'") from error

from . import architectures, lti, ltv, original
from .convert import from_torch
from .module import JaxModule, wrap

__all__ = ["JaxModule", "architectures", "from_torch", "lti", "ltv", "original", "to_torch", "wrap"]

to_torch = wrap
"""`wrap`: of a model of compat_torch it gives the class of `compat_torch.nn`."""
