"""Compile for TPUs and NVIDIA GPUs that are not there, and read what the compiler says.

Import this module before anything initialises a JAX backend (the top of a test module is early enough):
it sets the environment under which libtpu answers without a TPU.
"""
# ruff: noqa: E402 (the environment comes before jax)

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
_SPILLS_ARE_ERRORS = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"
if _SPILLS_ARE_ERRORS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_SPILLS_ARE_ERRORS}".strip()

import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

TPUS = {"v5e": "v5e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

_GPU = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: 84942979072
  shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}  device_description_str: "{name}"
"""
GPUS = {
    "h100": _GPU.format(
        name="NVIDIA H100 80GB HBM3", major=9, cores=132, fpus=128, clock=1.98,
        shared=233472, optin=232448, bandwidth=3352320000000, l2=52428800,
    ),
    "a100": _GPU.format(
        name="NVIDIA A100-SXM4-80GB", major=8, cores=108, fpus=64, clock=1.41,
        shared=167936, optin=166912, bandwidth=2039000000000, l2=41943040,
    ),
}  # fmt: skip

BANDWIDTH = {"v4": 1228e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1638e9, "h100": 3352e9, "a100": 2039e9}
"""Bytes per second between memory and chip, from the vendors' data sheets."""


@dataclass(frozen=True)
class Compiled:
    """What is known of a program compiled for an absent device."""

    executable: Any
    seconds: float
    peak_bytes: int
    temp_bytes: int

    def registers(self) -> int:
        """Registers per thread of the program's largest kernel (CUDA only)."""
        counts = register_counts(self.executable.runtime_executable().serialize())
        if not counts:
            raise ValueError("no register count in the serialised executable")
        return max(counts)


def compile_for(chip: str, f: Callable, *args: jax.ShapeDtypeStruct) -> Compiled:
    """Compile `f(*args)` for one chip of `TPUS` or `GPUS`; skips the test where the compiler is not installed.

    A register spill on a GPU and an overflow of VMEM on a TPU are compile errors.
    """
    sharding = SingleDeviceSharding(_device(chip))
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    lowered = jax.jit(f).lower(*placed)
    with _uncached():
        start = time.perf_counter()
        executable = lowered.compile()
        seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    assert memory is not None
    return Compiled(executable, seconds, memory.peak_memory_in_bytes, memory.temp_size_in_bytes)


@contextmanager
def _uncached():
    """Without the persistent cache: programs for absent devices can be written to it but not read back."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@cache
def _topology(chip: str):
    if chip in TPUS:
        return topologies.get_topology_desc(TPUS[chip], "tpu")
    return topologies.get_topology_desc(chip, "cuda", target_config=GPUS[chip], topology="1x1x1")


def _device(chip: str) -> jax.Device:
    try:
        return _topology(chip).devices[0]
    except Exception as error:
        message = f"not run: no compiler for {chip} here ({type(error).__name__}: {error})"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message)
        pytest.skip(message)


def register_counts(executable: bytes) -> list[int]:
    """Registers per thread of each kernel of a serialised CUDA executable."""
    records = _riegeli_records(executable)
    return [
        count for cubin in re.finditer(rb"\x7fELF\x02\x01", records) for count in _of_cubin(records[cubin.start() :])
    ]


def _of_cubin(elf: bytes) -> Iterator[int]:
    """The attributes EIATTR_REGCOUNT, (symbol, count), in the sections SHT_CUDA_INFO."""
    (table,), (width, number) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    for header in range(table, table + width * number, width):
        kind, _, _, at, size = struct.unpack_from("<IQQQQ", elf, header + 4)
        end = at + size if kind == 0x70000000 else at
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", elf, at)
            if (form, attribute) == (4, 0x2F):
                yield struct.unpack_from("<I", elf, at + 8)[0]
            at += 4 + (length if form == 4 else 0)


def _riegeli_records(data: bytes) -> bytes:
    """The records of the first Riegeli file in `data`, joined.

    Each block of 64 KiB has a header of 24 bytes, inside a chunk too; a chunk has one of 40. Chunks are simple and
    compressed by snappy: sizes, then values, each after its decoded size.
    Source: github.com/google/riegeli, doc/riegeli_records_file_format.md.
    """
    start = data.find(bytes.fromhex("83af70d10d884a3f"))
    if start < 0:
        raise ValueError("no Riegeli file in the serialised executable")
    data = b"".join(data[block + 24 : block + 2**16] for block in range(start, len(data), 2**16))
    records, at = bytearray(), 0
    while data[at + 24 : at + 25] in (b"s", b"r"):
        body, size = at + 40, int.from_bytes(data[at + 8 : at + 16], "little")
        at = body + size
        if not size:
            continue
        if data[body : body + 1] != b"s":
            raise ValueError(
                f"a chunk of the serialised executable is compressed by {data[body : body + 1]!r}, not snappy"
            )
        sizes, body = _varint(data, body + 1)
        _, body = _varint(data, body + sizes)
        records += _unsnap(data[body:at])
    return bytes(records)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _unsnap(data: bytes) -> bytes:
    """What the snappy stream `data` decodes to."""
    length, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, kind = data[at], data[at] & 3
        at += 1
        if kind == 0:
            size = tag >> 2
            if size >= 60:
                extra = size - 59
                size = int.from_bytes(data[at : at + extra], "little")
                at += extra
            out += data[at : at + size + 1]
            at += size + 1
            continue
        if kind == 1:
            size, offset, width = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at], 1
        else:
            width = 2 if kind == 2 else 4
            size, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + width], "little")
        at += width
        if not 0 < offset <= len(out):
            raise ValueError(f"snappy stream copies from {offset} bytes back, only {len(out)} are there")
        copied = out[-offset:][:size]
        out += (copied * -(-size // len(copied)))[:size]
    if len(out) != length:
        raise ValueError(f"snappy stream of {length} bytes decodes to {len(out)}")
    return bytes(out)


def inner_loops(files: Iterable[Path]) -> list[int]:
    """VLIW bundles in one turn of each loop inside the grid of the kernel whose compilation wrote `files`.

    `files` come from LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true".
    """
    (text,) = (f.read_text() for f in files if re.search(r"_scan.*-\d+-final_bundles\.txt$", f.name))
    loops: list[list[str]] = []
    depth = 0
    for line in text.splitlines():
        place = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s+(>*)", line)
        if place is None:
            continue
        if place[1] == "LB" or len(place[2]) != depth:
            loops.append([])
            depth = len(place[2])
        if depth == 2:
            loops[-1].append(line)
    return [len(body) for body in loops if len(body) > 8]
