from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spyx.ops.pallas import gpu

SHAPE = jax.ShapeDtypeStruct((512, 128), jnp.float32)


@pytest.fixture
def no_compilers(monkeypatch):
    def missing(chip):
        raise RuntimeError(f"{chip} is not installed")

    monkeypatch.setattr(aot, "_topology", missing)


def test_a_missing_compiler_is_not_run(no_compilers, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not run: no compiler for v5e"):
        aot.compile_for("v5e", jnp.sin, SHAPE)


def test_a_missing_compiler_fails_in_ci(no_compilers, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="not run: no compiler for h100"):
        aot.compile_for("h100", jnp.sin, SHAPE)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_what_is_known_of_a_program(chip):
    compiled = aot.compile_for(chip, lambda x: jnp.sin(x) + 1, SHAPE)
    assert compiled.seconds > 0
    assert 2 * 512 * 128 * 4 <= compiled.peak_bytes < 4 * 512 * 128 * 4
    if chip == "h100":
        assert 8 <= compiled.registers() <= 255


def test_registers_of_a_large_executable():
    """The largest kernel's, wherever in the file the compiler puts it."""

    def scan(a, x, h0):
        return gpu.linear_scan_forward((a,), (x,), (h0,))

    shapes = SHAPE, SHAPE, jax.ShapeDtypeStruct(SHAPE.shape[1:], jnp.float32)
    alone = aot.compile_for("h100", scan, *shapes).registers()
    table = np.random.default_rng(0).normal(size=(64, 1024)).astype("float32")
    large = aot.compile_for("h100", lambda *args: (scan(*args), jnp.sin(args[1][0, 0]) + table), *shapes)
    serialised = large.executable.runtime_executable().serialize()
    assert len(serialised) > 3 * 2**16
    assert len(aot.register_counts(serialised)) >= 2
    assert large.registers() == alone


def test_an_executable_without_a_cubin_is_refused():
    with pytest.raises(ValueError, match="no Riegeli file"):
        aot.register_counts(b"\x04\x2f\x08\x00" * 8)


def test_damage_is_noticed():
    compiled = aot.compile_for("h100", jnp.sin, SHAPE)
    serialised = compiled.executable.runtime_executable().serialize()
    start = serialised.index(bytes.fromhex("83af70d10d884a3f"))
    assert aot.register_counts(b"\x83\xaf" + serialised) == aot.register_counts(serialised)
    with pytest.raises(ValueError, match="snappy"):
        aot.register_counts(serialised[: start + 400])
