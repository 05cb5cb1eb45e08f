"""`compat_torch.layers.block` as torch modules."""

from __future__ import annotations

from .._mirror import mirror

__getattr__, __dir__ = mirror("compat_torch.layers.block")
