"""Reading and writing checkpoints: strict, memory-mapped, without torch and without executing anything in them."""

from __future__ import annotations

from .composite import LoadReport, load_into
from .detection import Detection, detect
from .export import exported, formats_of, save, save_pretrained
from .folder import Folder, open_folder
from .formats import FORMATS
from .loading import from_pretrained, load
from .records import Record, as_plain
from .state_dict import read_state_dict
from .writing import write_file, write_folder

__all__ = [
    "FORMATS",
    "Detection",
    "Folder",
    "LoadReport",
    "Record",
    "as_plain",
    "detect",
    "exported",
    "formats_of",
    "from_pretrained",
    "load",
    "load_into",
    "open_folder",
    "read_state_dict",
    "save",
    "save_pretrained",
    "write_file",
    "write_folder",
]
