"""Bounded memory for processes that compile thousands of programs."""

import gc
import os
from pathlib import Path

_RESIDENT_LIMIT = 3 << 30  # bytes of one test process above which it forgets its compiled programs


def forget_when_many() -> None:
    """JAX keeps every program a process has compiled: several GB, and more mappings than Linux allows a process."""
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _RESIDENT_LIMIT:
        import jax

        jax.clear_caches()
        gc.collect()
