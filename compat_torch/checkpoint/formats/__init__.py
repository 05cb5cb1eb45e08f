"""The table of checkpoint formats: one file per family."""

from __future__ import annotations

from . import lrnnx_layers, lrnnx_models, lrnnx_unet, mamba, recurrent_gemma, s4, s5
from .format import Fit, Format, Reading, Rename

__all__ = ["FORMATS", "TABLE", "Fit", "Format", "Reading", "Rename"]

TABLE: dict[str, Format] = {
    entry.name: entry
    for entry in (
        *mamba.MODELS,
        *recurrent_gemma.MODELS,
        *lrnnx_models.MODELS,
        *lrnnx_unet.MODELS,
        *lrnnx_layers.LAYERS,
        lrnnx_layers.MAMBA_LAYER,
        *s4.MODELS,
        *s5.MODELS,
    )
}

FORMATS: tuple[str, ...] = tuple(TABLE)
"""Names that `format=` takes."""
