"""Command line: `python -m parity [run] [options]`, also installed as `spyx-parity`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as err:
    raise ImportError("the parity report needs typer and rich: pip install 'spyx-torch[cli]'") from err

from .case import GOLDEN, Case, case_class, find_cases
from .compare import Precision, Row, check, check_folder
from .live import ReferenceMissingError, live_cases, versions
from .report import print_table, summary, write_json
from .subjects import subjects_of

_WORTH_PROCESSES = 8  # cases: fewer are done before other processes have started

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    golden: Annotated[Path, typer.Option(help="Folder of reference cases.")] = GOLDEN,
    pattern: Annotated[str | None, typer.Option("-k", help="Only cases whose name matches (part or glob).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file as well.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Arithmetic to check.")] = "float32",
    all: Annotated[bool, typer.Option("--all", help="List unsupported cases too.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Compare with the installed lrnnx instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the live weights and inputs.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes for the stored cases.")] = min(os.cpu_count() or 1, 8),
    via: Annotated[
        Literal["torch2jax"] | None, typer.Option(help="Trace the installed lrnnx itself into JAX, and compare there.")
    ] = None,
) -> None:
    """Check forward, step and gradients against the references, one table row a case.

    Exit status: 0 if every row is identical, 1 if not, 2 if there was nothing to check.
    """
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 120)
    try:
        if via is not None:
            from . import torch2jax

            left_out, made_with = 0, {"via": via}
            rows = _with_progress(torch2jax.rows(pattern, dtype), None, console)
        elif live:
            cases, left_out, made_with = live_cases(seed), 0, {"seed": seed}
            rows = _with_progress(_live_rows(cases, pattern, dtype), None, console)
            made_with |= versions()
        else:
            paths = find_cases(golden, pattern or "*")
            known = [path for path in paths if subjects_of(case_class(path))]
            listed = paths if all or pattern else known
            left_out = len(paths) - len(listed)
            rows = _with_progress(_golden_rows(listed, dtype, jobs), len(listed), console)
            made_with = {"golden": str(golden)}
    except (ReferenceMissingError, FileNotFoundError) as err:
        raise _nothing_checked(str(err), console) from err
    except ValueError as err:
        if via is None or dtype == "float32":
            raise
        raise _nothing_checked(str(err), console) from err
    if not rows:
        raise _nothing_checked(f"no case matches {pattern!r}" if pattern else "no case to check", console)
    print_table(rows, console)
    console.print(summary(rows, left_out), style="bold", highlight=False)
    if json is not None:
        about = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
        write_json(rows, json, {"dtype": dtype, **made_with, **about})
    raise typer.Exit(0 if all_identical(rows) else 1)


def _nothing_checked(why: str, console: Console) -> typer.Exit:
    console.print(why, style="red", markup=False, soft_wrap=True)
    return typer.Exit(2)


def all_identical(rows: Iterable[Row]) -> bool:
    """Whether every verdict is "identical"."""
    return {row.verdict for row in rows} == {"identical"}


def _golden_rows(paths: list[Path], precision: Precision, jobs: int) -> Iterator[list[Row]]:
    rows_of = partial(check_folder, precision=precision)
    if jobs == 1 or len(paths) < _WORTH_PROCESSES:
        yield from map(rows_of, paths)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(rows_of, paths)


def _live_rows(cases: Iterator[Case], pattern: str | None, precision: Precision) -> Iterator[list[Row]]:
    for case in cases:
        if pattern is None or pattern in case.name:
            yield _check_all(case, precision)


def _check_all(case: Case, precision: Precision) -> list[Row]:
    return [check(case, subject, precision) for subject in subjects_of(case.cls)]


def _with_progress(steps: Iterator[list[Row]], total: int | None, console: Console) -> list[Row]:
    label, current = TextColumn("checking"), TextColumn("{task.description}")
    columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), current)
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("", total=total)
        for found in steps:
            rows += found
            progress.update(task, advance=1, description=found[-1].case)
    return rows


def main() -> None:
    """Entry point; `run` may be left out."""
    args = sys.argv[1:]
    app(args[1:] if args[:1] == ["run"] else args, prog_name="parity")


if __name__ == "__main__":
    main()
