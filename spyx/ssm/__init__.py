"""State-space layers, time-major: (T, B, d_model) -> (T, B, d_model)."""

from .chunked import ChunkedSSM, ChunkedState
from .lru import LRU
from .mamba import Mamba
from .mamba_block import MambaBlock, MambaState
from .s5 import S5Diag

__all__ = ["LRU", "ChunkedSSM", "ChunkedState", "Mamba", "MambaBlock", "MambaState", "S5Diag"]
