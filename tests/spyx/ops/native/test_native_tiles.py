"""Matrix units, and the same kernels without them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding

from spyx.ops.native import custom_call
from spyx.ops.native.tiles import TILES

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "compat_torch" / "test_ltv_kernels.py"
"""Of the blocks whose kernels make matrix products."""


without = pytest.mark.skipif(not TILES, reason="no matrix units are in use: all tests run without them")


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_matrix_units_are_used_where_there_are_some():
    features = binding.get_host_cpu_features()
    there = all(features.get(name) for name in ("avx512f", "amx-tile", "amx-bf16")) and sys.platform == "linux"
    assert (there and os.environ.get("SPYX_AMX") != "0") == TILES


@without
def test_products_are_right_without_matrix_units():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_native_products.py"), SPYX_AMX="0")


@without
@pytest.mark.full
@pytest.mark.parametrize("file", [HERE / "test_native_diagonal.py", KERNELS])
def test_kernels_are_right_without_matrix_units(file):
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", str(file), SPYX_AMX="0")


LAYER = """
import sys, numpy as np, jax, jax.numpy as jnp
from spyx.ops import diagonal_ssm
rng = np.random.default_rng(5)
def draw(*shape): return jnp.asarray(rng.standard_normal(shape), jnp.float32)
T, B, H, N = 150, 3, 70, 33
lam = jnp.asarray(rng.uniform(0.5, 1, N) * np.exp(1j * rng.uniform(0, 6, N)), jnp.complex64)
u, Bm, C, D = draw(T, B, H), draw(N, H) + 1j * draw(N, H), draw(H, N) + 1j * draw(H, N), draw(H)
w = draw(T, B, H)
def loss(*args): return jnp.sum(w * diagonal_ssm(*args, D))
f = jax.jit(lambda *args: (diagonal_ssm(*args, D), jax.grad(loss, argnums=(0, 2))(*args)))
assert "spyx_native" in f.lower(u, lam, Bm, C).as_text()
np.savez(sys.argv[1], *map(np.asarray, jax.tree.leaves(f(u, lam, Bm, C))))
"""


def test_a_layer_is_the_same_with_matrix_units_and_without(tmp_path):
    results = []
    for switch in ("1", "0"):
        run("-c", LAYER, str(tmp_path / f"{switch}.npz"), SPYX_AMX=switch, SPYX_NATIVE="1")
        results.append(np.load(tmp_path / f"{switch}.npz"))
    for name in results[0]:
        a, b = results[0][name], results[1][name]
        assert np.max(np.abs(a - b)) <= 2e-6 * np.max(np.abs(b))


def test_code_for_matrix_units_is_kept_apart(monkeypatch):
    before = custom_call._cache_directory()
    monkeypatch.setattr(custom_call, "TILES", not TILES)
    assert custom_call._cache_directory() != before
