"""How long does one training step of a layer take, next to spyx 1.0.0? `python benchmarks/train_step.py --upstream DIR`

A step is loss, gradient and Adam update, compiled as one program, on equal shapes. Both libraries have the same
import name, so each is a process of its own; the rounds interleave them. Reported are medians, their ratio
(upstream / ours) and XLA's temporary bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAYERS = {
    "LRU": lambda ssm, H, rngs: ssm.LRU(H, 64, rngs=rngs),
    "S5Diag": lambda ssm, H, rngs: ssm.S5Diag(H, 64, rngs=rngs),
    "Mamba": lambda ssm, H, rngs: ssm.Mamba(H, 16, rngs=rngs),
    "MambaBlock": lambda ssm, H, rngs: ssm.MambaBlock(H, 16, rngs=rngs),
    "ChunkedSSM": lambda ssm, H, rngs: ssm.ChunkedSSM(
        ssm.LRU(H, 64, rngs=rngs), ssm.S5Diag(H, 64, rngs=rngs), chunk_size=16
    ),
}
SLOW_SECONDS = 1.0
"""A step slower than this is timed three times."""


class Step:
    """A compiled training step of one layer, and what it works on."""

    def __init__(self, name: str, shape: tuple[int, int, int]):
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from spyx import ssm

        u = jax.random.normal(jax.random.key(0), shape)
        graph, params = nnx.split(LAYERS[name](ssm, shape[-1], nnx.Rngs(0)))
        optimizer = optax.adam(1e-3)

        def step(params, state, u):
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graph, p)(u) - u) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.values: tuple[Any, Any] = (params, optimizer.init(params))
        self.u, self.block = u, jax.block_until_ready
        start = time.perf_counter()
        self.compiled = jax.jit(step).lower(*self.values, u).compile()
        analysis = self.compiled.memory_analysis()
        self.facts = {"compile_s": time.perf_counter() - start, "temp_bytes": analysis.temp_size_in_bytes}
        self.facts["first_loss"] = self()[1]

    def __call__(self) -> tuple[float, float]:
        """(seconds, loss) of one step."""
        start = time.perf_counter()
        params, state, loss = self.block(self.compiled(*self.values, self.u))
        self.values = params, state
        return time.perf_counter() - start, float(loss)


def serve(upstream: str) -> None:
    """Answer [name, shape] with facts and "run" with seconds, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if upstream:
        package = types.ModuleType("spyx")
        package.__path__ = [f"{upstream}/spyx"]
        sys.modules["spyx"] = package
    step: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command == "run":
            answer: Any = step()[0]
        else:
            step = Step(*command)
            answer = step.facts
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """A library's process; `upstream` is "" for ours."""

    def __init__(self, upstream: str):
        command = [sys.executable, "-P", __file__, "--serve", "--upstream", upstream]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: Any) -> Any:
        """The answer to a command."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(name: str, shape: tuple[int, int, int], rounds: int, upstream: str) -> dict[str, Any]:
    """Facts and seconds of ours and upstream."""
    workers = {"ours": Worker(""), "upstream": Worker(upstream)}
    try:
        facts = {side: worker.ask([name, shape]) for side, worker in workers.items()}
        times: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(rounds):
            for side, worker in workers.items():
                if len(times[side]) < 3 or times[side][0] < SLOW_SECONDS:
                    times[side].append(worker.ask("run"))
        medians = {side: statistics.median(values) for side, values in times.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "layer": name, "shape": shape, "seconds": medians, "facts": facts,
        "ratio": medians["upstream"] / medians["ours"],
    }  # fmt: skip


def main() -> None:
    """Print a row a layer; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--upstream", required=True, help="folder of `pip install --no-deps --target FOLDER spyx==1.0.0`"
    )
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--shape", nargs=3, type=int, default=(512, 8, 64), metavar=("T", "B", "H"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.upstream)
    print(f"one training step, (T, B, H) = {tuple(args.shape)}")
    print(f"{'':12}{'ours ms':>10}{'1.0.0 ms':>10}{'ratio':>8}{'temp MB':>10}{'1.0.0 MB':>10}")
    rows = []
    for name in args.layers:
        row = measure(name, tuple(args.shape), args.rounds, args.upstream)
        ours, upstream = (row["seconds"][side] * 1e3 for side in ("ours", "upstream"))
        memory = [row["facts"][side]["temp_bytes"] / 1e6 for side in ("ours", "upstream")]
        print(f"{name:12}{ours:10.2f}{upstream:10.2f}{row['ratio']:8.1f}{memory[0]:10.1f}{memory[1]:10.1f}", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
