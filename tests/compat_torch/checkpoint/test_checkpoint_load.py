"""`compat_torch.load`: files, arguments, errors (on lrnnx S5 and LRU), and its options."""

import gc
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file

import compat_torch
from compat_torch.checkpoint import FORMATS
from compat_torch.errors import (
    CheckpointError,
    CorruptCheckpointError,
    StateDictMismatchError,
    UnknownFormatError,
)
from compat_torch.models.lti import LRU, S5

H, N = 3, 4


def s5_weights(n=N, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"A": (n, 2), "B": (n, H), "log_dt": (n,), "C": (H, n, 2), "D": (H, H)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def lru_weights(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {name: (N,) for name in ("nu_log", "theta_log", "gamma_log")}
    shapes |= {"B_re": (N, H), "B_im": (N, H), "C_re": (H, N), "C_im": (H, N), "D": (H,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, weights, kind):
    if kind == "safetensors":
        save_file(weights, path)
        return path
    tensors = {name: torch.tensor(value) for name, value in weights.items()}
    if kind == "ckpt":
        tensors = {"state_dict": {f"model.{name}": value for name, value in tensors.items()}, "epoch": 3}
    torch.save(tensors, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


def assert_holds(module, weights):
    state = compat_torch.state_dict(module)
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert state[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(state[name], np.float64), value.astype(np.float64))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt", "legacy"])
def test_s5(tmp_path, kind):
    weights = s5_weights()
    model = compat_torch.load(write(tmp_path / f"w.{kind}", weights, kind), discretization="zoh")
    assert isinstance(model, S5)
    assert (model.d_model, model.d_state, model.discretization) == (H, N, "zoh")
    assert_holds(model, weights)
    assert model(jnp.ones((2, 5, H))).shape == (2, 5, H)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt", "legacy"])
def test_lru(tmp_path, kind):
    weights = lru_weights()
    model = compat_torch.load(write(tmp_path / f"w.{kind}", weights, kind))
    assert isinstance(model, LRU)
    assert (model.d_model, model.d_state) == (H, N)
    assert_holds(model, weights)
    assert model(jnp.ones((2, 5, H))).shape == (2, 5, H)


def test_the_same_as_loading_by_hand(tmp_path):
    weights = s5_weights()
    path = write(tmp_path / "w.pt", weights, "pt")
    loaded = compat_torch.load(path, discretization="bilinear", reference="paper")
    by_hand = S5(H, N, "bilinear", reference="paper")
    compat_torch.load_state_dict(by_hand, weights)
    x = jnp.linspace(-1, 1, 2 * 7 * H).reshape(2, 7, H)
    np.testing.assert_array_equal(loaded(x), by_hand(x))


def test_arguments_pass_through(tmp_path):
    path = write(tmp_path / "w.pt", s5_weights(), "pt")
    model = compat_torch.load(path, discretization="dirac", conj_sym=True, reference="paper", precision="high")
    assert isinstance(model, S5)
    assert (model.d_state, model.conj_sym, model.reference, model.precision) == (2 * N, True, "paper", "high")


def test_format_is_logged_and_can_be_given(tmp_path, caplog):
    caplog.set_level(logging.INFO, "compat_torch")
    path = write(tmp_path / "w.pt", lru_weights(), "pt")
    compat_torch.load(path)
    assert "lrnnx.lti.LRU" in caplog.text
    assert {"lrnnx.lti.S5", "lrnnx.lti.LRU"} < set(FORMATS)
    compat_torch.load(path, format="lrnnx.lti.LRU")
    with pytest.raises(ValueError, match=r"'s5' is not known; choose from .*'lrnnx\.lti\.S5', 'lrnnx"):
        compat_torch.load(path, format="s5")
    with pytest.raises(StateDictMismatchError, match=r"lrnnx\.lti\.S5"):
        compat_torch.load(path, format="lrnnx.lti.S5", discretization="zoh")


def test_what_the_file_cannot_give_is_asked_for(tmp_path):
    path = write(tmp_path / "w.pt", s5_weights(), "pt")
    message = (
        r"does not store these arguments; pass them to load:\n  discretization=...: one of 'zoh', 'bilinear', 'dir"
    )
    with pytest.raises(CheckpointError, match=message):
        compat_torch.load(path)
    with pytest.raises(ValueError, match="discretization"):
        compat_torch.load(path, discretization="tustin")


@pytest.mark.parametrize("argument", ["d_state", "d_model", "wrong", "rngs"])
def test_unknown_arguments(tmp_path, argument):
    path = write(tmp_path / "w.pt", s5_weights(), "pt")
    message = rf"'{argument}'.*accepted: discretization, conj_sym, reference, precision"
    with pytest.raises(TypeError, match=message):
        compat_torch.load(path, discretization="zoh", **{argument: 4})


def test_mismatches_are_all_listed(tmp_path):
    weights = s5_weights()
    weights["log_dtt"] = weights.pop("log_dt")
    weights["A"] = np.ones((N, 3), np.float32)
    with pytest.raises(StateDictMismatchError) as caught:
        compat_torch.load(write(tmp_path / "w.pt", weights, "pt"), discretization="zoh")
    error = caught.value
    assert error.missing == ["log_dt"]
    assert error.unexpected == ["log_dtt"]
    assert error.mismatched == ["A: expected (N, 2) = (4, 2), got (4, 3)"]
    assert "did you mean 'log_dt'" in str(error)
    assert "w.pt" in str(error)


def test_time_varying_s5_is_not_taken_for_the_invariant_one(tmp_path):
    weights = s5_weights() | {"B": np.ones((N, H, 2), np.float32), "D": np.ones(H, np.float32)}
    path = write(tmp_path / "w.pt", weights, "pt")
    with pytest.raises(CheckpointError, match=r"lrnnx\.ltv\.S5 .*\n  conj_sym=...: one of False, True"):
        compat_torch.load(path, discretization="zoh")
    assert_holds(compat_torch.load(path, discretization="zoh", conj_sym=True), weights)
    with pytest.raises(StateDictMismatchError) as caught:
        compat_torch.load(path, discretization="zoh", format="lrnnx.lti.S5")
    assert [line.partition(":")[0] for line in caught.value.mismatched] == ["B", "D"]


def test_unknown_format(tmp_path):
    weights = {f"conv{i}.weight": np.ones(2, np.float32) for i in range(30)}
    with pytest.raises(UnknownFormatError, match="and 18 more") as caught:
        compat_torch.load(write(tmp_path / "w.pt", weights, "pt"))
    for part in ("conv0.weight (2,)", "known formats: hf.mamba, ", "lrnnx.lti.S5, lrnnx.lti.LRU"):
        assert part in str(caught.value)


def test_what_is_near_is_described(tmp_path):
    weights = {"A": np.ones((N, 2), np.float32), "D": np.ones(H, np.float32), "other": np.ones(2, np.float32)}
    with pytest.raises(UnknownFormatError, match=r"lrnnx\.lti\.S5 needs: A \(N, 2\), B \(N, H\), log_dt"):
        compat_torch.load(write(tmp_path / "w.pt", weights, "pt"))


def test_a_layer_inside_a_model(tmp_path):
    inside = {f"blocks.1.lrnn.{name}": value for name, value in lru_weights().items()}
    path = write(tmp_path / "w.ckpt", inside | {"head.weight": np.ones(2, np.float32)}, "ckpt")
    with pytest.raises(UnknownFormatError, match=r"try load\(path, prefix='blocks\.1\.lrnn'\).*LRU"):
        compat_torch.load(path)
    assert_holds(compat_torch.load(path, prefix="blocks.1.lrnn"), lru_weights())
    assert_holds(compat_torch.load(path, prefix="model.blocks.1.lrnn"), lru_weights())


def test_the_dtype_is_the_file_s_unless_given(tmp_path):
    half = lru_weights(ml_dtypes.bfloat16)
    save_file(half, tmp_path / "w.safetensors")
    assert_holds(compat_torch.load(tmp_path / "w.safetensors"), half)
    wide = compat_torch.load(tmp_path / "w.safetensors", dtype=jnp.float32)
    assert_holds(wide, {name: value.astype(np.float32) for name, value in half.items()})


def test_float64(tmp_path):
    weights = lru_weights(np.float64)
    path = write(tmp_path / "w.pt", weights, "pt")
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        compat_torch.load(path)
    narrow = compat_torch.load(path, dtype=jnp.float32)
    assert_holds(narrow, {name: value.astype(np.float32) for name, value in weights.items()})
    with jax.enable_x64(True):
        assert_holds(compat_torch.load(path), weights)


def test_integers_are_refused(tmp_path):
    weights = lru_weights() | {"D": np.ones(H, np.int64)}
    with pytest.raises(StateDictMismatchError, match=r"D: .*int64"):
        compat_torch.load(write(tmp_path / "w.pt", weights, "pt"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_nan_and_infinity(tmp_path, dtype):
    weights = lru_weights(dtype)
    weights["D"][:2] = np.nan
    weights["B_re"][0, 0] = np.inf
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*allow_nonfinite=True") as caught:
        compat_torch.load(tmp_path / "w.safetensors")
    assert "D (2 of 3)" in str(caught.value)
    assert "B_re (1 of 12)" in str(caught.value)
    assert_holds(compat_torch.load(tmp_path / "w.safetensors", allow_nonfinite=True), weights)


def mamba_weights(dtype):
    shapes = {"in_proj.weight": (22, 5), "conv1d.weight": (11, 1, 3), "conv1d.bias": (11,), "x_proj.weight": (9, 11)}
    shapes |= {"dt_proj.weight": (11, 1), "dt_proj.bias": (11,), "dtA_proj.weight": (11, 1), "dtA_proj.bias": (11,)}
    shapes |= {"A_log": (11, 4), "D": (11,), "out_proj.weight": (5, 11)}
    rng = np.random.default_rng()
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", mamba_weights(np.float32))
def test_one_value_anywhere_that_is_not_finite(tmp_path, name, stored):
    weights = mamba_weights(stored)
    for value, place in ((np.nan, -1), (np.inf, 0), (-np.inf, weights[name].size // 2)):
        weights[name].flat[place] = value
        save_file(weights, tmp_path / "w.safetensors")
        told = rf"infinite weights: {re.escape(name)} \(1 of {weights[name].size}\)"
        with pytest.raises(CheckpointError, match=told):
            compat_torch.load(tmp_path / "w.safetensors", discretization="mamba")
        weights[name].flat[place] = 1


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_values_with_infinite_sums(tmp_path, stored):
    weights = {name: np.full_like(value, ml_dtypes.finfo(stored).max) for name, value in mamba_weights(stored).items()}
    weights["D"][0] *= -1
    save_file(weights, tmp_path / "w.safetensors")
    assert_holds(compat_torch.load(tmp_path / "w.safetensors", discretization="mamba"), weights)


def test_what_is_left_out_may_be_anything(tmp_path):
    weights = lru_weights()
    save_file(weights | {"more": np.full(3, np.nan, np.float32)}, tmp_path / "w.safetensors")
    assert_holds(compat_torch.load(tmp_path / "w.safetensors", strict=False), weights)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_the_module_does_not_depend_on_the_file(tmp_path, stored, dtype):
    path, weights = tmp_path / "w.safetensors", mamba_weights(stored)
    save_file(weights, path)
    with jax.enable_x64(stored is np.float64):
        model = compat_torch.load(path, dtype=dtype, discretization="mamba")
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
        assert_holds(model, {name: value.astype(dtype or stored) for name, value in weights.items()})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the mappings as Linux lists them")
def test_the_file_is_no_longer_mapped(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(mamba_weights(np.float32), path)
    model = compat_torch.load(path, discretization="mamba")
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert model.d_model == 5


def test_on_the_default_device(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(mamba_weights(np.float32), path)
    code = f"""
        import jax
        from flax import nnx
        import compat_torch

        jax.config.update("jax_num_cpu_devices", 2)
        with jax.default_device(jax.devices("cpu")[1]):
            model = compat_torch.load({str(path)!r}, discretization="mamba")
        print({{leaf.device.id for leaf in jax.tree.leaves(nnx.state(model))}})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.stdout.strip() == "{1}", done.stderr


def test_corrupt_files_reach_the_caller(tmp_path):
    path = write(tmp_path / "w.pt", s5_weights(), "pt")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptCheckpointError, match=r"w\.pt"):
        compat_torch.load(path, discretization="zoh")


def test_loading_leaves_the_random_streams_alone(tmp_path):
    path = write(tmp_path / "w.pt", lru_weights(), "pt")
    compat_torch.load(path)
    first, second = LRU(H, N), LRU(H, N)
    assert not np.array_equal(first.B_re[...], second.B_re[...])


def test_without_torch(tmp_path):
    path = write(tmp_path / "w.pt", lru_weights(), "pt")
    code = f"""
        import sys

        sys.modules["torch"] = None
        import compat_torch

        print(type(compat_torch.load({str(path)!r})).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LRU", done.stderr


def test_rename_and_ignore(tmp_path):
    inside = {f"old_{name}": value for name, value in lru_weights().items()}
    path = write(tmp_path / "w.pt", inside | {"head.weight": np.ones(2, np.float32)}, "pt")
    model = compat_torch.load(path, rename=[("^old_", "new_"), ("^new_", "")], ignore=["^head"])
    assert_holds(model, lru_weights())
    with pytest.raises(CheckpointError, match="two tensors the name D"):
        compat_torch.load(path, rename=[("^old_.*", "D")], ignore=["^head"])
    with pytest.raises(ValueError, match="not a regular expression"):
        compat_torch.load(path, ignore=["("])
    with pytest.raises(ValueError, match="ignore must be a list"):
        compat_torch.load(path, ignore="head")
    with pytest.raises(ValueError, match="rename must be a list of"):
        compat_torch.load(path, rename=["head"])


def test_not_strict(tmp_path, caplog):
    weights = lru_weights() | {"head.weight": np.ones(2, np.float32)}
    missing = weights.pop("D")
    path = write(tmp_path / "w.pt", weights, "pt")
    with pytest.raises(StateDictMismatchError) as caught:
        compat_torch.load(path)
    assert (caught.value.missing, caught.value.unexpected) == (["D"], ["head.weight"])
    model = compat_torch.load(path, strict=False)
    assert "left out: head.weight" in caplog.text
    assert "initialised at random, because the file lacks it: D" in caplog.text
    state = compat_torch.state_dict(model)
    assert state.pop("D").shape == missing.shape
    for name, value in state.items():
        np.testing.assert_array_equal(value, weights[name])
    with pytest.raises(StateDictMismatchError, match=r"nu_log: expected"):
        compat_torch.load(write(tmp_path / "v.pt", weights | {"nu_log": np.ones(9, np.float32)}, "pt"), strict=False)


@pytest.mark.parametrize(
    "hyper", [{"discretization": "bilinear"}, {"layer": {"discretization": "bilinear"}, "lr": 1.0}]
)
def test_hyper_parameters_beside_the_weights(tmp_path, hyper, caplog):
    caplog.set_level(logging.INFO, "compat_torch")
    tensors = {f"model.{name}": torch.tensor(value) for name, value in s5_weights().items()}
    torch.save({"state_dict": tensors, "hyper_parameters": {**hyper, "d_model": 77}}, tmp_path / "w.ckpt")
    model = compat_torch.load(tmp_path / "w.ckpt", reference="paper")
    assert isinstance(model, S5)
    assert (model.discretization, model.d_model) == ("bilinear", H)
    assert "hyper_parameters give discretization" in caplog.text
    again = compat_torch.load(tmp_path / "w.ckpt", discretization="zoh")
    assert isinstance(again, S5)
    assert again.discretization == "zoh"
