"""The table and the JSON of a parity run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import Row

_COLOUR = {"identical": "green", "differs": "red", "unsupported": "yellow"}


def print_table(rows: Sequence[Row], console: Console) -> None:
    """One row a case and subject: errors relative to max(1, max|reference|), and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("case", "ours"):
        table.add_column(title, no_wrap=True, overflow="fold")
    for title in ("forward", "step", "gradient", "vs own"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        numbers = (_short(row.forward), _short(row.step), _short(row.gradient), _ratio(row.relative))
        verdict = f"[{_COLOUR[row.verdict]}]{row.verdict}[/]"
        table.add_row(row.case, row.subject, *numbers, verdict)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.case} ({row.subject}): {row.note}", style=_COLOUR[row.verdict], markup=False)


def summary(rows: Iterable[Row], left_out: int) -> str:
    """One line of counts; no case is dropped silently."""
    counts = Counter(row.verdict for row in rows)
    text = f"{counts['identical']} identical, {counts['differs']} differ, {counts['unsupported']} unsupported"
    if left_out:
        text += f"; {left_out} more cases belong to classes that do not exist here yet (--all lists them)"
    return text


def write_json(rows: Sequence[Row], file: Path, about: dict[str, Any]) -> None:
    """The rows with what they were made with, as {"about": ..., "rows": [...]}; not-a-number becomes a string."""
    content = {"about": about, "rows": [_finite(asdict(row)) for row in rows]}
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
