"""Our answers to the classes of lindermanlab/S5 and s5-pytorch."""

from __future__ import annotations

from .base import Subject

SUBJECTS: dict[str, list[Subject]] = {}
