"""Linear time-invariant layers; import paths mirror lrnnx.models.lti."""

from .base import LTI_LRNN
from .lru import LRU
from .s5 import S5

__all__ = ["LRU", "LTI_LRNN", "S5"]
