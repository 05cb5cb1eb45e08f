"""Settings of every test process: CPU only, compiled programs kept between runs, and bounded memory."""

import os
from pathlib import Path

import pytest
from programs import forget_when_many

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    yield
    forget_when_many()
