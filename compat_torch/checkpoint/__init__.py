"""Reading checkpoints: strict, memory-mapped, without torch and without executing anything in them."""

from __future__ import annotations

from .loading import FORMATS, load
from .records import Record, as_plain
from .state_dict import read_state_dict

__all__ = ["FORMATS", "Record", "as_plain", "load", "read_state_dict"]
