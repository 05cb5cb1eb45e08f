"""How fast, and how lean, are the recurrences next to their peers? `make bench`

Every contestant is a process of its own; the rounds interleave them, so that a busy machine disturbs all alike.
Reported are medians and ratios (theirs / ours; PyTorch peers at their better thread count), XLA's temporary bytes,
peak memory, and the floor: the matrix products alone for LTI layers, the exponentials alone for the selective scan.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS

HERE = Path(__file__).parent
SHAPES = {
    "lti": [(1024, 8, 64, 64), (4096, 4, 128, 64), (16384, 1, 128, 128), (256, 32, 256, 256)],
    "selective": [(2, 512, 512, 16), (1, 2048, 1536, 16), (8, 256, 256, 16)],
    "ssd": [(2, 512, 16, 64, 64), (1, 2048, 24, 64, 128)],
    "block": [(2, 512, 512, 16), (1, 2048, 512, 16)],
}
AXES = {"lti": "(T, B, H, N)", "selective": "(B, L, D, N)", "ssd": "(B, L, H, P, N)", "block": "(B, L, D, N)"}
SLOW_SECONDS = 1.0
"""A contestant slower than this is timed once, after its warm-up."""
LENGTHS = [2**k for k in range(10, 18)]


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, upstream: str):
        self.name = name
        path = [str(HERE), str(HERE.parent)]
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "UPSTREAM": upstream,
            "PYTHONPATH": os.pathsep.join(path),
            "JAX_COMPILATION_CACHE_DIR": "",
        }
        command = [sys.executable, "-P", str(HERE / "worker.py"), name]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command, wait for the answer; a process that died answers with an error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process has ended"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process has ended (out of memory?)"}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(
    family: str,
    shape: tuple[int, ...],
    rounds: int,
    upstream: str,
    names: list[str],
    kinds: tuple[str, ...] = ("forward", "both"),
) -> list[dict[str, Any]]:
    """One row a contestant: seconds by kind (median), facts, peak memory."""
    case = {"family": family, "shape": shape, "seed": 0}
    workers = [Worker(name, upstream) for name in names]
    try:
        rows = [{"family": family, "shape": shape, "name": w.name, **w.ask(prepare=case)} for w in workers]
        running = [(row, worker) for row, worker in zip(rows, workers, strict=True) if "error" not in row]
        for kind in kinds:
            able = [(row, worker) for row, worker in running if kind in row["kinds"]]
            times: dict[str, list[float]] = {worker.name: [] for _, worker in able}
            for round_ in range(rounds + 1):
                for row, worker in able:
                    if times[worker.name] and times[worker.name][0] > SLOW_SECONDS:
                        continue
                    answer = worker.ask(run=kind)
                    if "error" in answer:
                        row["error"] = answer["error"]
                    elif round_:
                        times[worker.name].append(answer["seconds"])
            running = [(row, worker) for row, worker in running if "error" not in row]
            for row, worker in able:
                if "error" in row:
                    continue
                row[f"{kind}_s"] = statistics.median(times[worker.name])
        for row, worker in running:
            answer = worker.ask(rss=True)
            row["peak_rss_bytes"] = answer.get("bytes")
        return rows
    finally:
        for worker in workers:
            worker.close()


def best_threads(rows: list[dict[str, Any]], kinds: tuple[str, ...] = ("forward", "both")) -> list[dict[str, Any]]:
    """PyTorch rows at the thread count that was faster for each kind."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["name"].split("@")[0]
        kept = merged.setdefault(name, {**row, "name": name})
        for kind in (f"{kind}_s" for kind in kinds):
            if kind in row:
                kept[kind] = min(row[kind], kept.get(kind, float("inf")))
    return list(merged.values())


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of one case: milliseconds, theirs over ours, temporary bytes, peak memory."""
    ours = next(row for row in rows if row["name"] == "ours")
    print(f"\n{rows[0]['family']} {AXES[rows[0]['family']]} = {tuple(rows[0]['shape'])}")
    print(
        f"{'':14}{'forward':>11}{'ratio':>8}{'fwd+bwd':>11}{'ratio':>8}{'temp MB':>10}{'temp MB bwd':>13}{'peak MB':>9}"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['name']:14}{row['error']}")
            continue
        cells = [f"{row['name']:14}"]
        for kind in ("forward_s", "both_s"):
            if kind in row:
                cells += [f"{row[kind] * 1e3:8.2f} ms", f"{row[kind] / ours[kind]:8.2f}"]
            else:
                cells.append(f"{'-':>11}{'-':>8}")
        for fact, width in (("forward_temp_bytes", 10), ("both_temp_bytes", 13), ("peak_rss_bytes", 9)):
            value = row.get(fact)
            cells.append(f"{'-' if value is None else f'{value / 1e6:.1f}':>{width}}")
        print("".join(cells))


def plot(results: list[dict[str, Any]], lengths: list[dict[str, Any]], file: Path) -> None:
    """Times of every contestant relative to ours, and our cost against T."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    groups = {(row["family"], tuple(row["shape"])): [] for row in results}
    for row in results:
        groups[row["family"], tuple(row["shape"])].append(row)
    names = sorted({row["name"] for row in results} - {"ours"})
    for offset, name in enumerate(names):
        ratios = []
        for rows in groups.values():
            by_name = {row["name"]: row for row in rows}
            theirs, ours = by_name.get(name, {}).get("both_s"), by_name["ours"].get("both_s")
            ratios.append(theirs / ours if theirs and ours else float("nan"))
        left.bar([i + offset / (len(names) + 1) for i in range(len(groups))], ratios, 1 / (len(names) + 1), label=name)
    left.set_yscale("log")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(groups)), [f"{f}\n{s}" for f, s in groups], fontsize=6)
    left.set_ylabel("forward + backward, theirs / ours")
    left.legend(fontsize=7)
    for family in sorted({row["family"] for row in lengths}):
        rows = [row for row in lengths if row["family"] == family and "both_s" in row]
        right.loglog([row["T"] for row in rows], [row["both_s"] for row in rows], marker="o", label=f"{family}, s")
    right.set_xlabel("T")
    right.set_ylabel("forward + backward, seconds")
    if lengths:
        right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the families asked for; write table, JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--upstream", required=True, help="folder of `pip install --target FOLDER --no-deps spyx==1.0.0`"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--lengths", action="store_true", help="also the cost against T = 1k ... 128k")
    args = parser.parse_args()
    results, lengths = [], []
    for family in args.families:
        for shape in SHAPES[family]:
            rows = best_threads(measure(family, shape, args.rounds, args.upstream, list(CONTESTANTS[family])))
            print_rows(rows)
            results += rows
    if args.lengths:
        print("\ncost against T, ours: forward + backward")
        for family, shape_of in (("lti", lambda T: (T, 1, 64, 64)), ("selective", lambda T: (1, T, 64, 16))):
            for T in LENGTHS:
                (row,) = measure(family, shape_of(T), 3, args.upstream, ["ours"])
                lengths.append({**row, "T": T})
                if "error" in row:
                    print(f"{family:10} T={T:<7} {row['error']}")
                    continue
                temp = row["both_temp_bytes"] / 1e6
                print(
                    f"{family:10} T={T:<7}{row['both_s'] * 1e6 / T:8.2f} us/step{temp:9.1f} MB temp"
                    f"{row['both_compile_s']:7.1f} s to compile"
                )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scan.json").write_text(json.dumps({"cases": results, "lengths": lengths}, indent=1) + "\n")
    plot(results, lengths, args.out / "scan.png")


if __name__ == "__main__":
    main()
