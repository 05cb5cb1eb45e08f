"""Linear time-varying layers; import paths mirror lrnnx.models.ltv."""

from .base import LTV_LRNN
from .mamba import Mamba
from .rglru import RGLRU
from .s5 import S5
from .s7 import S7

__all__ = ["LTV_LRNN", "RGLRU", "S5", "S7", "Mamba"]
