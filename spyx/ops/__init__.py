"""Pure functions on arrays: no modules, no parameters, no state. Time-major."""

from .convolution import causal_conv1d, causal_conv1d_update, fft_conv
from .diagonal import diagonal_ssm, diagonal_ssm_step
from .discretize import async_, bilinear, dirac, no_discretization, zoh
from .scan import linear_scan
from .selective import selective_scan, selective_state_update
from .ssd import ssd, ssd_state_update
from .ssm_kernels import cauchy_kernel, vandermonde_kernel
from .vandermonde_conv import vandermonde_conv

__all__ = [
    "async_",
    "bilinear",
    "cauchy_kernel",
    "causal_conv1d",
    "causal_conv1d_update",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "dirac",
    "fft_conv",
    "linear_scan",
    "no_discretization",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "vandermonde_conv",
    "vandermonde_kernel",
    "zoh",
]
