"""Our answers to the classes of transformers."""

from __future__ import annotations

from .base import Subject

SUBJECTS: dict[str, list[Subject]] = {}
