"""Command line: `python -m compat_torch COMMAND`, also installed as `compat-torch`."""

from __future__ import annotations

try:
    import typer
    from rich.console import Console
except ImportError as err:
    raise ImportError("the command line needs typer and rich: pip install 'spyx-torch[cli]'") from err

from . import doctor as _doctor
from ._cli_convert import convert
from ._cli_generate import generate
from ._cli_inspect import inspect

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def commands() -> None:
    """PyTorch state-space models in JAX."""


for _command in (inspect, convert, generate):
    app.command()(_command)


@app.command()
def doctor() -> None:
    """Versions, devices, precision, and known clashes with the fix for each. Exit status 1 if there is one."""
    console = Console(highlight=False)
    findings = _doctor.report()
    for finding in findings:
        mark = "[green]ok [/]" if finding.problem is None else "[red]bad[/]"
        console.print(mark, end=" ")
        console.print(f"{finding.name}: {finding.value}", markup=False, soft_wrap=True)
        if finding.problem is not None:
            text = f"      {finding.problem}\n      fix: {finding.fix}"
            console.print(text, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(0 if _doctor.healthy(findings) else 1)


def main() -> None:
    """Entry point."""
    app(prog_name="compat-torch")


if __name__ == "__main__":
    main()
