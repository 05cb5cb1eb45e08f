"""Train a phasor network on two moons and run it as spikes: `python scripts/phasor_demo.py`, under a minute on a CPU.

Needs optax: pip install 'spyx-torch[train]'.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from spyx import phasor

STEPS = 200


def two_moons(count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """(points in [0, 1]^2, labels 0 and 1): two interleaved half circles with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    angle = rng.uniform(0, np.pi, count)
    upper = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.where(labels[:, None] == 0, upper, [1.0, 0.5] - upper) + rng.normal(0, 0.08, (count, 2))
    low, high = np.array([-1.3, -0.8]), np.array([2.3, 1.3])
    return jnp.asarray((points - low) / (high - low), jnp.float32), jnp.asarray(labels)


def train(model: phasor.PhasorMLP, x: jax.Array, labels: jax.Array) -> None:
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss_of(m):
            logits = m(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, gradients)
        return loss, jnp.mean(logits.argmax(-1) == labels)

    for step in range(1, STEPS + 1):
        loss, accuracy = train_step(model, optimizer)
        if step == 1 or step % 50 == 0:
            print(f"  step {step:3d}: loss {loss:.4f}, accuracy {accuracy:.3f}", flush=True)


def run_spiking(model: phasor.PhasorMLP, x: jax.Array, T: int) -> tuple[jax.Array, list[jax.Array]]:
    """Logits, and the spikes of the input and of each hidden layer, one cycle of T ticks each."""
    trains = [phasor.phase_to_spikes(phasor.phase_of(phasor.real_to_phasor(x)), T)]
    for layer in model.layers:
        if isinstance(layer, phasor.PhasorLinear):
            trains.append(phasor.SpikingPhasor(layer, period_T=T)(trains[-1]))
    last = phasor.real_to_phasor(phasor.spikes_to_phase(trains[-1]), scale=1.0)
    return model.readout(last), trains


def main() -> None:
    print("Round trip phase -> spikes -> phase, 100000 uniform phases")
    theta = np.random.default_rng(0).uniform(-np.pi, np.pi, 100_000).astype(np.float32)
    for T in (8, 16, 64, 256):
        error = phasor.spikes_to_phase(phasor.phase_to_spikes(theta, T)) - theta
        print(f"  T = {T:3d}: max {jnp.abs(error).max():.4f}, mean {error.mean():+.5f}; 2 pi / T = {2 * np.pi / T:.4f}")

    (x, labels), (x_test, labels_test) = two_moons(512, seed=0), two_moons(512, seed=1)
    model = phasor.PhasorMLP(2, 32, 2, depth=2, rngs=nnx.Rngs(0))
    print(f"\nPhasorMLP(2, 32, 2, depth=2), {STEPS} steps of optax.adam on two moons")
    train(model, x, labels)
    logits = model(x_test)
    print(f"  test accuracy, phasors: {np.mean(logits.argmax(-1) == labels_test):.3f}")

    print("\nThe same weights as spikes, one spike per unit and cycle")
    for T in (8, 16, 64, 256):
        spiking, trains = run_spiking(model, x_test, T)
        accuracy = np.mean(spiking.argmax(-1) == labels_test)
        agree = np.mean(spiking.argmax(-1) == logits.argmax(-1))
        spikes = sum(float(s.sum()) for s in trains) / len(x_test)
        print(
            f"  T = {T:3d}: test accuracy {accuracy:.3f}, same class as phasors {agree:.3f}, "
            f"mean logit error {jnp.abs(spiking - logits).mean():.4f}, {spikes:.0f} spikes per sample"
        )


if __name__ == "__main__":
    main()
