"""State-space layers, time-major: (T, B, d_model) -> (T, B, d_model)."""

from .lru import LRU
from .s5 import S5Diag

__all__ = ["LRU", "S5Diag"]
