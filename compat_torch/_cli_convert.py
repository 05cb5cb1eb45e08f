"""The `convert` command: a checkpoint of one format in, the same model in another out."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ._cli_inspect import reporting


class Family(StrEnum):
    """What `--to` takes."""

    HF = "hf"
    MAMBA_SSM = "mamba_ssm"
    LRNNX = "lrnnx"
    S4 = "s4"
    ORBAX = "orbax"


class Dtype(StrEnum):
    """What `--dtype` takes."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def convert(
    path: Annotated[str, typer.Argument(help="Checkpoint file, folder, or repository owner/name on the hub.")],
    out: Annotated[
        str, typer.Argument(help="Folder to write; for a single layer also a .safetensors, .bin or .pt file.")
    ],
    to: Annotated[Family, typer.Option(help="Format to write.")],
    format: Annotated[str | None, typer.Option(help="Of the source, where it cannot be told.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the parameters; kept by default.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read back bit for bit; compare outputs with the source in float64.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that convert wrote.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE that the checkpoint does not store, as discretization=zoh.")
    ] = None,
) -> None:
    """Write a checkpoint in another format, all or nothing. Exit status 1 on errors."""
    from .checkpoint.conversion import convert as run

    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with reporting(), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        done = run(
            path,
            out,
            to=to.value,
            format=format,
            dtype=None if dtype is None else _dtype(dtype),
            revision=revision,
            verify=verify,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=lambda written, total: bar.update(task, completed=written, total=total),
            **arguments(arg or []),
        )
    typer.echo(f"{done.path}: {done.source} -> {done.target}, {done.tensors} tensors, {done.nbytes:,} bytes")
    if done.difference is not None:
        typer.echo(
            f"verified: read back bit for bit; outputs differ from the source in float64 by {done.difference:.1e}"
        )


def arguments(pairs: list[str]) -> dict[str, Any]:
    """{"conj_sym": True} from ["conj_sym=true"]: JSON values where they are JSON, else text.

    Raises:
        ValueError: no "=" in a pair, or no name before it.
    """
    import json

    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--arg {pair!r}: expected NAME=VALUE, such as discretization=zoh")
        try:
            result[name] = json.loads(value)
        except ValueError:
            result[name] = value
    return result


def _dtype(dtype: Dtype) -> Any:
    import jax.numpy as jnp

    return getattr(jnp, dtype.value)
