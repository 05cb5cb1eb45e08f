"""`inspect`: what it shows, its JSON, one line and exit status 1 for whatever cannot be read."""

import argparse
import json

import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from compat_torch._cli_inspect import examine, inspect

LRU = {
    "nu_log": (3,), "theta_log": (3,), "gamma_log": (3,), "B_re": (3, 2), "B_im": (3, 2), "C_re": (2, 3),
    "C_im": (2, 3), "D": (2,),
}  # fmt: skip
WEIGHTS = {name: np.random.default_rng().standard_normal(shape, np.float32) for name, shape in LRU.items()}


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(inspect)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_file(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    result = run(tmp_path / "w.safetensors")
    assert result.exit_code == 0, result.output
    for text in ("lrnnx.lti.LRU", "compat_torch.models.lti", "d_model = 2", "B_re", "[3, 2]", "float32", "24"):
        assert text in result.output
    assert "8 tensors, 35 parameters, 140 bytes" in result.output
    assert "not finite" not in result.output


def test_json(tmp_path):
    bad = {**WEIGHTS, "D": np.array([np.nan, np.inf], "f4")}
    save_file(bad, tmp_path / "w.safetensors")
    result = run(tmp_path / "w.safetensors", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["format"] == "lrnnx.lti.LRU"
    assert report["totals"] == {"tensors": 8, "parameters": 35, "bytes": 140, "nonfinite": 2}
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["D"] == {"name": "D", "shape": [2], "dtype": "float32", "bytes": 8, "nonfinite": 2}
    assert "2 values are NaN or infinite" in run(tmp_path / "w.safetensors").output


def test_a_folder_with_its_configuration(tmp_path):
    save_file({"backbone.embeddings.weight": np.ones((4, 2), "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoModel": "x.Y"}}')
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "config:         model_type = 'unheard_of'" in result.output
    assert "x.Y (not executed)" in result.output
    assert "backbone.embeddings.weight" in result.output
    assert result.stderr.startswith("error: ")
    assert "'unheard_of' is not supported" in result.stderr
    assert result.stderr.count("\n") == 1


def test_pickled_classes_are_named(tmp_path):
    weights = {name: torch.from_numpy(value) for name, value in WEIGHTS.items()}
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "w.ckpt")
    result = run(tmp_path / "w.ckpt")
    assert result.exit_code == 0, result.output
    assert "argparse.Namespace (pickled; nothing was imported or called)" in result.output
    assert examine(tmp_path / "w.ckpt").replaced == ("argparse.Namespace",)


def test_control_characters_and_markup_in_names_do_nothing(tmp_path):
    save_file({"[red]a\x1b[2J\nb": np.ones(1, "f4")}, tmp_path / "w.safetensors")
    result = run(tmp_path / "w.safetensors")
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "[red]a?[2J?b" in result.output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file or folder"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"PK\x03\x04 broken"), "truncated or damaged"),
        (lambda path: path.write_bytes(b"<html>\n</html>"), "web page"),
        (lambda path: path.mkdir(), "has no weights"),
        (lambda path: torch.save([1, 2], path), "not a state_dict"),
    ],
)
def test_errors_are_one_line(tmp_path, make, message):
    make(tmp_path / "w.pt")
    for options in ([], ["--json"]):
        result = run(tmp_path / "w.pt", *options)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
