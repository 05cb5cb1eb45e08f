"""Train and quantise the layers of spyx.ssm: `python scripts/ssm_demo.py`, under a minute on a CPU.

Each line ends with the figure of the published tutorial of spyx 1.0.0 for the same run, where it has one.
Needs optax and qwix: pip install 'spyx-torch[train,quant]'.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spyx import axn, nn, quant, ssm


class Hybrid(nnx.Module):
    """Dense, LRU, dense: where int8 and ternary weights are tried."""

    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Linear(4, 16, use_bias=False, rngs=rngs)
        self.ssm = ssm.LRU(16, d_state=8, rngs=rngs)
        self.decode = nnx.Linear(16, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.ssm(self.encode(x)))


def show(text: str, published: str = "") -> None:
    print(f"  {text:58}published {published}" if published else f"  {text}", flush=True)


def title(text: str) -> None:
    print(f"\n{text}", flush=True)


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


def learn_identity(model: nnx.Module, u: jax.Array, rate: float, steps: int, published: str = "") -> None:
    """Train `model` to return its input."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(u) - u) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(train_step(model, optimizer))]
    for step in range(2, steps + 1):
        losses.append(float(train_step(model, optimizer)))
        if step % 50 == 0 and step < steps:
            show(f"step {step}: loss {losses[-1]:.4f}")
    show(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps", published)


def magnitudes(layer: ssm.LRU | ssm.S5Diag, digits: int) -> str:
    found = jnp.abs(layer._complex_matrices()[0])
    return f"|lam| in [{found.min():.{digits}f}, {found.max():.{digits}f}]"


def diagonal_layers() -> None:
    title("LRU(4, 16) learns the identity")
    lru = ssm.LRU(4, 16, rngs=nnx.Rngs(0))
    show(f"at init {magnitudes(lru, 3)}", "[0.268, 0.888]")
    learn_identity(lru, noise(1, 32, 16, 4), 5e-3, 150, "1.4408 -> 0.0020")
    show(f"trained {magnitudes(lru, 3)}", "[0.203, 0.847]")

    title("S5Diag(8, 32)")
    s5 = ssm.S5Diag(8, 32, rngs=nnx.Rngs(2))
    show(f"at init {magnitudes(s5, 4)}", "[0.9523, 0.9995]")
    learn_identity(s5, noise(3, 32, 16, 8), 5e-3, 100)


def mamba_block() -> None:
    title("MambaBlock(8, d_state=8) learns the identity")
    block = ssm.MambaBlock(8, d_state=8, d_conv=4, expand=2, rngs=nnx.Rngs(4))
    u = noise(5, 16, 4, 8)
    learn_identity(block, u, 3e-3, 100, "1.1178 -> 0.4200")
    state, outputs = block.initial_state(4), []
    step = nnx.jit(lambda block, u_t, state: block.step(u_t, state))
    for u_t in u:
        y_t, state = step(block, u_t, state)
        outputs.append(y_t)
    show(f"step by step, largest difference from the whole: {jnp.abs(jnp.stack(outputs) - block(u)).max():.1e}")


def spiking_front_end() -> None:
    title("Spiking neurons, LRU and readout")
    rngs, u = nnx.Rngs(0), noise(6, 12, 4, 4)
    dense = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
    front = nn.Sequential(dense, nn.LIF((8,), activation=axn.triangular(), rngs=rngs))
    spikes, _ = nn.run(front, u)
    show(f"spikes {spikes.shape}, mean firing rate {spikes.mean():.3f}", "0.102 (older flax; 0.107 on flax 0.12.8)")
    lru, readout = ssm.LRU(d_model=8, d_state=16, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
    show(f"logits {readout(lru(spikes).sum(axis=0)).shape}")

    def loss(dense: nnx.Linear, lru: ssm.LRU) -> jax.Array:
        spikes, _ = nn.run(nn.Sequential(dense, front.layers[1]), u)
        return jnp.mean(readout(lru(spikes).sum(axis=0)) ** 2)

    gradient = nnx.grad(loss)(dense, lru)["kernel"]
    show(f"gradient through the spikes: largest entry {jnp.abs(gradient[...]).max():.3f}")


def quantised() -> None:
    title("Linear(4, 16), LRU(16, 8), Linear(16, 3): largest difference from float")
    x, model = noise(7, 8, 2, 4), Hybrid(nnx.Rngs(0))
    exact = model(x)
    for name, rules, published in (
        ("int8", quant.linear_only_rules(), "0.0354 (older flax; 0.046 on flax 0.12.8)"),
        ("ternary", quant.bitnet_ternary_rules(), "1.2347 (older flax; 1.314 on flax 0.12.8)"),
    ):
        small = quant.quantize(model, x, rules=rules, mode="ptq")
        show(f"{name}: {jnp.abs(small(x) - exact).max():.3f}", published)


def main() -> None:
    start = time.perf_counter()
    diagonal_layers()
    mamba_block()
    spiking_front_end()
    if quant.available():
        quantised()
    else:
        print("\nquantisation is left out: pip install 'spyx-torch[quant]'")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
