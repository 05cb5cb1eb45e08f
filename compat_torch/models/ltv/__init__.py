"""Linear time-varying layers; import paths mirror lrnnx.models.ltv."""

from .base import LTV_LRNN
from .mamba import Mamba

__all__ = ["LTV_LRNN", "Mamba"]
