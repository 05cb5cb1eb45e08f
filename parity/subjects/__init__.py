"""Which of our classes answers for a reference class, as pure functions of the reference's parameters."""

from __future__ import annotations

from . import language, lrnnx, s4, s5
from .base import Subject

__all__ = ["SUBJECTS", "Subject", "subjects_of"]

SUBJECTS: dict[str, list[Subject]] = {
    **lrnnx.SUBJECTS,
    **s4.SUBJECTS,
    **s5.SUBJECTS,
    **language.SUBJECTS,
}


def subjects_of(cls: str) -> list[Subject]:
    """Our answers to a reference class "package.module:Class"; empty if there is none."""
    return SUBJECTS.get(cls, [])
