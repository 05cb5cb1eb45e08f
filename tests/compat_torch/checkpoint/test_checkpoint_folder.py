"""Folders of weights: single files, shards and their index, the hub's cache, what is never opened."""

import json
import logging
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from compat_torch.checkpoint.folder import open_folder
from compat_torch.checkpoint.hub import fetch
from compat_torch.errors import CheckpointError, CorruptCheckpointError

RNG = np.random.default_rng()
WEIGHTS = {f"layers.{i}.weight": RNG.standard_normal((3, 2), np.float32) for i in range(3)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_shards(folder, count=2, kind="safetensors", **index):
    """The weights over `count` files, with an index; `index` replaces parts of its weight_map."""
    folder.mkdir(exist_ok=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    shards = [f"{stem}-{i + 1:05}-of-{count:05}.{kind}" for i in range(count)]
    places = {name: shards[i % count] for i, name in enumerate(WEIGHTS)}
    for shard in shards:
        part = {name: WEIGHTS[name] for name, place in places.items() if place == shard}
        if kind == "bin":
            torch.save({name: torch.from_numpy(value) for name, value in part.items()}, folder / shard)
        else:
            save_file(part, folder / shard)
    index = {"metadata": {"total_size": 72}, "weight_map": {**places, **index}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def assert_weights(tensors):
    assert list(tensors) == list(WEIGHTS)
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_shards(tmp_path, kind, count):
    folder = open_folder(write_shards(tmp_path / "m", count, kind))
    assert_weights(folder.tensors)
    assert len(folder.weights) == count
    assert folder.index is not None
    assert folder.config is None
    assert all(not value.flags.owndata and not value.flags.writeable for value in folder.tensors.values())


def test_single_files_and_which_is_preferred(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"d_model": 2}')
    assert open_folder(tmp_path).tensors["w"][0] == 0
    save_file({"w": np.ones(1, "f4")}, tmp_path / "model.safetensors")
    folder = open_folder(str(tmp_path))
    assert folder.tensors["w"][0] == 1
    assert folder.weights == [tmp_path / "model.safetensors"]
    assert folder.config == {"d_model": 2}
    assert folder.revision is None


def test_params_json_and_a_file_of_another_name(tmp_path):
    save_file({"model.w": np.ones(1, "f4")}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text('{"dim": 2, "limit": [0.0, Infinity]}')
    folder = open_folder(tmp_path)
    assert list(folder.tensors) == ["model.w"]
    assert folder.config == {"dim": 2, "limit": [0.0, float("inf")]}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_the_state_of_a_trainer_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        torch.save(Bomb(), tmp_path / name)
        (tmp_path / name).chmod(0)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1])
    assert_weights(open_folder(tmp_path).tensors)
    os.rename("model.safetensors", "last.ckpt")
    assert_weights(open_folder(tmp_path).tensors)
    os.remove("last.ckpt")
    with pytest.raises(CheckpointError, match=r"has no weights.*training_args\.bin"):
        open_folder(tmp_path)
    assert not os.path.exists("boom")
    assert not any("training_args" in path or "optimizer" in path for path in opened)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_refused_by_name(tmp_path, name):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*merge"):
        open_folder(tmp_path)


def test_nothing_to_open(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="it holds: nothing"):
        open_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"is a file, expected a folder"):
        open_folder(tmp_path / "notes.txt")
    write_shards(tmp_path / "checkpoint-500")
    with pytest.raises(CheckpointError, match=r"notes\.txt; there are weights in its sub-folders checkpoint-500"):
        open_folder(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files of weights: a\.pt, b\.pt"):
        open_folder(tmp_path)


def test_custom_code_is_noted_and_not_executed(tmp_path, caplog):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "wicked.Model"}}')
    (tmp_path / "wicked.py").write_text("raise SystemExit('executed')")
    caplog.set_level(logging.WARNING, "compat_torch")
    assert open_folder(tmp_path).custom_code == ("wicked.Model",)
    assert "custom code, which is not executed: wicked.Model" in caplog.text
    assert "wicked" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.weight": "model-00002-of-00002.safetensors"}, "layers.0.weight is in model-00001.*index says"),
        ({"extra": "model-00001-of-00002.safetensors"}, "extra is in the index, but not in model-00001"),
        ({"layers.0.weight": "gone.safetensors", "x": "away.bin"}, "not there, download them: away.bin, gone"),
    ],
)
def test_shards_that_contradict_the_index(tmp_path, change, message):
    folder = write_shards(tmp_path / "m", **change)
    with pytest.raises(CheckpointError, match=message):
        open_folder(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_shards(tmp_path / "m")
    save_file({**WEIGHTS}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CorruptCheckpointError, match=r"layers\.0\.weight is in model-00002.*the index says model-00001"
    ):
        open_folder(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["layers.2.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpointError, match=r"layers\.2\.weight is in .*but not in the index"):
        open_folder(folder)


ESCAPES = ["../w.safetensors", "/etc/passwd", "sub/w.safetensors", "..", ".", "", "w\0.safetensors", "..\\w", "link"]


@pytest.mark.parametrize("place", ESCAPES)
def test_shards_stay_inside_the_folder(tmp_path, place):
    folder = write_shards(tmp_path / "m", **{"layers.0.weight": place})
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    (folder / "sub").mkdir()
    save_file(WEIGHTS, folder / "sub" / "w.safetensors")
    (folder / "link").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder" if place == "link" else "not a plain file name"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_leave_the_folder(tmp_path, name):
    inner = tmp_path / "m"
    inner.mkdir()
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    save_file(WEIGHTS, inner / "model.safetensors")
    (inner / name).unlink(missing_ok=True)
    (inner / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_folder(inner)
    (tmp_path / "alias").symlink_to(tmp_path / "n")
    save_dir = tmp_path / "n"
    save_dir.mkdir()
    save_file(WEIGHTS, save_dir / "real.safetensors")
    (save_dir / "model.safetensors").symlink_to("real.safetensors")
    assert_weights(open_folder(tmp_path / "alias").tensors)


def hub_cache(root, files, shared=()):
    """The layout of huggingface_hub: snapshots of links to blobs, of which those in `shared` link to a common store."""
    repository = root / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, (name, write) in enumerate(files.items()):
        blob = repository / "blobs" / f"{number:040x}"
        if name in shared:
            store = root / "blobs" / "ab"
            store.mkdir(parents=True, exist_ok=True)
            write(store / f"ab{number}")
            blob.symlink_to(f"../../blobs/ab/ab{number}")
        else:
            write(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


TINY = {
    "model.safetensors": lambda path: save_file(WEIGHTS, path),
    "config.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("shared", [(), ("model.safetensors",)])
def test_the_links_of_the_hubs_cache_work(tmp_path, shared):
    folder = open_folder(hub_cache(tmp_path, TINY, shared))
    assert_weights(folder.tensors)
    assert folder.revision == COMMIT
    (tmp_path / "secret").write_text("{}")
    (folder.path / "config.json").unlink()
    (folder.path / "config.json").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_folder(folder.path)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_fetch_takes_what_the_cache_has(offline):
    snapshot = hub_cache(offline, TINY)
    for revision in (None, "main", COMMIT):
        assert fetch("someone/tiny", revision) == snapshot
    assert_weights(open_folder(fetch("someone/tiny")).tensors)


def test_fetch_takes_bin_files_where_there_is_nothing_better(offline):
    files = {"pytorch_model.bin": lambda path: torch.save({"w": torch.ones(1)}, path)}
    hub_cache(offline, files)
    assert list(open_folder(fetch("someone/tiny")).tensors) == ["w"]


@pytest.mark.parametrize(
    ("repository", "revision"), [("someone/absent", None), ("someone/tiny", "v9"), ("../etc", None), ("a/b/c", None)]
)
def test_fetch_says_what_it_could_not_get(offline, repository, revision):
    hub_cache(offline, TINY)
    with pytest.raises(CheckpointError, match=repository.replace(".", r"\.")) as caught:
        fetch(repository, revision)
    assert "\n" not in str(caught.value)


def test_fetch_of_a_repository_without_weights(offline):
    hub_cache(offline, {"config.json": TINY["config.json"]})
    with pytest.raises(CheckpointError, match="no weights on the hub"):
        fetch("someone/tiny")


def test_fetch_asks_for_weights_configuration_and_licence_only(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    repository = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json",
        "consolidated.safetensors", "tokenizer.json", "LICENSE", "README.md", "modeling_x.py", "optimizer.pt",
        "training_args.bin", "onnx/model.onnx", "sub/model.safetensors", "flax_model.msgpack",
    ]  # fmt: skip

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        for name in repository:
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (tmp_path / name).write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetch("someone/tiny")
    assert {file.name for file in tmp_path.iterdir()} == {
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "LICENSE",
        "README.md",
    }  # fmt: skip


def test_fetch_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'spyx-torch\[hub\]'"):
        fetch("someone/tiny")
