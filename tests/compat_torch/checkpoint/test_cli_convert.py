"""`convert`: formats, dtypes, verification, and nothing written when it fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import typer
from flax import nnx
from oracles import torch_models
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import compat_torch.checkpoint.conversion as conversion
from compat_torch import arrays
from compat_torch._cli_convert import arguments, convert
from compat_torch.checkpoint import load, open_folder, read_state_dict
from compat_torch.errors import CheckpointError
from parity.case import read_case

GOLDEN = Path(__file__).parents[3] / "parity" / "golden"
LRU = {
    "nu_log": (3,), "theta_log": (3,), "gamma_log": (3,), "B_re": (3, 2), "B_im": (3, 2), "C_re": (2, 3),
    "C_im": (2, 3), "D": (2,),
}  # fmt: skip


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(convert)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def weights(tmp_path):
    rng = np.random.default_rng()
    tensors = {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in LRU.items()}
    save_file(tensors, tmp_path / "w.safetensors")
    return tensors


def listing(folder):
    return sorted(os.listdir(folder))


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_a_layer_to_a_folder_and_to_files(tmp_path, weights):
    result = run(tmp_path / "w.safetensors", tmp_path / "out", "--to", "lrnnx", "--verify")
    assert result.exit_code == 0, result.output
    assert "lrnnx.lti.LRU -> lrnnx.lti.LRU, 8 tensors, 140 bytes" in result.output
    assert "verified: read back bit for bit" in result.output
    assert_same(open_folder(tmp_path / "out").tensors, weights)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["format"] == {"from": "lrnnx.lti.LRU", "to": "lrnnx.lti.LRU"}
    assert list(record["source"]["files"]) == ["w.safetensors"]
    for name in ("out.pt", "out.safetensors"):
        assert run(tmp_path / "w.safetensors", tmp_path / name, "--to", "lrnnx", "--verify").exit_code == 0
        assert_same(read_state_dict(tmp_path / name), weights)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", jnp.bfloat16), ("float64", np.float64)])
def test_dtypes(tmp_path, weights, dtype, expected):
    result = run(tmp_path / "w.safetensors", tmp_path / "out", "--to", "lrnnx", "--dtype", dtype, "--verify")
    assert result.exit_code == 0, result.output
    assert_same(
        open_folder(tmp_path / "out").tensors, {name: value.astype(expected) for name, value in weights.items()}
    )
    if dtype == "float64":
        result = run(tmp_path / "out", tmp_path / "again", "--to", "lrnnx", "--verify")
        assert result.exit_code == 0, result.output
        assert open_folder(tmp_path / "again").tensors["D"].dtype == np.float64


def test_orbax(tmp_path, weights):
    import orbax.checkpoint as ocp

    result = run(tmp_path / "w.safetensors", tmp_path / "out", "--to", "orbax", "--verify")
    assert result.exit_code == 0, result.output
    model = load(tmp_path / "w.safetensors")
    graph, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "state", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    x = jnp.ones((1, 5, 2))
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), model(x))


@pytest.mark.parametrize("to", ["mamba_ssm", "hf"])
def test_a_model_of_transformers(tmp_path, to):
    source = GOLDEN / "hf_mamba_tiny_random" / "hf"
    result = run(source, tmp_path / "out", "--to", to, *(["--verify"] if to == "hf" else []))
    assert result.exit_code == 0, result.output
    assert f"hf.mamba -> {to}.mamba" in result.output
    folder = open_folder(tmp_path / "out")
    assert folder.config is not None
    names = {"hf": "embeddings", "mamba_ssm": "embedding"}
    original = open_folder(source).tensors["backbone.embeddings.weight"]
    np.testing.assert_array_equal(folder.tensors[f"backbone.{names[to]}.weight"], original)
    if to == "mamba_ssm":
        again = run(tmp_path / "out", tmp_path / "again", "--to", "hf")
        assert again.exit_code == 0, again.output
        assert_same(open_folder(tmp_path / "again").tensors, dict(open_folder(source).tensors))


@pytest.mark.parametrize(
    ("name", "case", "file", "out"),
    [
        pytest.param("S4Block", "s4repo_block_dplr_default", "weights.safetensors", "out.pt", marks=pytest.mark.full),
        ("S4Block", "s4repo_block_diag_bidir", "weights.safetensors", "out.safetensors"),
        ("S4D", "s4repo_s4d_t", "weights.safetensors", "out.pt"),
        ("S4Model", "s4repo_digits_trained", "lightning.ckpt", "out.pt"),
    ],
)
def test_layers_and_the_model_of_s4(tmp_path, name, case, file, out):
    result = run(GOLDEN / case / file, tmp_path / out, "--to", "s4", "--verify")
    assert result.exit_code == 0, result.output
    assert f"s4.{name} -> s4.{name}" in result.output
    assert "verified: read back bit for bit" in result.output
    expected = load_file(GOLDEN / case / "weights.safetensors")
    if out.endswith(".pt"):
        loaded = torch.load(tmp_path / out, weights_only=True)
        assert_same({name: tensor.numpy() for name, tensor in loaded.items()}, expected)
    else:
        assert_same(load_file(tmp_path / out), expected)
    if name == "S4Model":
        recorded = read_case(GOLDEN / case).runs[0]
        logits = nnx.jit(lambda model, x: model(x))(load(tmp_path / out), jnp.asarray(recorded.x[:5]))
        np.testing.assert_allclose(logits, recorded.y[:5], atol=1e-5 * np.abs(recorded.y[:5]).max(), rtol=0)


def test_a_language_model_of_lrnnx(tmp_path):
    case = GOLDEN / "lrnnx_lm_lru_mamba_s5"
    command = (case / "save_pretrained", tmp_path / "out", "--to", "lrnnx", "--verify")
    result = run(*command)
    assert result.exit_code == 1
    assert "mixer_kwargs={'S5': {'discretization': ...}}" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run(*command, "--arg", 'mixer_kwargs={"S5": {"discretization": "zoh"}}')
    assert result.exit_code == 0, result.output
    assert "lrnnx.lm -> lrnnx.lm, 30 tensors" in result.output
    assert "verified: read back bit for bit" in result.output
    before, after = (
        torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (command[0], tmp_path / "out")
    )
    assert_same(
        {name: tensor.numpy() for name, tensor in after.items()},
        {name: tensor.numpy() for name, tensor in before.items()},
    )
    recorded = read_case(case).runs[0]
    logits = nnx.jit(lambda model, ids: model(ids).logits)(load(tmp_path / "out"), jnp.asarray(recorded.x))
    np.testing.assert_allclose(logits, recorded.y, atol=1e-5, rtol=0)


def test_arguments_the_checkpoint_does_not_store(tmp_path):
    rng = np.random.default_rng()
    shapes = {"A": (3, 2), "B": (3, 2), "log_dt": (3,), "C": (2, 3, 2), "D": (2, 2)}
    tensors = {name: -np.abs(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    tensors["B"], tensors["C"] = tensors["B"].astype("c8"), np.ascontiguousarray(tensors["C"])
    save_file({name: np.ascontiguousarray(value.real) for name, value in tensors.items()}, tmp_path / "w.safetensors")
    result = run(tmp_path / "w.safetensors", tmp_path / "out", "--to", "lrnnx")
    assert result.exit_code == 1
    assert "discretization" in result.stderr
    options = ["--arg", "discretization=zoh", "--arg", "conj_sym=false"]
    result = run(tmp_path / "w.safetensors", tmp_path / "out", "--to", "lrnnx", *options)
    assert result.exit_code == 0, result.output


def test_the_format_can_be_given(tmp_path):
    source = GOLDEN / "lrnnx_centaurus_full_a" / "weights.safetensors"
    result = run(source, tmp_path / "out", "--to", "lrnnx")
    assert result.exit_code == 1
    assert "fits several formats" in result.stderr
    result = run(source, tmp_path / "out", "--to", "lrnnx", "--format", "lrnnx.lti.CentaurusFull")
    assert result.exit_code == 0, result.output
    assert "lrnnx.lti.CentaurusFull -> lrnnx.lti.CentaurusFull" in result.output
    result = run(source, tmp_path / "other", "--to", "lrnnx", "--format", "gguf")
    assert result.exit_code == 1
    assert "format='gguf' is not known" in result.stderr


def test_arguments_are_parsed():
    assert arguments(["a=zoh", "b=true", "c=2", 'd={"e": [1]}', "f=x=y"]) == {
        "a": "zoh", "b": True, "c": 2, "d": {"e": [1]}, "f": "x=y",
    }  # fmt: skip
    for wrong in ("zoh", "=zoh", "a b=c"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            arguments([wrong])


def test_nothing_is_written_when_it_fails(tmp_path, weights):
    cases = {
        ("absent", "out", "lrnnx"): "there is no file or folder",
        ("w.safetensors", "out", "hf"): "LRU cannot be written as format='hf'",
        ("bad.safetensors", "out", "lrnnx"): "NaN or infinite",
        ("notes.json", "out", "lrnnx"): "neither a safetensors nor a torch file",
    }
    save_file({**weights, "D": np.array([np.nan, 1], "f4")}, tmp_path / "bad.safetensors")
    (tmp_path / "notes.json").write_text("[1, 2, 3, 4, 5]")
    before = listing(tmp_path)
    for (source, out, to), message in cases.items():
        result = run(tmp_path / source, tmp_path / out, "--to", to)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert listing(tmp_path) == before
    result = run(tmp_path / "bad.safetensors", tmp_path / "out", "--to", "lrnnx", "--allow-nonfinite")
    assert result.exit_code == 0, result.output
    assert run(tmp_path / "w.safetensors", tmp_path / "out2", "--to", "gguf").exit_code == 2


def test_overwriting(tmp_path, weights):
    arguments = (tmp_path / "w.safetensors", tmp_path / "out", "--to", "lrnnx")
    assert run(*arguments).exit_code == 0
    result = run(*arguments)
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert_same(open_folder(tmp_path / "out").tensors, weights)


def test_outputs_are_verified_against_float64(tmp_path, weights):
    """The difference that is reported is that to the recurrence, step by step in float64."""
    done = conversion.convert(tmp_path / "w.safetensors", tmp_path / "out", to="lrnnx", verify=True)
    rng = np.random.default_rng(0)
    rng.integers(0, 8, (1, 24))  # token ids, which the layer refuses
    x = rng.standard_normal((1, 24, 2))
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    oracle = torch_models.LRU(2, 3).double()
    oracle.load_state_dict(tensors)
    expected = oracle(torch.from_numpy(x[0])).detach().numpy()
    y = np.asarray(nnx.jit(lambda model, x: model(x))(load(tmp_path / "out"), jnp.asarray(x, jnp.float32)))[0]
    assert done.difference is not None
    assert 0 < done.difference < 1e-6
    error = np.abs(y - expected).max() / max(1, np.abs(expected).max())
    assert done.difference == pytest.approx(error, rel=1e-3)


def test_verification_can_fail_and_then_nothing_appears(tmp_path, weights, monkeypatch):
    real = conversion.outputs
    monkeypatch.setattr(conversion, "load", lambda path, **options: _spoiled(load(path, **options), path))

    def _spoiled(model, path):
        if ".partial" in str(path):
            model.D[...] = model.D[...] + 1e-3
        return model

    with pytest.raises(CheckpointError, match="other outputs"):
        conversion.convert(tmp_path / "w.safetensors", tmp_path / "out", to="lrnnx", verify=True)
    monkeypatch.setattr(conversion, "load", load)
    monkeypatch.setattr(conversion, "_same_bits", lambda a, b: a.shape != (2,))
    with pytest.raises(CheckpointError, match="D is not what was to be written"):
        conversion.convert(tmp_path / "w.safetensors", tmp_path / "out", to="lrnnx", verify=True)
    assert listing(tmp_path) == ["w.safetensors"]
    assert real is conversion.outputs


KILLED = """
import sys, time
from compat_torch.checkpoint.conversion import convert

def wait(written, total):
    print(written, total, flush=True)
    time.sleep(60)

convert(sys.argv[1], sys.argv[2], to=sys.argv[3], progress=wait)
"""


@pytest.mark.parametrize("to", ["hf", "mamba_ssm"])
def test_a_conversion_that_is_killed_leaves_no_output(tmp_path, to):
    source = GOLDEN / "hf_mamba_tiny_random" / "hf"
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), to]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as output:
        written, total = map(int, output.readline().split())
        assert 0 < written < total
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    assert not (tmp_path / "out").exists()
    assert [name[:5] for name in listing(tmp_path)] == [".out."]
    assert run(source, tmp_path / "out", "--to", to).exit_code == 0
    assert load(tmp_path / "out").state_dict()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("out", ["out", "out.pt", "out.safetensors"])
def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path, weights, error, out):
    def interrupt(written, total):
        assert 0 < written < total
        raise error("in the middle")

    with pytest.raises(error):
        conversion.convert(tmp_path / "w.safetensors", tmp_path / out, to="lrnnx", progress=interrupt)
    assert listing(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize(("to", "copies"), [("hf", 0), ("mamba_ssm", 0), ("orbax", 1)])
def test_a_conversion_copies_no_weights(tmp_path, monkeypatch, to, copies):
    """Its memory is that of a few tensors: what is written are views of the source."""
    copied: list[int] = []
    real = arrays.copy_into

    def copy_into(target, source):
        copied.append(target.nbytes)
        real(target, source)

    monkeypatch.setattr(arrays, "copy_into", copy_into)
    done = conversion.convert(GOLDEN / "hf_mamba_tiny_random" / "hf", tmp_path / "out", to=to)
    assert sum(copied) == copies * done.nbytes


def test_a_torch_file_in(tmp_path, weights):
    torch.save({"model": {f"module.{k}": torch.from_numpy(v) for k, v in weights.items()}}, tmp_path / "w.pt")
    assert run(tmp_path / "w.pt", tmp_path / "out", "--to", "lrnnx").exit_code == 0
    assert_same(open_folder(tmp_path / "out").tensors, weights)
