"""Nothing in a pickle is imported, called or allocated on its word."""

import copyreg
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from compat_torch.checkpoint import load, read_state_dict
from compat_torch.checkpoint.records import Record, as_plain
from compat_torch.checkpoint.source import open_source
from compat_torch.checkpoint.torch_zip import read_torch_zip
from compat_torch.errors import CheckpointError, CorruptCheckpointError

FLOATS = b"ctorch\nFloatStorage\n"
ONES = np.ones(4, "f4").tobytes()


def archive(path, data_pickle: bytes, storages=(ONES,), **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data_pickle)
        for index, storage in enumerate(storages):
            file.writestr(f"archive/data/{index}", storage)
    return path


def assert_refused(path, match, error: type[CheckpointError] = CorruptCheckpointError):
    """In under a second of this process's time, and within 64 MB and four times the file."""
    start = time.process_time()
    with pytest.raises(error, match=match) as caught:
        read_state_dict(path)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < (64 << 20) + 4 * path.stat().st_size
    finally:
        tracemalloc.stop()


def content_of(path):
    return read_torch_zip(open_source(path)).content


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return f"I{value}\n".encode()


def storage(count=4, key="0", kind=FLOATS) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + integer(count) + b"tQ"


def numbers(*values) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def tensor(size=(4,), stride=(1,), offset=0, source=None) -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n("
    fields = (source or storage()) + integer(offset) + numbers(*size) + numbers(*stride) + b"\x89N"
    return head + fields + b"tR"


def state(value: bytes) -> bytes:
    return b"}" + text("w") + value + b"s."


class Call:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(command: str) -> dict[str, bytes]:
    quoted = f"S'{command}'\n".encode()
    python = f"__import__('os').system({command!r})"
    getattr_system = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR"
    return {
        "reduce": pickle.dumps(Call(os.system, command), protocol=2),
        "stack global": pickle.dumps(Call(os.system, command), protocol=4),
        "eval": pickle.dumps(Call(eval, python), protocol=2),
        "exec": pickle.dumps(Call(exec, python), protocol=5),
        "nested getattr": getattr_system + b"(" + quoted + b"tR.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + quoted + b"tR.",
        "inst": b"(" + quoted + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + quoted + b"o.",
        "newobj": b"csubprocess\nPopen\n(" + quoted + b"t\x81.",
        "extension": b"\x82\xf0(" + quoted + b"tR.",
        "extension 4": b"\x84\xf0\x00\x00\x00(" + quoted + b"tR.",
        "setstate by build": b"cargparse\nNamespace\n)\x81}(S'__setstate__'\ncos\nsystem\nub" + quoted + b"b.",
        "setstate by setitem": b"ccollections\nOrderedDict\n)R(S'__setstate__'\ncos\nsystem\nu.",
        "default factory": b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
        "rebuild of a subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n("
        + quoted
        + b"t}tR.",
        "name in a tensor": tensor(source=b"cos\nsystem\n(" + quoted + b"tR") + b".",
        "persistent id": b"(" + text("module") + b"cos\nsystem\n" + quoted + b"tQ.",
        "storage class": tensor(source=storage(kind=b"cos\nsystem\n")) + b".",
        "torch.load inside": b"ctorch\nload\n(" + quoted + b"tR.",
        "codecs": b"c_codecs\ndecode\n(" + quoted + b"S'unicode_escape'\ntR.",
    }


NAMES = list(payloads("x"))


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


def test_the_payloads_would_bite(tmp_path, extension):
    biting = ("reduce", "stack global", "eval", "exec", "nested getattr", "inst", "obj", "extension")
    for name in biting:
        sentinel = tmp_path / "sentinel"
        pickle.load(io.BytesIO(payloads(f"touch {sentinel}")[name]))
        assert sentinel.exists(), name
        sentinel.unlink()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", ["state_dict", "beside", "alone"])
def test_nothing_runs(tmp_path, name, wrap, extension):
    sentinel = tmp_path / "sentinel"
    payload = payloads(f"touch {sentinel}")[name]
    if payload.startswith(b"\x80"):
        payload = payload[2:]
        payload = payload[9:] if payload.startswith(b"\x95") else payload
    if wrap == "state_dict":
        payload = b"}(" + text("w") + tensor() + text("x") + payload[:-1] + b"u."
    elif wrap == "beside":
        inner = b"}" + text("w") + tensor() + b"s"
        payload = b"}(" + text("state_dict") + inner + text("hyper_parameters") + payload[:-1] + b"u."
    path = archive(tmp_path / "w.pt", payload)
    try:
        tensors = read_state_dict(path)
    except CheckpointError as err:
        assert str(path) in str(err)  # noqa: PT017
    else:
        assert wrap == "beside"
        assert list(tensors) == ["w"]
    with pytest.raises(CheckpointError):
        load(path)
    assert not sentinel.exists()


def test_records_hold_the_names_and_raw_fields(tmp_path):
    contents = read_torch_zip(open_source(archive(tmp_path / "w.pt", payloads("touch x")["reduce"])))
    assert isinstance(contents.content, Record)
    assert contents.content.name == "posix.system"
    assert contents.content.args == ("touch x",)
    assert contents.replaced == ("posix.system",)


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "wicked_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = archive(tmp_path / "w.pt", b"cwicked_module\nThing\n)R.")
    assert content_of(path).name == "wicked_module.Thing"
    assert "wicked_module" not in sys.modules


IMPOSSIBLE = {
    "longer than the storage": tensor(size=(5,)),
    "past the end": tensor(size=(4,), offset=1),
    "strides out of the storage": tensor(size=(2, 2), stride=(3, 1)),
    "negative stride": tensor(size=(2,), stride=(-1,)),
    "negative offset": tensor(size=(1,), offset=-1),
    "negative size": tensor(size=(-4,)),
    "huge size": tensor(size=(2**62,)),
    "huge product": tensor(size=(2**62, 2**62), stride=(0, 0)),
    "repeats a small storage": tensor(size=(2**40,), stride=(0,)),
    "int larger than 64 bits": tensor(size=(2**200,), stride=(0,)),
    "size and stride differ": tensor(size=(2, 2), stride=(1,)),
    "too many axes": tensor(size=(1,) * 65, stride=(1,) * 65),
    "storage shorter than declared": tensor(source=storage(count=5)),
    "storage of huge size": tensor(source=storage(count=2**62)),
    "storage of negative size": tensor(source=storage(count=-1)),
    "storage that is not there": tensor(source=storage(key="7")),
    "storage outside the archive": tensor(source=storage(key="../../../../etc/passwd")),
    "storage that is a string": tensor(source=text("storage")),
    "storage of a bogus class": tensor(source=storage(kind=integer(4))),
    "persistent id that is an int": integer(3) + b"Q",
    "persistent id in text": b"Pstorage\n",
    "persistent id of another type": b"(" + text("socket") + b"NNNNtQ",
    "tensor with no fields": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR",
    "state set on a tensor": tensor() + b"(NNNtb",
    "items set on a tensor": tensor() + b"NNs",
    "call of a tensor": tensor() + b")R",
    "call without a tuple": b"ctorch\nSize\n]R",
    "torch.Size of floats": b"ctorch\nSize\n(F1.5\ntR",
    "container from an int": b"ccollections\nOrderedDict\n(" + integer(1) + b"tR",
    "device from an int": b"ctorch\ndevice\n(" + integer(1) + b"tR",
    "class named by a number": integer(1) + integer(2) + b"\x93",
    "unbalanced": b"NN",
    "open mark": b"(N",
    "memo that was never set": b"h\x07",
    "stack underflow": b"000",
    "out-of-band buffer": b"\x97",
    "unknown opcode": b"\xf1",
    "tensor as a key": b"}" + tensor() + b"Ns",
    "list in a set": b"\x8f(]\x90",
    "integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_impossible_is_refused(tmp_path, name):
    path = archive(tmp_path / "w.pt", state(IMPOSSIBLE[name]))
    assert_refused(path, r"w\.pt")


def test_a_memo_index_allocates_nothing(tmp_path):
    path = archive(tmp_path / "w.pt", state(tensor() + b"r\xff\xff\xff\xff"))
    np.testing.assert_array_equal(read_state_dict(path)["w"], np.ones(4, "f4"))


def test_billion_laughs(tmp_path):
    laughs = b"]q\x00"
    for i in range(80):
        laughs += b"0](h%ch%ceq%c" % (i, i, i + 1)
    inner = b"}" + text("w") + tensor() + b"s"
    lightning = b"}(" + text("state_dict") + inner + text("hp") + laughs + b"u."
    path = archive(tmp_path / "w.pt", lightning)
    assert list(read_state_dict(path)) == ["w"]
    as_plain(content_of(path))
    beside = b"}(" + text("w") + tensor() + text("hp") + laughs + b"u."
    assert_refused(archive(tmp_path / "v.pt", beside), "list", CheckpointError)


@pytest.mark.parametrize("opcode", [b"\x85", b"l"])
def test_deep_nesting(tmp_path, opcode):
    depth = 50_000
    value = b"N" + opcode * depth if opcode == b"\x85" else b"(" * depth + b"N" + opcode * depth
    path = archive(tmp_path / "w.pt", state(value))
    assert_refused(path, r"w\.pt", CheckpointError)
    with pytest.raises(CorruptCheckpointError, match="nested"):
        as_plain(content_of(path))
    assert_refused(archive(tmp_path / "v.pt", b"}" + value + b"Ns."), r"v\.pt", CheckpointError)


def test_copies_are_counted(tmp_path):
    pairs = b"](" + b"(K\x01K\x02t" * 20_000 + b"eq\x00"
    again = b"ccollections\nOrderedDict\nq\x01(h\x00tR0" + b"h\x01(h\x00tR0" * 1000
    path = archive(tmp_path / "w.pt", b"N0" + pairs + again + b"0}" + b".")
    assert_refused(path, "memory")


def test_zip_bomb(tmp_path):
    zeros = bytes(20_000_000)
    path = archive(tmp_path / "w.pt", state(tensor()), [zeros], compression=zipfile.ZIP_DEFLATED)
    assert_refused(path, "would grow")


def test_many_small_zip_bombs(tmp_path):
    """Each of them is within the ratio; all together they are not."""
    block = os.urandom(1 << 12)
    storages = [(block * 60)[:200_000] for _ in range(800)]
    path = archive(tmp_path / "w.pt", state(tensor()), storages, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 6 << 20
    tracemalloc.start()
    try:
        read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_size_that_the_directory_of_the_archive_invents(tmp_path):
    path = archive(tmp_path / "w.pt", state(tensor()))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/0"))
    for field in (20, 24):
        data[entry + field : entry + field + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    assert_refused(path, "cut off|damaged")


def test_two_entries_of_one_name(tmp_path):
    path = archive(tmp_path / "w.pt", state(tensor()))
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", bytes(16))
    with pytest.raises(CorruptCheckpointError, match="two entries"):
        read_state_dict(path)


def test_several_pickles(tmp_path):
    path = archive(tmp_path / "w.pt", state(tensor()))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", state(tensor()))
    with pytest.raises(CheckpointError, match=r"data\.pkl"):
        read_state_dict(path)
