"""Pallas kernels for TPUs (Mosaic)."""

from .tpu_linear import linear_scan_fits, linear_scan_forward
from .tpu_selective import selective_scan_backward, selective_scan_fits, selective_scan_forward
from .tpu_ssd import ssd_backward, ssd_fits, ssd_forward

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
