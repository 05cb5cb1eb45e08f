"""Writing: what comes back, all or nothing, bounded memory, what goes beside the weights."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from compat_torch import arrays
from compat_torch.checkpoint import read_state_dict
from compat_torch.checkpoint.folder import open_folder
from compat_torch.checkpoint.writing import write_file, write_folder, write_orbax
from compat_torch.errors import CheckpointError

RNG = np.random.default_rng()


def random(*shape, dtype="f4"):
    return (10 * RNG.standard_normal(shape)).astype(dtype)


def every_kind():
    return {
        "plain": random(5, 3),
        "transposed": random(131, 67).T,
        "conv": random(4, 1, 7).transpose(2, 1, 0),
        "reversed": random(6)[::-1],
        "scalar": random(),
        "empty": random(0, 3),
        "bf16": random(3, dtype=ml_dtypes.bfloat16),
        "c64": random(2, 2).astype("c8"),
        "i64": np.array([-1, 2**40]),
        "bool": np.array([True, False, True]),
        "f64": random(2, dtype="f8"),
        "jax": jnp.asarray(random(3, 2)).T,
    }


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tolist()


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert (tensors[name].shape, tensors[name].dtype) == (value.shape, value.dtype), name
        assert bits(tensors[name]) == bits(value), name


def listing(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("pairs", [False, True], ids=["mapping", "iterator"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, filename, pairs):
    tensors = every_kind()
    given = iter(tensors.items()) if pairs else tensors
    assert write_folder(tmp_path / "a" / "m", given, {"d": 2}, filename=filename) == tmp_path / "a" / "m"
    folder = open_folder(tmp_path / "a" / "m")
    assert_same(folder.tensors, tensors)
    assert folder.config == {"d": 2}
    assert listing(tmp_path / "a") == ["m"]
    assert listing(folder.path) == sorted([filename, "config.json", "provenance.json"])


def test_the_safetensors_library_reads_it(tmp_path):
    tensors = every_kind()
    write_file(tmp_path / "w.safetensors", tensors)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name in file.keys():  # noqa: SIM118
            assert tuple(file.get_tensor(name).shape) == tensors[name].shape
        np.testing.assert_array_equal(file.get_tensor("transposed").numpy(), tensors["transposed"])
    header = int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_torch_reads_it_and_ties_stay_tied(tmp_path):
    weight = random(3, 2)
    write_file(tmp_path / "w.bin", {"a": weight.T, "b": weight.T, "c": weight.T.copy(), "half": every_kind()["bf16"]})
    loaded = torch.load(tmp_path / "w.bin", weights_only=True)
    np.testing.assert_array_equal(loaded["a"].numpy(), weight.T)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    assert loaded["a"].is_contiguous()
    assert loaded["half"].dtype == torch.bfloat16
    with zipfile.ZipFile(tmp_path / "w.bin") as archive:
        assert archive.testzip() is None
    mapped = torch.load(tmp_path / "w.bin", weights_only=True, mmap=True)
    assert all(value.data_ptr() % 64 == 0 for value in mapped.values())


def test_torch_reads_every_kind(tmp_path):
    tensors = every_kind()
    write_file(tmp_path / "w.pt", tensors)
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(loaded) == list(tensors)
    for name, value in loaded.items():
        expected = np.asarray(tensors[name])
        assert value.is_contiguous()
        assert tuple(value.shape) == expected.shape
        assert str(value.dtype).removeprefix("torch.") == expected.dtype.name
        np.testing.assert_array_equal(value.to(torch.complex128).numpy(), expected.astype("c16"))


def test_orbax(tmp_path):
    import orbax.checkpoint as ocp

    tree = {"layer": {"kernel": jnp.asarray(random(3, 2)), "steps": jnp.arange(3)}}
    write_orbax(tmp_path / "m", tree, {"d": 1}, provenance={"format": "orbax"})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "m" / "state", tree)
    np.testing.assert_array_equal(restored["layer"]["kernel"], tree["layer"]["kernel"])
    assert json.loads((tmp_path / "m" / "provenance.json").read_text())["format"] == "orbax"
    with pytest.raises(FileExistsError):
        write_orbax(tmp_path / "m", tree, None)


def failing():
    yield "a", random(3)
    raise RuntimeError("in the middle")


class Fails:
    """An array that cannot be had."""

    shape, dtype, nbytes = (3,), np.dtype("f4"), 12

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("tensors", [failing, lambda: {"a": random(3), "b": Fails()}], ids=["iterator", "array"])
@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_nothing_is_left_when_it_fails(tmp_path, tensors, filename):
    with pytest.raises(RuntimeError, match="in the middle"):
        write_folder(tmp_path / "m", tensors(), {}, filename=filename)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_file(tmp_path / filename, tensors())
    assert listing(tmp_path) == []


def test_the_old_folder_stays_when_overwriting_fails(tmp_path):
    write_folder(tmp_path / "m", {"w": np.ones(2, "f4")}, None)
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "m", {"w": Fails()}, None, overwrite=True)
    assert listing(tmp_path) == ["m"]
    assert_same(open_folder(tmp_path / "m").tensors, {"w": np.ones(2, "f4")})


KILLED = """
import sys, time
import numpy as np
from compat_torch.checkpoint.writing import write_folder

class Slow:
    shape, dtype = (3,), np.dtype("f4")
    def __array__(self, dtype=None, copy=None):
        print("writing", flush=True)
        time.sleep(60)

write_folder(sys.argv[1], {"a": np.ones(1 << 18), "b": Slow()}, {})
"""


def test_a_killed_process_leaves_no_output(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as output:
        assert output.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    assert not (tmp_path / "m").exists()
    assert all(name.startswith(".m.") and ".partial" in name for name in listing(tmp_path))
    write_folder(tmp_path / "m", {"w": np.ones(2, "f4")}, None)
    assert_same(open_folder(tmp_path / "m").tensors, {"w": np.ones(2, "f4")})


def test_what_is_not_overwritten(tmp_path):
    tensors = {"w": random(2)}
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", tensors, None)
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(tmp_path / "empty", {"w": random(3)}, None)
    assert_same(open_folder(tmp_path / "empty").tensors, tensors)
    write_folder(tmp_path / "empty", {"v": random(3)}, None, overwrite=True, filename="pytorch_model.bin")
    assert listing(tmp_path / "empty") == ["provenance.json", "pytorch_model.bin"]
    assert listing(tmp_path) == ["empty"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no provenance\.json"):
        write_folder(tmp_path / "thesis", tensors, None, overwrite=True)
    with pytest.raises(FileExistsError, match="not a folder"):
        write_folder(tmp_path / "thesis" / "chapter.tex", tensors, None, overwrite=True)
    assert listing(tmp_path / "thesis") == ["chapter.tex"]

    for source in (tmp_path / "empty", tmp_path / "empty" / "pytorch_model.bin"):
        with pytest.raises(FileExistsError, match="holds the source"):
            write_folder(tmp_path / "empty", tensors, None, overwrite=True, source=source)
    write_file(tmp_path / "w.safetensors", tensors)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "w.safetensors", tensors)
    write_file(tmp_path / "w.safetensors", {"w": random(9)}, overwrite=True)


@pytest.mark.parametrize(
    ("tensors", "filename", "error", "message"),
    [
        ({"w": np.ones(1)}, "model.gguf", ValueError, "ending in .safetensors"),
        ({"w": np.ones(1)}, "sub/model.safetensors", ValueError, "without folders"),
        ([("w", np.ones(1)), ("w", np.ones(1))], "model.safetensors", ValueError, r"given twice: \['w'\]"),
        ({}, "model.safetensors", ValueError, "at least one"),
        ({"w": np.ones(1, "c16")}, "model.safetensors", TypeError, "'w' has dtype complex128"),
        ({"w": np.array(["text"])}, "model.safetensors", TypeError, "'w' has dtype <U4"),
        ({"w": np.ones(1, "u4")}, "pytorch_model.bin", TypeError, "'w' has dtype uint32"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, filename, error, message):
    with pytest.raises(error, match=message):
        write_folder(tmp_path / "m", tensors, None, filename=filename)
    assert listing(tmp_path) == []


def test_what_goes_beside_the_weights(tmp_path):
    source = tmp_path / "source"
    write_folder(source, {"w": random(2)}, {"d": 1})
    beside = ["LICENSE.txt", "README.md", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"]
    for name in [*beside, "modeling.py", "training_args.bin", "optimizer.pt", ".env"]:
        (source / name).write_text(name)
    os.mkfifo(source / "README.pipe")
    write_folder(tmp_path / "m", {"w": random(2)}, {}, source=source, provenance={"format": {"from": "a", "to": "b"}})
    assert listing(tmp_path / "m") == sorted([*beside, "config.json", "model.safetensors", "provenance.json"])
    assert (tmp_path / "m" / "README.md").read_text() == "README.md"

    record = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert record["format"] == {"from": "a", "to": "b"}
    assert record["copied"] == beside
    assert record["versions"]["jax"] == sys.modules["jax"].__version__
    for name in ("model.safetensors", "config.json"):
        data = (source / name).read_bytes()
        assert record["source"]["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_readme_that_links_out_of_the_source_is_not_copied(tmp_path):
    source = tmp_path / "source"
    write_folder(source, {"w": random(2)}, None)
    (tmp_path / "secret").write_text("secret")
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        write_folder(tmp_path / "m", {"w": random(2)}, None, source=source)
    (source / "README.md").unlink()
    with open(source / "README.md", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="at most"):
        write_folder(tmp_path / "m", {"w": random(2)}, None, source=source)
    assert listing(tmp_path) == ["secret", "source"]


def test_the_revision_of_a_snapshot_is_recorded(tmp_path):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "c0ffee"
    write_folder(snapshot, {"w": random(2)}, None)
    write_folder(tmp_path / "m", {"w": random(2)}, None, source=snapshot)
    source = json.loads((tmp_path / "m" / "provenance.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("someone/tiny", "c0ffee")


def test_progress_in_bytes(tmp_path):
    calls = []
    tensors = {"a": np.zeros(5 << 20, "f4"), "b": random(3)}
    write_folder(tmp_path / "m", tensors, None, progress=lambda done, total: calls.append((done, total)))
    total = (20 << 20) + 12
    expected = [*range(arrays.PIECE, 20 << 20, arrays.PIECE), 20 << 20, total]
    assert calls == [(done, total) for done in expected]


class Lazy(dict):
    """A mapping that makes its arrays, and counts those that are alive."""

    def __init__(self, names):
        super().__init__(dict.fromkeys(names))
        self.alive = self.most = 0

    def __getitem__(self, name):
        array = np.full((64, 64), float(name))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._gone)
        return array

    def _gone(self):
        self.alive -= 1


def test_two_tensors_at_a_time_are_in_memory(tmp_path):
    lazy = Lazy("123456")
    write_file(tmp_path / "w.safetensors", lazy)
    assert 1 <= lazy.most <= 3
    assert read_state_dict(tmp_path / "w.safetensors")["5"][0, 0] == 5


@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (0, 4), (300, 257), (65, 1), (1, 65), (5, 1, 9), (3, 4, 5), (2600, 811)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "?", ml_dtypes.bfloat16])
def test_copies_of_any_strides(shape, dtype):
    import jax

    base = random(*shape, dtype=dtype)
    views = {"plain": base, "transposed": base.T}
    if base.ndim:
        views |= {"steps": base[::-1], "slice": base[..., ::3]}
    with jax.enable_x64(True):
        for name, view in views.items():
            copy = arrays.to_device(view)
            assert (copy.shape, copy.dtype) == (view.shape, view.dtype)
            np.testing.assert_array_equal(copy, view, name)
            np.testing.assert_array_equal(arrays.contiguous(view), view, name)
            assert arrays.contiguous(view).flags.c_contiguous


def test_copies_are_copies_and_cast():
    source = random(64, 64)
    copy = arrays.to_device(source)
    before = source.copy()
    source[:] = 0
    np.testing.assert_array_equal(copy, before)
    np.testing.assert_array_equal(arrays.to_device(before.T, jnp.bfloat16), before.T.astype(ml_dtypes.bfloat16))


def test_views_in_place_of_copies():
    source = random(64, 48)

    def interrupted():
        with arrays.as_views():
            raise RuntimeError

    with arrays.as_views():
        assert np.shares_memory(arrays.to_device(source.T), source)
        assert np.shares_memory(arrays.to_device(source.T, jnp.float32), source)
        cast = arrays.to_device(source.T, jnp.bfloat16)
        np.testing.assert_array_equal(cast, source.T.astype(ml_dtypes.bfloat16))
        with ThreadPoolExecutor(1) as pool:
            assert not np.shares_memory(np.asarray(pool.submit(arrays.to_device, source).result()), source)
    with pytest.raises(RuntimeError):
        interrupted()
    assert not np.shares_memory(np.asarray(arrays.to_device(source)), source)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_counting_what_is_not_finite(dtype):
    values = np.array([1, np.nan, 3, -2, np.nan]).astype(dtype)
    assert arrays.count_nonfinite(values) == 2
    assert arrays.count_nonfinite(values[[0, 2, 3]]) == 0
    assert arrays.count_nonfinite(values[:0]) == 0
    if dtype is not ml_dtypes.float8_e4m3fn:
        assert arrays.count_nonfinite(np.array([1, np.inf, -np.inf]).astype(dtype)) == 2
    assert arrays.count_nonfinite(np.array([1, 2])) == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_pattern_of_16_bits(dtype):
    values = np.arange(1 << 16).astype(np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values.astype(np.float32))
    assert arrays.count_nonfinite(values[finite]) == 0
    assert arrays.count_nonfinite(values) == np.sum(~finite)
    for value in values[~finite]:
        assert arrays.count_nonfinite(np.array([1, value, -1], dtype)) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts resident pages as Linux does")
def test_pages_of_a_mapped_file_are_given_back(tmp_path):
    write_file(tmp_path / "w.safetensors", {"a": np.ones(4 << 20, "f4"), "b": random(3)})
    tensors = open_folder(tmp_path).tensors

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    before = resident()
    assert tensors["a"].sum() == 4 << 20
    assert resident() - before > 12 << 20
    arrays.release(tensors["a"])
    assert resident() - before < 4 << 20
    assert tensors["a"].sum() == 4 << 20


def test_what_is_not_in_a_file_stays(tmp_path):
    np.ones(1 << 18).tofile(tmp_path / "w")
    changed = np.memmap(tmp_path / "w", mode="c")
    changed[:] = 7
    for array in (np.ones(3), arrays.contiguous(np.full((600, 700), 7.0).T), changed):
        before = array.copy()
        arrays.release(array)
        np.testing.assert_array_equal(array, before)
