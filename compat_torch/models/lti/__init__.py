"""Linear time-invariant layers; import paths mirror lrnnx.models.lti."""

from .base import LTI_LRNN
from .centaurus import Centaurus, CentaurusDWS, CentaurusFull, CentaurusNeck, CentaurusPWNeck
from .lru import LRU
from .s4 import S4
from .s4d import S4D
from .s5 import S5

__all__ = [
    "LRU",
    "LTI_LRNN",
    "S4",
    "S4D",
    "S5",
    "Centaurus",
    "CentaurusDWS",
    "CentaurusFull",
    "CentaurusNeck",
    "CentaurusPWNeck",
]
