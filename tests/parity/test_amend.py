"""The derived files of the golden folder can be made again from what is stored beside them."""

import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.amend import RECIPES, compare, main
from parity.case import GOLDEN

BLOCK = "s4repo_block_dplr_fourier"


def test_every_derived_file_has_a_recipe():
    names = ("io_amended", "grads64", "io_bfloat16")
    stored = {(path.parent.name, path.name) for name in names for path in GOLDEN.glob(f"*/{name}.safetensors")}
    assert stored == {(case, recipe.file) for case, recipe in RECIPES.items()}


@pytest.mark.parametrize("case", [BLOCK, "s4repo_block_dplr_legt2"])
def test_dense_gradients_are_the_stored_ones(case, capsys):
    assert main([case]) == 0
    assert f"{case}/grads64.safetensors: 10 arrays" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("case", ["hf_mamba2_tiny_tied", "hf_recurrent_gemma_tiny"])
def test_runs_of_transformers_are_the_stored_ones(case):
    pytest.importorskip("transformers")
    assert main([case]) == 0


def test_a_changed_file_is_seen_and_written_again(tmp_path):
    shutil.copytree(GOLDEN / BLOCK, tmp_path / BLOCK)
    file = tmp_path / BLOCK / "grads64.safetensors"
    stored = load_file(file)
    file.unlink()
    save_file({**stored, "grad64.x": stored["grad64.x"] + 1e-6}, file)
    assert main([BLOCK, "--golden", str(tmp_path)]) == 1
    assert main([BLOCK, "--golden", str(tmp_path), "--write"]) == 0
    assert compare(load_file(file), stored)[1]


def test_a_changed_input_is_seen(tmp_path):
    shutil.copytree(GOLDEN / BLOCK, tmp_path / BLOCK)
    file = tmp_path / BLOCK / "io.safetensors"
    io = load_file(file)
    file.unlink()
    save_file({**io, "x": io["x"] * np.float32(1.01)}, file)
    with pytest.raises(ValueError, match="outputs differ from the stored y64"):
        main([BLOCK, "--golden", str(tmp_path)])


def test_arrays_of_another_name_shape_or_dtype_differ():
    one = {"a": np.ones(3)}
    for other in ({"b": np.ones(3)}, {"a": np.ones(4)}, {"a": np.ones(3, np.float32)}, {"a": np.full(3, np.nan)}):
        assert not compare(one, other)[1]
        assert not compare(other, one)[1]
    assert compare(one, {"a": one["a"] + 1e-12}) == (pytest.approx(1e-12, rel=1e-3), True)


def test_without_the_reference_nothing_is_made(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lrnnx", None)
    assert main(["lrnnx_s4_fourier"]) == 2
    assert "not made, the reference cannot be imported" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["no_such_case"])
