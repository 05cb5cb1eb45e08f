"""Fine-tune a Mamba in JAX and hand it back to transformers: `python benchmarks/finetune.py [--text FILE]`.

Loads a folder of transformers (by default the byte-level Mamba of the reference cases), trains it on the bytes of a
text with optax, writes it in transformers' format, reads it there, and compares the logits. Exit status 1 if the loss
did not fall or the logits differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from compat_torch.checkpoint import from_pretrained
from compat_torch.quantization import mean_loss

ROOT = Path(__file__).parents[1]
LIMIT = 1e-4  # of the logits, relative to their largest


def loss_of(model, ids):
    """Mean cross entropy of each next token."""
    logits = model(ids[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, ids):
    """One step of the optimizer; returns the loss before it."""
    loss, gradient = nnx.value_and_grad(loss_of)(model, ids)
    optimizer.update(model, gradient)
    return loss


def train(model, text: np.ndarray, steps: int, batch: int, length: int, rate: float) -> None:
    """Train in place on random pieces of the text."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 10, 1), steps)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for step in range(steps):
        starts = rng.integers(0, len(text) - length, batch)
        pieces = jnp.asarray(np.stack([text[at : at + length + 1] for at in starts]))
        loss = train_step(model, optimizer, pieces)
        if step % max(steps // 10, 1) == 0:
            print(f"  step {step}: loss {float(loss):.3f}", flush=True)


def largest_difference(model, folder: Path, ids: np.ndarray) -> float:
    """Of our logits and those of transformers for the folder, relative to the largest."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(jax.jit(lambda x: model(x).logits)(ids))
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def main() -> None:
    """Train, save, reread, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "parity" / "golden" / "hf_mamba_trained" / "hf")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument("--out", type=Path, help="folder to write; a temporary one if not given")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    text = np.frombuffer(options.text.read_bytes(), np.uint8).astype(np.int32)
    if len(text) < 2 * options.length:
        sys.exit(f"{options.text} has {len(text)} bytes, at least {2 * options.length} are needed")
    model = from_pretrained(options.model)
    whole = text[: len(text) // options.length * options.length].reshape(-1, options.length)
    before = mean_loss(model, whole)
    started = time.perf_counter()
    model.train()
    train(model, text, options.steps, options.batch, options.length, options.rate)
    model.eval()
    after = mean_loss(model, whole)
    print(f"loss on the text {before:.3f} -> {after:.3f} in {time.perf_counter() - started:.1f} s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "model"
        model.save_pretrained(folder, format="hf")
        difference = largest_difference(model, folder, whole[:2].astype(np.int64))
    print(f"logits of transformers for the folder written: largest difference {difference:.1e} of the largest logit")
    sys.exit(not (after < before and difference < LIMIT))


if __name__ == "__main__":
    main()
