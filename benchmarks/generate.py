"""Generation next to transformers on the CPU: `python benchmarks/generate.py`.

Each contestant in its own process, with the same weights, taking turns; medians; transformers with 1 and 2 threads.
Tokens per second, a prompt of 2048 tokens, time to the first token, peak memory. Greedy tokens of all must be equal.
The floor of a prompt are its matrix products and its exponentials alone, by XLA. Short calls are timed warm, one after
the other, as in the other benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "parity" / "golden" / "hf_mamba_trained" / "hf"
CONTESTANTS = ("ours", "transformers-1", "transformers-2")
FLOOR = "floor"
SHAPES = {"mamba-130m, 4 layers": {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 50280}}
PROMPT, NEW, LONG = 16, 64, 2048


def load_ours(folder: str) -> Callable[[Any, int], Any]:
    """`(ids, new) -> ids` of compat_torch."""
    from compat_torch.checkpoint import from_pretrained
    from compat_torch.generation import generate

    model = from_pretrained(folder)
    return lambda ids, new: generate(model, ids, new)


def load_transformers(folder: str, threads: int) -> Callable[[Any, int], Any]:
    """`(ids, new) -> ids` of transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(ids, new):
        ids = torch.from_numpy(ids)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options).numpy()

    return run


def load_floor(folder: str) -> Callable[[Any, int], Any]:
    """A function with the cost of a prompt's matrix products and exponentials, whose ids mean nothing."""
    import jax
    import jax.numpy as jnp

    from compat_torch.checkpoint import from_pretrained

    model = from_pretrained(folder)
    mixers = [layer.mixer for layer in model.backbone.layers]
    weights = [[*(v[...] for v in (m.in_proj.kernel, m.x_proj.kernel, m.dt_proj.kernel, m.A_log, m.out_proj.kernel))]
               for m in mixers]  # fmt: skip

    @jax.jit
    def run(x, weights):
        for project_in, project_x, project_dt, A_log, project_out in weights:
            u = (x @ project_in)[:, : A_log.shape[0]]
            dt = (u @ project_x)[:, : project_dt.shape[0]] @ project_dt
            u = u + jnp.sum(jnp.exp(dt[..., None] * A_log), -1)
            x = u @ project_out
        return x

    x = jnp.ones((LONG, model.config.hidden_size))

    def floor(ids, new):
        jax.block_until_ready(run(x, weights))
        return ids

    return floor


def load(name: str, folder: str) -> Callable[[Any, int], Any]:
    """`(ids, new) -> ids` of a contestant."""
    if name == "ours":
        return load_ours(folder)
    return load_floor(folder) if name == FLOOR else load_transformers(folder, int(name[-1]))


def worker(name: str, folder: str) -> None:
    """Answer JSON commands: {"batch", "prompt", "new", "warm"} -> seconds, the last tokens, peak bytes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np
    from worker import peak_rss, seconds

    started = time.perf_counter()
    run = load(name, folder)
    answers.write(json.dumps({"load": time.perf_counter() - started, "bytes": peak_rss()}) + "\n")
    answers.flush()
    for line in sys.stdin:
        command = json.loads(line)
        ids = np.random.default_rng(0).integers(0, command["vocabulary"], (command["batch"], command["prompt"]))
        outs = []
        taken = seconds(lambda ids=ids, new=command["new"], outs=outs: outs.append(run(ids, new)), command["warm"])
        tokens = outs[-1][:, command["prompt"] :].tolist()
        answers.write(json.dumps({"seconds": taken, "tokens": tokens, "bytes": peak_rss()}) + "\n")
        answers.flush()


class Contestant:
    """A process that generates."""

    def __init__(self, name: str, folder: Path, cache: str):
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment.setdefault("JAX_PLATFORMS", "cpu")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.name, self.loaded = name, self._answer()

    def run(self, **command: int) -> dict[str, Any]:
        """The answer to a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: run `{' '.join(map(str, self.process.args))}` to see why")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@contextmanager
def contestants(folder: Path, cache: str) -> Iterator[list[Contestant]]:
    """All of them, ended on leaving."""
    started = [Contestant(name, folder, cache) for name in CONTESTANTS]
    try:
        yield started
    finally:
        for contestant in started:
            contestant.close()


def first_token(folder: Path, vocabulary: int, cache: str) -> dict[str, float]:
    """Seconds from the call to the first token in new processes: without and with programs compiled before."""
    seconds = {}
    for name, key in (
        ("ours", "ours, nothing compiled"),
        ("ours", "ours, from the cache"),
        ("transformers-1", "transformers"),
    ):
        contestant = Contestant(name, folder, cache)
        seconds[key] = contestant.run(batch=1, prompt=PROMPT, new=1, vocabulary=vocabulary, warm=False)["seconds"]
        contestant.close()
    return seconds


def compare(title: str, folder: Path, rounds: int) -> None:
    """Print the rows of one model."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    print(f"\n{title}: {sum(f.stat().st_size for f in folder.glob('*.safetensors')) / 1e6:.1f} MB of weights")
    with tempfile.TemporaryDirectory() as cache:
        for key, seconds in first_token(folder, vocabulary, cache).items():
            print(f"  first token, {key}: {seconds:.2f} s")
        works = {
            "decode, batch 1, tokens/s": {"batch": 1, "prompt": PROMPT, "new": NEW},
            "decode, batch 16, tokens/s": {"batch": 16, "prompt": PROMPT, "new": NEW},
            f"prompt of {LONG}, s": {"batch": 1, "prompt": LONG, "new": 1},
        }
        with contestants(folder, cache) as all_of_them:
            for label, work in works.items():
                command = {**work, "vocabulary": vocabulary, "warm": True}
                warm = [c.run(**command) for c in all_of_them]
                # a peer several times slower than another one is not asked again
                going = [a["seconds"] < 3 * min(b["seconds"] for b in warm[1:]) for a in warm]
                answers = [[c.run(**command)] for c in all_of_them]
                for _ in range(rounds - 1):
                    for contestant, answer, again in zip(all_of_them, answers, going, strict=True):
                        if again:
                            answer.append(contestant.run(**command))
                seconds = [statistics.median(a["seconds"] for a in answer) for answer in answers]
                memory = [(a[-1]["bytes"] - c.loaded["bytes"]) / 1e6 for a, c in zip(answers, all_of_them, strict=True)]
                theirs = min(seconds[1:])
                values = seconds if work["new"] == 1 else [work["batch"] * NEW / s for s in seconds]
                equal = all(a["tokens"] == warm[0]["tokens"] for a in warm)
                print(
                    f"  {label}: ours {values[0]:.3g}, transformers {values[1]:.3g} (1 thread) {values[2]:.3g} (2): "
                    f"{theirs / seconds[0]:.1f}x; peak MB over the weights {memory[0]:.0f}, {memory[1]:.0f}; "
                    f"tokens {'equal' if equal else 'DIFFER'}"
                )
            floor = Contestant(FLOOR, folder, cache)
            answers = [floor.run(batch=1, prompt=LONG, new=0, vocabulary=vocabulary, warm=True) for _ in range(rounds)]
            floor.close()
            print(f"  floor of a prompt, s: {statistics.median(a['seconds'] for a in answers):.3g}")


def random_model(folder: Path, **sizes: int) -> None:
    """Write a Mamba of transformers with new weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(folder)


def main() -> None:
    """Run the comparison, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", choices=["trained", *SHAPES], default=["trained", *SHAPES])
    parser.add_argument("--worker", choices=(*CONTESTANTS, FLOOR), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    for title in options.models:
        if title == "trained":
            compare("trained Mamba of the reference cases", TRAINED, options.rounds)
        else:
            with tempfile.TemporaryDirectory() as folder:
                random_model(Path(folder), **SHAPES[title])
                compare(title, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
