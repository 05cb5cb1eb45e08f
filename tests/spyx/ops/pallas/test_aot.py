from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import pytest

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
