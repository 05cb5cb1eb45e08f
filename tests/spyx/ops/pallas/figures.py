"""Print the table of docs/kernels.md: `PYTHONPATH=.:tests python tests/spyx/ops/pallas/figures.py [FIRST_LETTERS]`.

With an argument, only the rows whose name begins with it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from aot import BANDWIDTH, GPUS, TPUS, compile_for, inner_loops  # isort: skip

import jax
import jax.numpy as jnp

from spyx.ops.pallas import gpu, tpu
from spyx.ops.pallas.linear import Flags


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def linear(module, *, parts: int, varying: bool, flags: Flags):
    x, h0 = (float32(2048, 8, 1024),) * parts, (float32(8, 1024),) * parts
    return partial(module.linear_scan_forward, flags=flags), ((x if varying else h0), x, h0)


def selective(module, *, backward: bool):
    T, B, D, N = 2048, 4, 1024, 16
    u, b, h0 = float32(T, B, D), float32(T, B, N), float32(B, D, N)
    args = (u, u, float32(D, N), b, b)
    if not backward:
        return module.selective_scan_forward, (*args, h0)
    starts = jax.eval_shape(module.selective_scan_forward, *args, h0)[2]
    return module.selective_scan_backward, (*args, starts, u, h0)


def dual(module, *, backward: bool):
    T, B, H, P, N = 2048, 2, 16, 64, 128
    x, dt, vectors, h0 = float32(T, B, H, P), float32(T, B, H), float32(T, B, 1, N), float32(B, H, P, N)
    args = (x, dt, float32(H), vectors, vectors, h0)
    return (module.ssd_backward, (*args, x, h0)) if backward else (module.ssd_forward, args)


CASES = {
    "linear_scan, real, a varying": partial(linear, parts=1, varying=True, flags=Flags()),
    "linear_scan, complex, a constant": partial(linear, parts=2, varying=False, flags=Flags()),
    "linear_scan, complex, a varying, adjoint": partial(linear, parts=2, varying=True, flags=Flags().adjoint()),
    "selective_scan, forward": partial(selective, backward=False),
    "selective_scan, backward": partial(selective, backward=True),
    "ssd, forward": partial(dual, backward=False),
    "ssd, backward": partial(dual, backward=True),
}


STEPS = {name: (2,) if "forward" in name else (1, 2) if "backward" in name else (8,) for name in CASES}
STEPS |= {"ssd, forward": (128,), "ssd, backward": (128, 128)}
"""Time steps in one turn of the kernel's loops, in descending number of bundles."""


def program(name: str, chip: str):
    return CASES[name](gpu if chip in GPUS else tpu)


def dump_loops(folder: str, prefix: str) -> None:
    """Compile for every TPU and print the loops of each as JSON; libtpu dumps into `folder`."""
    found = {}
    for name in chosen(prefix):
        for chip in TPUS:
            seen = set(Path(folder).iterdir())
            f, args = program(name, chip)
            compile_for(chip, f, *args)
            count = grid_steps if name.startswith("ssd") else inner_loops
            loops = sorted(count(set(Path(folder).iterdir()) - seen), reverse=True)
            found[f"{name} {chip}"] = loops
    print(json.dumps(found))


def grid_steps(files: Iterable[Path]) -> list[int]:
    """VLIW bundles in one turn of the loop over the grid, for each `ssd` kernel whose compilation wrote `files`."""
    dumps = [f for f in files if re.search(r"-ssd_\w+\.\d+-\d+-final_bundles\.txt$", f.name)]
    return [len(re.findall(r"(?m)^\s*(?:0x[0-9a-f]+|0)\s+[A-Z]*\s*:\s+> ", f.read_text())) for f in dumps]


def chosen(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


def all_loops(prefix: str) -> dict[str, list[int]]:
    """Dumping slows the compiler down, so it happens in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        child = subprocess.run(
            [sys.executable, __file__, prefix, folder],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags},
            check=True,
            stdout=subprocess.PIPE,
        )
    return json.loads(child.stdout.splitlines()[-1])


def row(name: str, chip: str, loops: dict[str, list[int]]) -> str:
    f, args = program(name, chip)
    compiled = compile_for(chip, f, *args)
    if chip in GPUS:
        detail = f"{compiled.registers()} registers"
    else:
        pairs = zip(loops[f"{name} {chip}"], STEPS[name], strict=False)
        detail = " + ".join(f"{bundles} bundles / {steps}" for bundles, steps in pairs)
    moved = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves((args, jax.eval_shape(f, *args))))
    return (
        f"| {name} | {chip} | {compiled.seconds:.1f} | {compiled.peak_bytes / 2**20:.0f} | {detail} "
        f"| {moved / BANDWIDTH[chip] * 1e6:.0f} |"
    )


def main(prefix: str = "") -> None:
    loops = all_loops(prefix)
    print("| kernel | chip | compile time, s | peak memory, MiB | inner loop | bytes / bandwidth, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in chosen(prefix):
        for chip in (*TPUS, *GPUS):
            print(row(name, chip, loops), flush=True)


if __name__ == "__main__":
    dump_loops(sys.argv[2], sys.argv[1]) if len(sys.argv) == 3 else main(*sys.argv[1:])
