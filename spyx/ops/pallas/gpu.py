"""Pallas kernels for NVIDIA GPUs (Triton)."""

from .gpu_linear import linear_scan_fits, linear_scan_forward
from .gpu_selective import selective_scan_backward, selective_scan_fits, selective_scan_forward
from .gpu_ssd import ssd_backward, ssd_fits, ssd_forward

__all__ = [
    "linear_scan_fits",
    "linear_scan_forward",
    "selective_scan_backward",
    "selective_scan_fits",
    "selective_scan_forward",
    "ssd_backward",
    "ssd_fits",
    "ssd_forward",
]
