"""Generation and initialisers; import paths mirror lrnnx.utils."""

from .generation import generate
from .init import init_CV, init_log_steps, init_VinvB, make_DPLR_HiPPO, make_HiPPO, make_NPLR_HiPPO

__all__ = [
    "generate",
    "init_CV",
    "init_VinvB",
    "init_log_steps",
    "make_DPLR_HiPPO",
    "make_HiPPO",
    "make_NPLR_HiPPO",
]
