"""Pure functions on arrays: no modules, no parameters, no state."""

from .diagonal import diagonal_ssm, diagonal_ssm_step
from .discretize import async_, bilinear, dirac, no_discretization, zoh
from .scan import linear_scan

__all__ = [
    "async_",
    "bilinear",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "dirac",
    "linear_scan",
    "no_discretization",
    "zoh",
]
