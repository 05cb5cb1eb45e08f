"""How fast, and in how much memory, is a checkpoint loaded and converted? `python benchmarks/checkpoint.py`

A checkpoint of mamba-370m's shape with random float32 weights (1.5 GB) is written into a temporary folder. Each round
measures, one after the other and each in a process of its own: `from_pretrained` until every parameter is there;
`convert` with hashes, and until it is on disk; transformers' `from_pretrained`, which maps the file, and then reads
every parameter; safetensors' `load_file`, a mere copy in memory. Before each of them come `cp` of the weights, the page
cache warm, and an fsync of the copy.

Reported are medians, and of the seconds the least: seconds, CPU seconds of all threads, and speed relative to the copy
beside it, like for like: `cp` against a load and against a conversion less its fsync, `cp` and fsync against a whole
conversion. Peak memory stands next to what is allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPARE_BYTES = 600 << 20
JOBS = ("load", "convert hf", "convert mamba_ssm", "transformers", "safetensors")


def config_of(layers: int, d_model: int, vocab: int) -> dict[str, Any]:
    """config.json as transformers writes it."""
    return {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": d_model, "state_size": 16,
        "num_hidden_layers": layers, "vocab_size": vocab, "conv_kernel": 4, "expand": 2,
        "intermediate_size": 2 * d_model, "time_step_rank": -(-d_model // 16), "use_bias": False,
        "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "residual_in_fp32": True, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' MambaForCausalLM."""
    d, n, k, r = (config[name] for name in ("hidden_size", "state_size", "conv_kernel", "time_step_rank"))
    inner = config["intermediate_size"]
    yield "backbone.embeddings.weight", (config["vocab_size"], d)
    yield "backbone.norm_f.weight", (d,)
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}"
        yield f"{layer}.norm.weight", (d,)
        yield f"{layer}.mixer.in_proj.weight", (2 * inner, d)
        yield f"{layer}.mixer.conv1d.weight", (inner, 1, k)
        yield f"{layer}.mixer.conv1d.bias", (inner,)
        yield f"{layer}.mixer.x_proj.weight", (r + 2 * n, inner)
        yield f"{layer}.mixer.dt_proj.weight", (inner, r)
        yield f"{layer}.mixer.dt_proj.bias", (inner,)
        yield f"{layer}.mixer.A_log", (inner, n)
        yield f"{layer}.mixer.D", (inner,)
        yield f"{layer}.mixer.out_proj.weight", (d, inner)


def make(folder: Path, config: dict[str, Any]) -> None:
    """Write the checkpoint, tensor by tensor."""
    import numpy as np

    from compat_torch.checkpoint import write_folder

    class Random(dict):
        def __getitem__(self, name: str) -> Any:
            return np.random.default_rng(len(name)).standard_normal(super().__getitem__(name), np.float32)

    write_folder(folder, Random(tensors_of(config)), config)


def run_load(folder: Path) -> Any:
    """from_pretrained, until every parameter is there."""
    import jax
    from flax import nnx

    import compat_torch.architectures.mamba_lm  # noqa: F401
    from compat_torch.checkpoint import from_pretrained

    jax.numpy.zeros(1).block_until_ready()
    yield
    model = from_pretrained(folder)
    jax.block_until_ready(nnx.state(model))
    yield {}


def run_convert(folder: Path, to: str) -> Any:
    """convert, with fsync; its share is reported apart."""
    import jax

    import compat_torch.architectures.mamba_lm  # noqa: F401
    from compat_torch.checkpoint.conversion import convert

    if to == "mamba_ssm":
        import torch  # noqa: F401
    jax.numpy.zeros(1).block_until_ready()
    synced, real = 0.0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal synced
        start = time.perf_counter()
        real(descriptor)
        synced += time.perf_counter() - start

    os.fsync = fsync
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        yield
        convert(folder, Path(out) / "out", to=to)
        yield {"fsync_s": synced}


def run_transformers(folder: Path) -> Any:
    """transformers' from_pretrained."""
    import torch
    from transformers import MambaForCausalLM

    yield
    model = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        sum(float(parameter.sum()) for parameter in model.parameters())
    yield {}


def run_safetensors(folder: Path) -> Any:
    """The safetensors library into NumPy arrays: a copy in memory without a model or a transposition."""
    from safetensors.numpy import load_file

    yield
    tensors = load_file(folder / "model.safetensors")
    yield {"tensors": len(tensors)}


def serve(job: str, folder: Path) -> None:
    """One job in this process; its seconds and memory as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, _, to = job.partition(" ")
    jobs: dict[str, Callable[[], Any]] = {
        "load": lambda: run_load(folder),
        "convert": lambda: run_convert(folder, to),
        "transformers": lambda: run_transformers(folder),
        "safetensors": lambda: run_safetensors(folder),
    }
    steps = jobs[kind]()
    next(steps)
    before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    facts = next(steps)
    facts |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    facts |= {"before_bytes": before, "peak_bytes": peak_bytes()}
    steps.close()
    answers.write(json.dumps(facts))
    answers.flush()


def peak_bytes() -> int:
    """The most this process has had resident, file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(job: str, folder: Path) -> dict[str, Any]:
    """One job in a fresh process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", __file__, "--serve", job, "--folder", str(folder)]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


def copy(folder: Path) -> dict[str, float]:
    """Seconds of `cp` of the weights, the page cache warm, and of `cp` and an fsync."""
    weights, target = folder / "model.safetensors", folder.parent / "copy"
    subprocess.run(["cat", str(weights)], check=True, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    subprocess.run(["cp", str(weights), str(target)], check=True)
    copied = time.perf_counter() - start
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter() - start
    target.unlink()
    return {"cp_s": copied, "cp_sync_s": synced}


def main() -> None:
    """Print a row a job; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=(48, 1024, 50280), metavar=("LAYERS", "WIDTH", "VOCAB"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder)
    config = config_of(*args.shape)
    home = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-"))
    try:
        subprocess.run(
            [sys.executable, "-c", MAKE, str(HERE), str(home / "model"), json.dumps(config)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}, check=True,
        )  # fmt: skip
        rows = table(home / "model", args.jobs, args.rounds)
    finally:
        shutil.rmtree(home)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


MAKE = "import json, pathlib, sys; sys.path.append(sys.argv[1]); import checkpoint; " \
       "checkpoint.make(pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))"  # fmt: skip


def table(folder: Path, jobs: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure, print and return the rows."""
    nbytes = (folder / "model.safetensors").stat().st_size
    if shutil.disk_usage(folder).free < 4 * nbytes:
        raise SystemExit(f"not enough disk space for copies of {nbytes / 1e9:.1f} GB in {folder.parent}")
    runs: dict[str, list[dict[str, Any]]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job in jobs:
            runs[job].append({"fsync_s": 0.0, **copy(folder), **measure(job, folder)})
    limit = 1.25 * nbytes + SPARE_BYTES
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} CPUs, load {load}; peak memory allowed {limit / 1e9:.2f} GB")
    print(
        f"{'':20}{'s':>8}{'least s':>9}{'cpu s':>8}{'fsync s':>9}{'cp s':>8}{'least cp s':>12}{'cp, fsync s':>13}"
        f"{'cp / (s - fsync)':>18}{'cp, fsync / s':>15}{'peak GB':>9}"
    )
    rows = []
    for job, results in runs.items():
        seconds, cpu, fsync, cp, synced, peak, bare, whole = (
            statistics.median(map(of, results))
            for of in (
                *map(operator.itemgetter, ("seconds", "cpu_s", "fsync_s", "cp_s", "cp_sync_s", "peak_bytes")),
                lambda run: run["cp_s"] / (run["seconds"] - run["fsync_s"]),
                lambda run: run["cp_sync_s"] / run["seconds"],
            )
        )
        least, least_cp = (min(run[name] for run in results) for name in ("seconds", "cp_s"))
        print(
            f"{job:20}{seconds:8.2f}{least:9.2f}{cpu:8.2f}{fsync:9.2f}{cp:8.2f}{least_cp:12.2f}{synced:13.2f}"
            f"{bare:18.2f}{whole if fsync else math.nan:15.2f}{peak / 1e9:9.2f}"
        )
        rows.append({"job": job, "bytes": nbytes, "runs": results})
    return rows


if __name__ == "__main__":
    main()
