"""The restricted reader gives what torch.load gives, without torch."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from compat_torch.checkpoint.source import kind_of, open_source
from compat_torch.checkpoint.torch_legacy import read_torch_legacy
from compat_torch.checkpoint.torch_zip import TorchContents, read_torch_zip
from compat_torch.errors import CheckpointError, CorruptCheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
WRITERS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 5": {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
}


def read(path) -> TorchContents:
    source = open_source(path)
    return {"torch zip": read_torch_zip, "torch legacy": read_torch_legacy}[kind_of(source)](source)


def assert_same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().resolve_conj().resolve_neg()
        assert str(theirs.dtype).removeprefix("torch.") == ours.dtype.name
        if theirs.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            ours, theirs = ours.astype(np.float32), theirs.float()
        np.testing.assert_array_equal(ours, theirs.numpy())
        assert ours.shape == tuple(theirs.shape)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    else:
        assert ours == theirs
        assert type(ours) in (type(theirs), tuple)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype, writer):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    torch.save({"w": values}, tmp_path / "w.pt", **WRITERS[writer])
    contents = read(tmp_path / "w.pt")
    assert_same(contents.content, {"w": values})
    assert contents.replaced == ()


@pytest.mark.parametrize("writer", WRITERS)
def test_views_share_storages_and_keep_their_strides(tmp_path, writer):
    base = torch.arange(24.0).reshape(2, 3, 4)
    saved = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1, 1:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
    }
    torch.save(saved, tmp_path / "w.pt", **WRITERS[writer])
    content = read(tmp_path / "w.pt").content
    assert_same(content, saved)
    assert np.shares_memory(content["base"], content["transposed"])
    assert not content["base"].flags.writeable


def test_every_way_torch_pickles_a_tensor(tmp_path):
    with_attribute = torch.ones(2)
    with_attribute.note = "kept out"  # pyright: ignore[reportAttributeAccessIssue]
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "kept out"  # pyright: ignore[reportAttributeAccessIssue]
    saved = {
        "conj": torch.tensor([1 + 2j, 3j]).conj(),
        "neg": torch.tensor([1 + 2j, 3j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "buffer": torch.nn.Buffer(torch.zeros(2)),
        "with_attribute": with_attribute,
        "parameter_with_attribute": parameter,
        "uint16": torch.ones(3, dtype=torch.uint16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    torch.save(saved, tmp_path / "w.pt")
    assert_same(read(tmp_path / "w.pt").content, saved)


@pytest.mark.parametrize("writer", WRITERS)
def test_plain_objects(tmp_path, writer):
    saved = {
        "epoch": 3,
        "acc": 0.5,
        "big": 2**70,
        "flags": [True, False, None],
        "name": "lrü",
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "complex": 1 + 2j,
        "size": torch.Size([2, 3]),
        ("a", 1): (1, (2,)),
    }
    torch.save(saved, tmp_path / "w.pt", **WRITERS[writer])
    assert_same(read(tmp_path / "w.pt").content, saved)
    torch.save({"d": torch.float32, "b": torch.bfloat16, "dev": torch.device("cuda", 1)}, tmp_path / "v.pt")
    assert read(tmp_path / "v.pt").content == {
        "d": np.dtype("float32"),
        "b": np.dtype(ml_dtypes.bfloat16),
        "dev": "cuda:1",
    }


def test_module_state_dict(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save(state, tmp_path / "w.pt")
    contents = read(tmp_path / "w.pt")
    assert_same(contents.content, dict(state))
    assert contents.replaced == ()


def test_checksums_are_checked_where_there_are_any(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.full((4,), 7.0)}, path)
    damaged = path.read_bytes().replace(np.full(4, 7.0, "f4").tobytes(), np.full(4, 8.0, "f4").tobytes())
    path.write_bytes(damaged)
    with pytest.raises(CorruptCheckpointError, match=r"w\.pt.*'data/0' is damaged"):
        read(path)

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(4)}, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read(tmp_path / "without.pt").content, {"w": torch.ones(4)})


def rezip(source, target, change=lambda name, data: data, **options):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_recompressed_archive(tmp_path):
    values = torch.arange(100.0)
    torch.save({"w": values}, tmp_path / "w.pt")
    again = rezip(tmp_path / "w.pt", tmp_path / "c.pt", compression=zipfile.ZIP_DEFLATED)
    assert_same(read(again).content, {"w": values})


def test_archives_that_are_refused_by_name(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    big = rezip(tmp_path / "w.pt", tmp_path / "b.pt", lambda n, d: b"big" if n.endswith("byteorder") else d)
    with pytest.raises(CheckpointError, match="big-endian"):
        read(big)
    np.savez(tmp_path / "w.npz", w=np.ones(2))
    with pytest.raises(CheckpointError, match=r"w\.npz.*data\.pkl"):
        read(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read(tmp_path / "w.pt")
