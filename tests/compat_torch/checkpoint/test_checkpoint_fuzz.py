"""Whatever bytes come, the reader answers with a state_dict or a CheckpointError."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from compat_torch.checkpoint import read_state_dict
from compat_torch.errors import CheckpointError

PROFILE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4)


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    weights = {"A": torch.ones(3, 2), "B": torch.ones(3, 4), "p": torch.nn.Parameter(torch.ones(2))}
    torch.save({"state_dict": weights, "epoch": 3, "size": torch.Size([1])}, buffer, **options)
    return buffer.getvalue()


FILES = {
    "zip": saved(),
    "legacy": saved(_use_new_zipfile_serialization=False),
    "safetensors": save({"A": np.ones((3, 2), "f4"), "B": np.ones((3, 4), "f4")}),
}


def read(path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        tensors = read_state_dict(path)
    except CheckpointError as err:
        assert str(path) in str(err)  # noqa: PT017
    else:
        assert all(isinstance(value.sum(), np.generic) for value in tensors.values())


def edited(data: bytes, edits) -> bytes:
    result = bytearray(data)
    for position, value in edits:
        result[position % len(result)] = value
    return bytes(result)


@pytest.mark.parametrize("kind", FILES)
def test_truncated(tmp_path, kind):
    data = FILES[kind]
    for size in sorted({*range(0, len(data), 13), *range(0, 24), len(data) - 1}):
        (tmp_path / "w.pt").unlink(missing_ok=True)
        (tmp_path / "w.pt").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"w\.pt"):
            read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("kind", FILES)
@given(edits=EDITS)
@PROFILE
def test_changed_bytes(tmp_path, kind, edits):
    read(tmp_path / "w.pt", edited(FILES[kind], edits))


@given(edits=EDITS)
@example(edits=[(0, 0x2E)])
@PROFILE
def test_changed_pickle_with_a_right_checksum(tmp_path, edits):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["zip"])) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, edited(data, edits) if name.endswith("data.pkl") else data)
    read(tmp_path / "w.pt", buffer.getvalue())


@given(data=st.binary(max_size=64))
@PROFILE
def test_arbitrary_pickles(tmp_path, data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + data + b".")
    read(tmp_path / "w.pt", buffer.getvalue())


@given(header=st.binary(max_size=64))
@PROFILE
def test_arbitrary_safetensors_headers(tmp_path, header):
    header = b"{" + header
    read(tmp_path / "w.safetensors", len(header).to_bytes(8, "little") + header)
