"""The `inspect` command: what a checkpoint is and what is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .arrays import count_nonfinite, release
from .errors import CheckpointError


@dataclass(frozen=True)
class Report:
    """What `inspect` shows.

    Attributes:
        path: file or folder.
        format, architecture, evidence: what was detected; None and () if nothing was.
        problem: why not.
        config: of config.json, or the constructor arguments that were inferred.
        missing_arguments: what only the caller can give -> possible values.
        tensors: [name, shape, dtype, bytes, count of NaN and infinities].
        replaced: pickled classes and functions that became inert records.
        custom_code: what the configuration wants executed.
    """

    path: str
    format: str | None
    architecture: str | None
    evidence: tuple[str, ...]
    problem: str | None
    config: dict[str, Any]
    missing_arguments: dict[str, list[Any]]
    tensors: list[tuple[str, tuple[int, ...], str, int, int]]
    replaced: tuple[str, ...]
    custom_code: tuple[str, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of tensors, elements, bytes, and of values that are NaN or infinite."""
        return {
            "tensors": len(self.tensors),
            "parameters": sum(math.prod(shape) for _, shape, _, _, _ in self.tensors),
            "bytes": sum(nbytes for _, _, _, nbytes, _ in self.tensors),
            "nonfinite": sum(count for _, _, _, _, count in self.tensors),
        }

    def to_json(self) -> str:
        """Every field, and the totals."""
        names = ("name", "shape", "dtype", "bytes", "nonfinite")
        rows = [dict(zip(names, row, strict=True)) for row in self.tensors]
        return json.dumps({**vars(self), "tensors": rows, "totals": self.totals}, indent=2, default=str)


def examine(path: Path, format: str | None = None) -> Report:
    """Read a checkpoint's names, shapes and values, and detect its format.

    Args:
        path: a file or a folder.
        format: where it cannot be told.

    Raises:
        FileNotFoundError, CheckpointError: it cannot be read. A format that is not known is a `problem` of the report.
    """
    from .checkpoint import detect, open_folder
    from .checkpoint.state_dict import open_file

    if path.is_dir():
        folder = open_folder(path)
        tensors, replaced, custom_code = folder.tensors, folder.replaced, folder.custom_code
        config = folder.config or {}
    else:
        file = open_file(path)
        tensors, replaced, custom_code, config = file.tensors, file.replaced, (), file.hyper_parameters
    rows = []
    for name, value in tensors.items():
        rows.append((name, value.shape, value.dtype.name, value.nbytes, count_nonfinite(value)))
        release(value)
    common: dict[str, Any] = {"tensors": rows, "replaced": replaced, "custom_code": custom_code}
    try:
        found = detect(path, format=format)
    except CheckpointError as err:
        return Report(str(path), None, None, (), one_line(err), config, {}, **common)
    asks = {name: list(values) for name, values in found.asks.items()}
    arguments = config or {name: value for name, value in found.arguments.items() if _is_plain(value)}
    return Report(str(path), found.format, found.target, found.evidence, None, arguments, asks, **common)


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint file, folder, or repository owner/name on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    format: Annotated[str | None, typer.Option(help="One of the known formats, where it cannot be told.")] = None,
) -> None:
    """Format, configuration and tensors of a checkpoint; nothing in it is executed. Exit status 1 on errors."""
    from .checkpoint.hub import locate

    with reporting():
        report = examine(locate(path, revision), format)
        if as_json:
            typer.echo(report.to_json())
        else:
            _show(report)
        if report.problem is not None:
            raise CheckpointError(report.problem)


@contextmanager
def reporting() -> Iterator[None]:
    """Turn the errors of checkpoints and arguments into one line on stderr and exit status 1."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as err:
        typer.echo(f"error: {one_line(err)}", err=True)
        raise typer.Exit(1) from None


def one_line(err: BaseException) -> str:
    """The message on one line of at most 1000 characters, without control characters."""
    text = " ".join(str(err).split()) or type(err).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 1000 else text[:997] + "..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)


def _show(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def line(title: str, value: Any) -> None:
        console.print(f"{title + ':':16}{_printable(value)}", markup=False)

    line("path", report.path)
    line("format", report.format or "unknown")
    if report.architecture:
        line("architecture", report.architecture.replace(":", "."))
    for text in report.evidence:
        line("evidence", text)
    for name, value in report.config.items():
        line("config", f"{name} = {value!r}")
    for name, values in report.missing_arguments.items():
        line("to be given", f"{name}: one of {', '.join(map(repr, values))}")
    for text in report.replaced:
        line("replaced", f"{text} (pickled; nothing was imported or called)")
    for text in report.custom_code:
        line("custom code", f"{text} (not executed)")
    table = Table("name", "shape", "dtype", "bytes", "NaN, Inf", box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for name, shape, dtype, nbytes, bad in report.tensors:
        table.add_row(_printable(name), _printable(list(shape)), dtype, f"{nbytes:,}", str(bad or ""))
    Console(highlight=False, markup=False, width=max(console.width, 120)).print(table)
    totals = report.totals
    line("total", f"{totals['tensors']} tensors, {totals['parameters']:,} parameters, {totals['bytes']:,} bytes")
    if totals["nonfinite"]:
        line("not finite", f"{totals['nonfinite']:,} values are NaN or infinite")


def _printable(value: Any) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 300 else text[:297] + "..."
