"""Hostile folders: one clear error each, quickly, in little memory, and nothing written."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

import compat_torch.architectures.mamba_lm  # noqa: F401  (so that its import is not timed)
from compat_torch.checkpoint import from_pretrained, load, open_folder
from compat_torch.checkpoint.conversion import convert
from compat_torch.checkpoint.json_file import read_json
from compat_torch.errors import CheckpointError, CorruptCheckpointError, UnknownFormatError

GOLDEN = Path(__file__).parents[3] / "parity" / "golden" / "hf_mamba_tiny_random" / "hf"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
WEIGHTS = {name: np.array(value) for name, value in open_folder(GOLDEN).tensors.items()}
PROFILE = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def assert_refused(folder, match, error=CheckpointError):
    """`error`, of which `match` is part, in under a second of this process's time and 64 MB, with nothing written."""
    out = folder.parent / "out"
    start = time.process_time()
    with pytest.raises(error, match=match) as caught:
        convert(folder, out, to="hf")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 5000
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            convert(folder, out, to="hf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert os.listdir(folder.parent) == [folder.name]


def test_the_model_itself_is_sound(model):
    assert convert(model, model.parent / "out", to="hf").tensors == len(WEIGHTS)


CONFIGS = {
    "empty": (b"", "is empty"),
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[]", "JSON list; expected an object"),
    "a number": (b"3", "JSON int"),
    "NaN": (b'{"a": NaN}', "NaN is no value"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c'.* more than once"),
    "deep": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 32"),
    "very deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "truncated or damaged|nested"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "UTF-8 with a mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "latin-1": (b'{"a": "\xfc"}', "not UTF-8"),
    "a large number": (b'{"a": ' + b"9" * 100_000 + b"}", "digits|damaged"),
    "large": (b'{"a": "' + b"x" * (5 << 20) + b'"}', "at most 4194304 are read"),
    "binary": (bytes(range(256)), "not UTF-8|not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json_that_is_none(model, case):
    content, message = CONFIGS[case]
    (model / "config.json").write_bytes(content)
    assert_refused(model, message)


def test_a_config_that_is_sparse_and_huge(model):
    with open(model / "config.json", "wb") as file:
        file.truncate(1 << 40)
    assert_refused(model, "at most")


def test_a_config_that_is_no_file(model):
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert_refused(model, "not a regular file")
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert_refused(model, "is a directory")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -32},
        {"hidden_size": 2**62},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": [32]},
        {"hidden_size": 1e300},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": True},
        {"vocab_size": 0},
        {"vocab_size": 10**18},
        {"state_size": 2**40},
        {"expand": 0},
        {"expand": 10**12},
        {"conv_kernel": 10**9},
        {"time_step_rank": -5},
        {"layer_norm_epsilon": "small"},
        {"layer_norm_epsilon": -1},
        {"layer_norm_epsilon": float("inf")},
        {"hidden_act": "__import__('os').system('true')"},
        {"use_bias": "maybe"},
        {"model_type": "unheard_of"},
        {"model_type": {"a": 1}},
        {"model_type": None},
        {"model_type": "x" * 100_000},
    ],
    ids=lambda change: ", ".join(f"{name}={str(value)[:20]}" for name, value in change.items()),
)
def test_absurd_configurations(model, change):
    (model / "config.json").write_text(json.dumps({**CONFIG, **change}))
    assert_refused(model, next(iter(change)))


def test_custom_code_is_not_executed(model):
    config = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text("open('executed', 'w')")
    from_pretrained(model)
    assert not (model / "executed").exists()
    assert not os.path.exists("executed")


def header(tensors: dict, body: bytes = b"", **extra) -> bytes:
    text = json.dumps({**tensors, **extra}).encode()
    return len(text).to_bytes(8, "little") + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = f'{{"w": {json.dumps(F32)}, "w": {json.dumps(F32)}}}'.encode()
WEIGHT_FILES = {
    "empty": (b"", "is empty"),
    "header cut off": (header({"w": F32}, bytes(8))[:20], "not a sound"),
    "data cut off": (header({"w": F32}, bytes(7)), "not a sound"),
    "header of 2**63 bytes": ((2**63 - 1).to_bytes(8, "little") + b"{}", "not a sound"),
    "overlapping": (header({"w": F32, "v": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "not a sound"),
    "a hole": (header({"w": F32, "v": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "not a sound"),
    "backwards": (header({"w": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "not a sound"),
    "overflowing shape": (header({"w": {**F32, "shape": [2**40, 2**40]}}, bytes(8)), "not a sound"),
    "negative shape": (header({"w": {**F32, "shape": [-2]}}, bytes(8)), "not a sound"),
    "too many bytes for the shape": (header({"w": {**F32, "shape": [1]}}, bytes(8)), "not a sound"),
    "unknown dtype": (header({"w": {**F32, "dtype": "F13"}}, bytes(8)), "not a sound"),
    "no dtype": (header({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "not a sound"),
    "twice": (
        len(TWICE).to_bytes(8, "little") + TWICE + bytes(8), "not a sound|once"
    ),
    "integers for floats": (save({name: value.astype(np.int32) for name, value in WEIGHTS.items()}), "int32"),
    "complex for floats": (save({name: value.astype(np.complex64) for name, value in WEIGHTS.items()}), "complex64"),
    "a million layers": (
        save({**WEIGHTS, "backbone.layers.999999.norm.weight": np.ones(1, "f4")}), "layers"
    ),
    "a long name": (save({**WEIGHTS, "x" * 100_000: np.ones(1, "f4")}), "longer than 500"),
    "NaN": (save({**WEIGHTS, "backbone.norm_f.weight": WEIGHTS["backbone.norm_f.weight"] * np.nan}), "NaN or infinite"),
    "infinite": (save({**WEIGHTS, "backbone.norm_f.weight": WEIGHTS["backbone.norm_f.weight"] + np.inf}), "NaN or inf"),
    "missing tensors": (save({name: v for name, v in WEIGHTS.items() if "A_log" not in name}), "missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHT_FILES)
def test_weights(model, case):
    content, message = WEIGHT_FILES[case]
    (model / "model.safetensors").write_bytes(content)
    assert_refused(model, message)


def named(*names):
    """The model's tensors and some more, of one element each."""
    return save({**WEIGHTS, **{name: np.ones(1, "f4") for name in names}})


NAMES = {
    "thousands": (named(*(f"{i:x}.weight" for i in range(10_000))), "unexpected: 9988 more, in the attribute"),
    "thousands of layers": (
        named(*(f"backbone.layers.{i}.mixer.A_log" for i in range(2, 8000))), "layers"
    ),
    "long": (named("backbone." + "x" * 490), r"unexpected: backbone\.x{68}\.\.\.$"),
    "many long": (named(*(f"backbone.{i}." + "y" * 480 for i in range(2000))), r"y\.\.\.\n.*1988 more"),
    "control characters": (named("a\x1b[2J\nerror: fine\r\u202e"), r"unexpected: a\?\[2J\?error: fine\?\?$"),
    "like regular expressions": (named("(a+)+$", "[", "\\1", "{i}", "{rest}"), r"unexpected: \(a\+\)\+\$"),
    "like paths": (named("../../etc/passwd", "/dev/zero", "a/b"), r"unexpected: \.\./\.\./etc/passwd"),
    "like attributes": (named("backbone.__class__.__init__", "backbone.layers.-1.D"), r"unexpected: backbone\.__class"),
    "dots": (named("." * 499), r"unexpected: \.{80}$"),
    "nothing": (named(""), "unexpected: $"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names_in_a_state_dict(model, case):
    content, message = NAMES[case]
    (model / "model.safetensors").write_bytes(content)
    assert_refused(model, f"(?m){message}")


@pytest.mark.parametrize("names", [10_000, 3], ids=["many", "few"])
@pytest.mark.parametrize("width", [8, 490], ids=["short", "long"])
def test_names_of_no_format(tmp_path, names, width):
    tensors = {f"{'a.b' * (width // 3)}{i}.c": np.ones(1, "f4") for i in range(names)}
    save_file(tensors, tmp_path / "w.safetensors")
    start = time.process_time()
    with pytest.raises(UnknownFormatError, match="the names and shapes are of no known format") as caught:
        load(tmp_path / "w.safetensors")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 5000


def test_a_dtype_that_is_not_read_of_a_long_name(tmp_path):
    for dtype, message in (("F8_E8M0", "has dtype F8_E8M0"), ("F13", "not a sound")):
        content = header({"x" * 100_000: {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}, bytes(2))
        (tmp_path / f"{dtype}.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path / f"{dtype}.safetensors")
        assert len(str(caught.value)) < 1000


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["alone", "beside", "in a shard"])
def test_pickles_that_call(model, place):
    (model / "model.safetensors").unlink()
    bomb = Bomb(model.parent / "boom")
    tensors = {name: torch.from_numpy(value) for name, value in WEIGHTS.items()}
    content = {"alone": bomb, "beside": {**tensors, "bomb": bomb}, "in a shard": {"bomb": bomb}}[place]
    torch.save(content, model / "pytorch_model.bin")
    if place == "in a shard":
        (model / "pytorch_model.bin").rename(model / "part.bin")
        (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"bomb": "part.bin"}}')
    assert_refused(model, "not tensors|not a state_dict|no state_dict")


INDEXES = {
    "no weight_map": ({"metadata": {}}, "weight_map"),
    "empty": ({"weight_map": {}}, "weight_map"),
    "a list": ({"weight_map": ["a"]}, "weight_map"),
    "numbers": ({"weight_map": {"w": 3}}, "weight_map"),
    "itself": ({"weight_map": {"w": "model.safetensors.index.json"}}, "neither a safetensors|not a sound"),
    "the configuration": ({"weight_map": {"w": "config.json"}}, "neither a safetensors"),
    "absent": ({"weight_map": {"w": "absent.safetensors"}}, "not there"),
    "too many files": ({"weight_map": {str(i): f"{i}.safetensors" for i in range(1000)}}, "at most 512"),
    "escape": ({"weight_map": {"w": "../../../../etc/passwd"}}, "not a plain file name"),
    "device": ({"weight_map": {"w": "/dev/zero"}}, "not a plain file name"),
    "control characters": ({"weight_map": {"w": "a\x1b[2J"}}, "not a plain file name"),
    "a long name": ({"weight_map": {"w": "x" * 100_000}}, "not a plain file name"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(model, case):
    content, message = INDEXES[case]
    (model / "model.safetensors").rename(model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    assert_refused(model, message)


def test_an_index_with_names_given_twice(model):
    (model / "model.safetensors").rename(model / "part.safetensors")
    text = '{"weight_map": {"w": "part.safetensors", "w": "other.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(text)
    assert_refused(model, "more than once", CorruptCheckpointError)


def test_empty_folders_and_pipes_in_place_of_weights(model):
    (model / "model.safetensors").unlink()
    assert_refused(model, "has no weights")
    os.mkfifo(model / "model.safetensors")
    assert_refused(model, "not a regular file")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    assert_refused(model, "cannot be opened")


@given(content=st.binary(max_size=80))
@example(content=b'{"model_type": "mamba"}')
@PROFILE
def test_any_bytes_as_configuration(tmp_path, content):
    (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_bytes(content)
    try:
        config = read_json(tmp_path / "config.json", 1000)
    except CheckpointError as err:
        assert "config.json" in str(err)  # noqa: PT017
    else:
        assert isinstance(config, dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON, name=st.sampled_from(sorted(CONFIG)))
@PROFILE
def test_any_value_in_the_configuration(tmp_path, value, name):
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    try:
        from_pretrained(folder)
    except CheckpointError as err:
        assert "model" in str(err)  # noqa: PT017


@given(names=st.dictionaries(st.sampled_from(["w", "v", "a.b"]), JSON | st.sampled_from(["a.safetensors", "b"])))
@PROFILE
def test_any_index(tmp_path, names):
    if not (tmp_path / "a.safetensors").exists():
        save_file({"w": np.ones(2, "f4"), "v": np.ones(1, "f4")}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    try:
        tensors = open_folder(tmp_path).tensors
    except CheckpointError as err:
        assert str(tmp_path) in str(err)  # noqa: PT017
    else:
        assert set(tensors) == {"w", "v"}
