"""Are the layers of spyx.ssm those of spyx 1.0.0? `python -m parity.live_upstream --upstream FOLDER`

FOLDER is one of `pip install --no-deps --target FOLDER spyx==1.0.0`: both have the same import name, so upstream
runs in a process of its own. From equal random streams both make the same layers, and run them on the same fresh
inputs; parameters must be equal to the bit, outputs and gradients (of sum(y * w)) within rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OUTPUT, GRADIENT = 1e-5, 5e-5
"""Largest difference of outputs and gradients, relative to the largest value where that is above 1."""

Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """How both libraries make a layer, and the shape (T, B, H) of its input."""

    make: Callable[[Any, Any], Any]
    shape: tuple[int, int, int]


LAYERS = {
    "LRU": Layer(lambda ssm, rngs: ssm.LRU(5, 7, rngs=rngs), (37, 3, 5)),
    "LRU, no skip": Layer(lambda ssm, rngs: ssm.LRU(3, 2, r_min=0.5, r_max=0.9, use_skip=False, rngs=rngs), (5, 1, 3)),
    "S5Diag": Layer(lambda ssm, rngs: ssm.S5Diag(5, 7, rngs=rngs), (37, 3, 5)),
    "S5Diag, no skip": Layer(
        lambda ssm, rngs: ssm.S5Diag(2, 3, dt_min=0.1, dt_max=0.5, use_skip=False, rngs=rngs), (5, 1, 2)
    ),
    "Mamba": Layer(lambda ssm, rngs: ssm.Mamba(18, 5, rngs=rngs), (37, 3, 18)),
    "Mamba, dt_rank": Layer(
        lambda ssm, rngs: ssm.Mamba(6, 16, dt_rank=3, dt_min=0.1, dt_max=1.0, rngs=rngs), (5, 1, 6)
    ),
    "MambaBlock": Layer(lambda ssm, rngs: ssm.MambaBlock(5, rngs=rngs), (37, 3, 5)),
    "MambaBlock, sizes": Layer(lambda ssm, rngs: ssm.MambaBlock(4, 3, d_conv=2, expand=3, rngs=rngs), (1, 1, 4)),
    "ChunkedSSM, mean": Layer(
        lambda ssm, rngs: ssm.ChunkedSSM(ssm.LRU(4, 6, rngs=rngs), ssm.S5Diag(4, 3, rngs=rngs), chunk_size=5),
        (35, 3, 4),
    ),
    "ChunkedSSM, last": Layer(
        lambda ssm, rngs: ssm.ChunkedSSM(
            ssm.MambaBlock(4, 6, rngs=rngs), ssm.Mamba(4, rngs=rngs), chunk_size=3, pool="last"
        ),
        (36, 2, 4),
    ),
}


def run(ssm: Any, seed: int) -> Arrays:
    """Parameters, outputs and gradients of every layer made by the module `ssm`, by "layer/kind/name"."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    found: Arrays = {}
    for index, (name, layer) in enumerate(LAYERS.items()):
        rng = np.random.default_rng(seed + index)
        u, w = (jnp.asarray(rng.standard_normal(layer.shape, np.float32)) for _ in range(2))
        graph, params = nnx.split(layer.make(ssm, nnx.Rngs(seed + index)))

        def loss(params, u, graph=graph, w=w):
            y = nnx.merge(graph, params)(u)
            return jnp.sum(y * w), y

        (_, y), (gradient, du) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, u)
        found[f"{name}/output/y"] = np.asarray(y)
        found[f"{name}/gradient/u"] = np.asarray(du)
        for kind, tree in (("parameter", params), ("gradient", gradient)):
            for path, value in nnx.to_flat_state(tree):
                found[f"{name}/{kind}/{'.'.join(map(str, path))}"] = np.asarray(value[...])
    return found


def _dump(folder: str, seed: int, out: str) -> None:
    """Upstream's layers alone: its package also imports data loaders that it needs for nothing here."""
    package = types.ModuleType("spyx")
    package.__path__ = [str(Path(folder) / "spyx")]
    sys.modules["spyx"] = package
    from spyx import ssm

    np.savez(out, **run(ssm, seed))  # type: ignore[arg-type]


def run_upstream(folder: Path, seed: int) -> Arrays:
    """`run` in a process that imports the spyx in `folder`."""
    if not (folder / "spyx" / "ssm.py").is_file():
        raise FileNotFoundError(
            f"{folder} holds no spyx 1.0.0; make it with: pip install --no-deps --target {folder} spyx==1.0.0"
        )
    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary) / "upstream.npz")
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-P", __file__, "--dump", out, "--upstream", str(folder), "--seed", str(seed)]
        subprocess.run(command, env=env, check=True)
        with np.load(out) as arrays:
            return dict(arrays)


def _difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference, relative to the largest value where that is above 1; infinite if names differ."""
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return float("inf")
    scaled = [
        np.abs(ours[name].astype(np.float64) - theirs[name]).max() / max(1.0, np.abs(theirs[name]).max())
        for name in ours
    ]
    return float("inf") if np.isnan(scaled).any() else max(scaled)


def compare(ours: Arrays, theirs: Arrays) -> bool:
    """Print one row a layer; whether all are equal."""
    print(f"{'layer':20}{'parameters':>16}{'output':>12}{'gradient':>12}  verdict")
    all_equal = True
    for name in LAYERS:

        def of(arrays: Arrays, kind: str, name=name) -> Arrays:
            return {key: value for key, value in arrays.items() if key.startswith(f"{name}/{kind}/")}

        mine, wanted = of(ours, "parameter"), of(theirs, "parameter")
        exact = mine.keys() == wanted.keys() and all(
            mine[k].dtype == wanted[k].dtype and np.array_equal(mine[k], wanted[k]) for k in mine
        )
        output = _difference(of(ours, "output"), of(theirs, "output"))
        gradient = _difference(of(ours, "gradient"), of(theirs, "gradient"))
        equal = exact and output <= OUTPUT and gradient <= GRADIENT
        all_equal &= equal
        count = f"{len(wanted)} {'equal' if exact else 'differ'}"
        print(f"{name:20}{count:>16}{output:12.1e}{gradient:12.1e}  {'identical' if equal else 'differs'}")
    return all_equal


def main() -> int:
    """Compare and return the exit status: 0 if every layer is identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, type=Path, help="folder with spyx 1.0.0")
    parser.add_argument("--seed", type=int, default=None, help="of parameters and inputs; default: a fresh one")
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dump:
        _dump(args.upstream, args.seed, args.dump)
        return 0
    seed = int.from_bytes(os.urandom(3)) if args.seed is None else args.seed
    from spyx import ssm

    print(f"spyx.ssm against spyx 1.0.0, seed {seed}")
    return 0 if compare(run(ssm, seed), run_upstream(args.upstream.resolve(), seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
