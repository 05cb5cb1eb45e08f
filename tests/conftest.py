"""Settings of every test process: CPU only, compiled programs kept between runs, and bounded memory."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

_RESIDENT_LIMIT = 3 << 30  # bytes of one test process above which it forgets its compiled programs


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """JAX keeps every program a process has compiled: several GB over the whole suite."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _RESIDENT_LIMIT:
        import jax

        jax.clear_caches()
        gc.collect()
