"""How fast is the LTI layer, diagonal_ssm, and how much memory does it take?

    python benchmarks/lti_scan.py [--reference FOLDER] [--repeats 15]

Contestants, interleaved in one run, medians: `floor` is the matrix products alone (projection and readout; with
gradient also the recomputed projection and the four products of the adjoint), `direct` the layer of spyx 1.0.0
(complex projection, associative scan, complex readout), `ours` diagonal_ssm with method="auto". With
`--reference` (a folder that `pip install --no-deps --target FOLDER spyx==1.0.0` made), `direct` is first checked
in a subprocess to be that package's LRU to float32 accuracy and to take the same time and memory.
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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = [(1024, 8, 64, 64), (4096, 4, 128, 64), (16384, 1, 128, 128), (256, 32, 256, 256)]

dot = partial(jnp.dot, precision="highest")


def direct(u, lam, B, C, D):
    x = jnp.einsum("sn,tbn->tbs", B, u.astype(jnp.complex64))
    combine = lambda a, b: (b[0] * a[0], b[0] * a[1] + b[1])  # noqa: E731
    _, h = jax.lax.associative_scan(combine, (jnp.broadcast_to(lam, x.shape), x))
    return jnp.einsum("ms,tbs->tbm", C, h).real + D * u


def ours(u, lam, B, C, D):
    from spyx.ops import diagonal_ssm

    return diagonal_ssm(u, lam, B, C, D, precision="highest")


def _real(M):
    return jnp.concatenate([M.real, M.imag])


def floor(u, lam, B, C, D):
    del lam, D
    return dot(dot(u.reshape(-1, u.shape[-1]), _real(B).T), _real(C.T)).reshape(u.shape)


def floor_gradient(u, lam, B, C, D, w):
    rows, dy = u.reshape(-1, u.shape[-1]), w.reshape(-1, w.shape[-1])
    Br, Ct = _real(B), _real(C.T)
    x = dot(rows, Br.T)
    dy = dy + 1e-30 * dot(x, Ct)
    again = dot(rows + dy[:1] * 1e-30, Br.T)
    g = dot(dy, Ct.T)
    return dot(g, Br), dot(g.T, rows), dot(again.T, dy)


def gradient(f):
    return jax.grad(lambda u, lam, B, C, D, w: jnp.sum(f(u, lam, B, C, D) * w), argnums=(0, 1, 2, 3, 4))


def arguments(T, batch, H, N):
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s)  # noqa: E731
    lam = np.exp(-rng.uniform(1e-3, 0.5, N) + 1j * rng.uniform(0, 2 * np.pi, N))
    B, C = ((normal(*s) + 1j * normal(*s)) / np.sqrt(2 * s[1]) for s in ((N, H), (H, N)))
    cast = lambda z: jnp.asarray(z, jnp.complex64 if np.iscomplexobj(z) else jnp.float32)  # noqa: E731
    return [cast(z) for z in (normal(T, batch, H), lam, B, C, normal(H), normal(T, batch, H))]


def measure(contestants, args, repeats):
    """{name: (median seconds, temporary bytes)} of interleaved runs."""
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in contestants.items()}
    times = {name: [] for name in compiled}
    for turn in range(repeats + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn:
                times[name].append(time.perf_counter() - start)
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    return {name: (statistics.median(t), memory[name]) for name, t in times.items()}


def check_reference(folder: str, shape, repeats) -> None:
    """Run the reference's own LRU in a subprocess, on its own weights, and compare `direct` with it."""
    code = """
import importlib.util, json, sys, jax, jax.numpy as jnp
from flax import nnx
import lti_scan as bench
spec = importlib.util.spec_from_file_location("reference", sys.argv[3] + "/spyx/ssm.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
LRU = reference.LRU
T, B, H, N = map(int, sys.argv[1].split(","))
layer = LRU(H, N, rngs=nnx.Rngs(0))
u = jax.random.normal(jax.random.key(0), (T, B, H))
graph, state = nnx.split(layer)
f = lambda state, u: nnx.merge(graph, state)(u)
values = (*layer._complex_matrices(), layer.D[...])
g = lambda state, u: bench.direct(u, *values)
found = bench.measure({"reference": f, "direct": g}, (state, u), int(sys.argv[2]))
y, d = f(state, u), g(state, u)
found["error"] = float(jnp.abs(y - d).max() / jnp.abs(y).max())
print(json.dumps(found))
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    command = [sys.executable, "-c", code, ",".join(map(str, shape)), str(repeats), folder]
    with tempfile.TemporaryDirectory() as cwd:
        out = subprocess.run(command, env=env, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    (t, m), (td, md) = found["reference"], found["direct"]
    print(
        f"reference LRU {shape}: {t * 1e3:.2f} ms, {m / 1e6:.2f} MB; direct {td * 1e3:.2f} ms, {md / 1e6:.2f} MB;"
        f" difference {found['error']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="folder with spyx 1.0.0 installed")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.reference:
        for shape in SHAPES:
            check_reference(options.reference, shape, options.repeats)
    print(f"{'(T, B, H, N)':22s} {'pass':17s} {'floor':>8s} {'direct':>8s} {'ours':>8s} {'direct/':>8s} {'ours/':>8s}"
          f" {'direct':>8s} {'ours':>8s} {'ours/':>8s}\n{'':40s} {'ms':>8s} {'ms':>8s} {'ms':>8s} {'ours':>8s}"
          f" {'floor':>8s} {'MB':>8s} {'MB':>8s} {'direct':>8s}")  # fmt: skip
    for shape in SHAPES:
        *values, w = arguments(*shape)
        passes = {
            "forward": ({"floor": floor, "direct": direct, "ours": ours}, values),
            "forward+backward": (
                {"floor": floor_gradient, "direct": gradient(direct), "ours": gradient(ours)},
                [*values, w],
            ),
        }
        for name, (contestants, args) in passes.items():
            found = measure(contestants, args, options.repeats)
            (tf, _), (td, md), (to, mo) = (found[k] for k in ("floor", "direct", "ours"))
            print(
                f"{shape!s:22s} {name:17s} {tf * 1e3:8.2f} {td * 1e3:8.2f} {to * 1e3:8.2f} {td / to:8.2f}"
                f" {to / tf:8.2f} {md / 1e6:8.2f} {mo / 1e6:8.2f} {mo / md:8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
