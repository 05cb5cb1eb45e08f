"""Our answers to the classes of state-spaces/s4."""

from __future__ import annotations

from .base import Subject

SUBJECTS: dict[str, list[Subject]] = {}
