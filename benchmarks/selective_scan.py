"""The selective scan against spyx 1.0.0 and lrnnx, and against the time of its exponentials alone.

    python benchmarks/selective_scan.py [--spyx DIR] [--lrnnx DIR] [--rounds 7] [--json FILE]

`--spyx` is a folder that holds spyx 1.0.0 (its spyx/ssm.py is loaded by path), `--lrnnx` one that holds the
package lrnnx (forward only: its backward pass takes minutes); without them those rows are left out. All run in
one process, interleaved, medians are shown; torch is measured with one and two threads and the better
counts. "floor" is a scan that only accumulates exp(dt A).
Shapes are (B, L, D, N), temp is XLA's temp_size_in_bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spyx.ops.selective import selective_scan

SHAPES = [(2, 512, 512, 16), (1, 2048, 1536, 16), (8, 256, 256, 16)]


def inputs(batch, length, width, states):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (length, batch, width))).astype(np.float32)
    A = -np.tile(np.arange(1, states + 1, dtype=np.float32), (width, 1))
    vectors = normal(length, batch, states), normal(length, batch, states)
    return tuple(map(jnp.asarray, (normal(length, batch, width), dt, A, *vectors)))


def floor(u, dt, A, B, C):
    A = A.T

    def step(total, dt):
        return total + jnp.exp(dt[:, None] * A), None

    return jax.lax.scan(step, jnp.zeros((u.shape[1], *A.shape)), dt)[0]


def with_gradient(f):
    def run(*args):
        y, pull = jax.vjp(f, *args)
        return y, pull(args[0])

    return run


def upstream(folder: str):
    path = Path(folder) / "spyx" / "ssm.py"
    spec = importlib.util.spec_from_file_location("upstream_ssm", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"no module at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def scan(u, dt, A, B, C):
        """What spyx 1.0.0's Mamba.__call__ does after its projections, without D."""
        A_bar = jnp.exp(jnp.einsum("tbd,ds->tbds", dt, A))
        Bu_bar = dt[..., None] * B[..., None, :] * u[..., None]
        return jnp.einsum("tbs,tbds->tbd", C, module._selective_scan(A_bar, Bu_bar))

    return scan


def lrnnx_scan(folder: str):
    sys.path.append(folder)
    for name in ("selective_scan_cuda", "simplified_scan_cuda"):
        sys.modules[name] = types.ModuleType(name)
    import torch
    from lrnnx.ops.selective_scan import selective_scan_ref

    def prepare(threads, u, dt, A, B, C):
        channels_first = [torch.tensor(np.asarray(v)).permute(1, 2, 0).contiguous() for v in (u, dt, B, C)]
        A = torch.tensor(np.asarray(A))

        def run():
            torch.set_num_threads(threads)
            with torch.no_grad():
                u, dt, B, C = channels_first
                selective_scan_ref(u, dt, A, B, C)

        return run

    return prepare


def measure(runs: dict, rounds: int) -> dict[str, float]:
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for round_ in range(rounds):
        for name, run in runs.items():
            if round_ >= 3 and sum(times[name]) > 20:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spyx")
    parser.add_argument("--lrnnx")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    functions = {"floor": floor, "ours": selective_scan, "ours fb": with_gradient(selective_scan)}
    if options.spyx:
        functions |= {"spyx": upstream(options.spyx), "spyx fb": with_gradient(upstream(options.spyx))}
    torch_runs = lrnnx_scan(options.lrnnx) if options.lrnnx else None
    table = []
    for shape in SHAPES:
        args = inputs(*shape)
        compiled = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
        runs = {name: lambda f=f, args=args: jax.block_until_ready(f(*args)) for name, f in compiled.items()}
        if torch_runs:
            for threads in (1, 2):
                runs[f"lrnnx {threads}"] = torch_runs(threads, *args)
        seconds = measure(runs, options.rounds)
        if torch_runs:
            seconds["lrnnx"] = min(seconds.pop("lrnnx 1"), seconds.pop("lrnnx 2"))
        temp = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
        table.append({"shape": shape, "seconds": seconds, "temp": temp})
        print(f"(B, L, D, N) = {shape}")
        for name, value in seconds.items():
            base = "ours fb" if name.endswith("fb") else "ours"
            size = f"{temp[name] / 1e6:10.2f} MB" if name in temp else ""
            print(f"  {name:10s} {value * 1e3:10.2f} ms   {value / seconds[base]:7.2f} x ours {size}", flush=True)
    args = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs(1, 131072, 16, 16)]
    start = time.perf_counter()
    jax.jit(with_gradient(selective_scan)).lower(*args).compile()
    seconds = time.perf_counter() - start
    print(f"compile, forward + backward, L = 131072: {seconds:.2f} s")
    if options.json:
        Path(options.json).write_text(json.dumps({"table": table, "compile_seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
