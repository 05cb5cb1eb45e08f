"""`python -m parity --via torch2jax` where it cannot run: one line, exit status 2, nothing written."""

import sys

import pytest
from typer.testing import CliRunner

from parity import __main__ as command
from parity import torch2jax
from parity.live import Configuration, ReferenceMissingError


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch2jax", None)


def refused(tmp_path, *options):
    """The line it says."""
    report = tmp_path / "report.json"
    result = CliRunner().invoke(command.app, ["--via", "torch2jax", "--json", str(report), *options])
    assert result.exit_code == 2, result.output
    assert not report.exists()
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.output
    assert result.stderr == ""
    return lines[0]


def test_without_torch2jax_it_says_what_to_install(tmp_path, absent):
    line = refused(tmp_path)
    assert "torch2jax is not installed" in line
    assert line.endswith(f"pip install --no-deps {torch2jax.TORCH2JAX}")


def test_as_a_program(monkeypatch, capsys, absent):
    monkeypatch.setattr(sys, "argv", ["parity", "run", "--via", "torch2jax"])
    with pytest.raises(SystemExit) as exit_status:
        command.main()
    assert exit_status.value.code == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_dtype(tmp_path, dtype):
    assert refused(tmp_path, "--dtype", dtype) == (
        f"the traced reference computes in float32 only, got dtype={dtype!r}"
    )


def test_other_errors_are_not_hidden(monkeypatch):
    def rows(pattern, dtype):
        raise ValueError("of the comparison itself")
        yield

    monkeypatch.setattr(torch2jax, "rows", rows)
    result = CliRunner().invoke(command.app, ["--via", "torch2jax"])
    assert isinstance(result.exception, ValueError)


def test_as_functions(absent):
    with pytest.raises(ReferenceMissingError, match="--no-deps torch2jax=="):
        next(torch2jax.rows(None, "float32"))
    with pytest.raises(ValueError, match="in float32 only, got dtype='float64'"):
        next(torch2jax.rows(None, "float64"))


@pytest.mark.parametrize(
    ("cls", "shape", "traced", "remark"),
    [
        ("lrnnx.models.ltv.mamba:Mamba", (1, 200, 7), (1, 12, 7), "12 of 200 steps"),
        ("lrnnx.models.ltv.s7:S7", (2, 12, 3), (2, 12, 3), ""),
        ("lrnnx.models.lti.s5:S5", (1, 200, 7), (1, 200, 7), ""),
    ],
)
def test_loops_over_time_are_cut_and_say_so(cls, shape, traced, remark):
    configuration, said, options = torch2jax._shortened(Configuration(cls, {}, shape))
    assert (configuration.shape, said) == (traced, remark)
    assert bool(options) == (".ltv." in cls)
