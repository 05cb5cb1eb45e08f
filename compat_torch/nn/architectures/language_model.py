"""`compat_torch.architectures.language_model` as torch modules."""

from __future__ import annotations

from .._mirror import mirror

__getattr__, __dir__ = mirror("compat_torch.architectures.language_model")
