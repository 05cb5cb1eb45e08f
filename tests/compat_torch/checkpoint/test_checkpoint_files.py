"""Kinds of files, told by content; safetensors."""

import json
import os
import pickle
import tarfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from compat_torch.checkpoint import read_state_dict
from compat_torch.errors import CheckpointError, CorruptCheckpointError


def write(path, header: dict | str, body: bytes = b""):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_the_extension_does_not_matter(tmp_path):
    save_file({"w": np.ones(2, "f4")}, tmp_path / "w.ckpt")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    for name in ("w.ckpt", "w.safetensors"):
        np.testing.assert_array_equal(read_state_dict(tmp_path / name)["w"], np.ones(2, "f4"))
        np.testing.assert_array_equal(read_state_dict(str(tmp_path / name))["w"], np.ones(2, "f4"))


def test_safetensors_are_views_of_the_file_in_every_dtype(tmp_path):
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    saved = {str(dtype): torch.tensor([[0, 1, 2]]).to(dtype) for dtype in dtypes}
    saved |= {"c64": torch.tensor([1 + 2j], dtype=torch.complex64), "empty": torch.empty(0, 3)}
    saved |= {"scalar": torch.tensor(2.0)}
    save_torch(saved, tmp_path / "w.safetensors", metadata={"format": "pt"})
    tensors = read_state_dict(tmp_path / "w.safetensors")
    assert tensors.keys() == saved.keys()
    for name, value in saved.items():
        array = tensors[name]
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.shape == tuple(value.shape)
        assert array.dtype.name == str(value.dtype).removeprefix("torch.")
        expected = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        np.testing.assert_array_equal(array.astype(expected.dtype), expected)
    assert tensors["torch.bfloat16"].dtype == ml_dtypes.bfloat16


def test_damaged_safetensors(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    cases = {
        "not fully covered": write(tmp_path / "a", {"w": entry}, bytes(7)),
        "sound": write(tmp_path / "b", {"w": {**entry, "shape": [3]}}, bytes(8)),
        "overflow|sound": write(tmp_path / "c", {"w": {**entry, "shape": [2**63, 2]}}, bytes(8)),
        "more than once": write(
            tmp_path / "d", '{"w": ENTRY, "w": ENTRY}'.replace("ENTRY", json.dumps(entry)), bytes(8)
        ),
        "not a sound": write(tmp_path / "e", "{" * 40),
    }
    for message, path in cases.items():
        with pytest.raises(CorruptCheckpointError, match=message) as caught:
            read_state_dict(path)
        assert str(path) in str(caught.value)


def test_safetensors_dtype_without_a_counterpart(tmp_path):
    path = write(tmp_path / "w", {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1))
    with pytest.raises(CheckpointError, match="F4"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is no checkpoint", "neither a safetensors nor a torch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "truncated or damaged"),
    ],
)
def test_not_a_checkpoint(tmp_path, content, message):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_state_dict(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_state_dict(tmp_path / "pipe")


def test_old_and_foreign_pickles_are_refused_by_name(tmp_path):
    with tarfile.open(tmp_path / "w.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        (tmp_path / "storages").write_bytes(b"0")
        tar.add(tmp_path / "storages", "storages")
    with pytest.raises(CheckpointError, match="tar file"):
        read_state_dict(tmp_path / "w.tar")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match="plain Python pickle"):
        read_state_dict(tmp_path / "w.pkl")
