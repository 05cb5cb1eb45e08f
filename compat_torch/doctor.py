"""What is installed and switched on here, what clashes, and how to mend it. Imports neither spyx nor torch."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

PACKAGES = ("spyx-torch", "jax", "jaxlib", "flax", "numpy", "safetensors", "einops", "jaxtyping")
OPTIONAL = (
    "torch", "typer", "rich", "huggingface-hub", "numba", "qwix", "optax", "orbax-checkpoint", "libtpu",
    "jax-cuda13-plugin",
)  # fmt: skip
MINIMUM_JAX = (0, 10)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name, value: what was looked at and what is there.
        problem: what is wrong with it; None if nothing is.
        fix: the command or setting that mends it.
    """

    name: str
    value: str
    problem: str | None = None
    fix: str | None = None


def installed_versions() -> dict[str, str]:
    """Version of every installed distribution by normalised name."""
    found = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if name}


def examine(installed: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[Finding]:
    """The findings for a set of installed distributions and environment variables.

    Args:
        installed: name -> version, as `installed_versions` gives.
        environ: environment variables.
    """
    yield Finding("platform", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        missing = None if name in installed else "not installed"
        yield Finding(name, installed.get(name, "-"), missing, missing and f"pip install {name}")
    present = [f"{name} {installed[name]}" for name in OPTIONAL if name in installed]
    yield Finding("optional", ", ".join(present) or "none")
    yield from _jax_version(installed)
    yield from _jax_settings(environ)
    yield from _clashes(installed, environ)


def _jax_version(installed: Mapping[str, str]) -> Iterator[Finding]:
    jax, jaxlib = installed.get("jax"), installed.get("jaxlib")
    if jax is None or jaxlib is None:
        return
    if _numbers(jax) < MINIMUM_JAX:
        wanted = ".".join(map(str, MINIMUM_JAX))
        yield Finding("jax version", jax, f"jax {wanted} or newer is needed", f"pip install -U 'jax>={wanted}'")
    if _numbers(jax) != _numbers(jaxlib):
        yield Finding("jax and jaxlib", f"{jax} and {jaxlib}", "versions differ", f"pip install -U jaxlib=={jax}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _jax_settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        import jax

        devices = ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
        yield Finding("devices", devices)
        precision = getattr(jax.config, "jax_default_matmul_precision", None) or "default"
        yield Finding("jax_default_matmul_precision", f"{precision} (compat_torch layers have their own: highest)")
        on = getattr(jax.config, "jax_enable_x64", False)
        x64 = "on" if on else 'off (jax.config.update("jax_enable_x64", True) turns it on)'
        yield Finding("jax_enable_x64", x64)
    except (ImportError, RuntimeError) as err:
        fix = "unset JAX_PLATFORMS, or pip install the jax plugin of your device, see https://docs.jax.dev"
        yield Finding("devices", "-", f"jax does not start: {err}", fix)
    yield Finding("preallocation", _preallocation(environ))


def _preallocation(environ: Mapping[str, str]) -> str:
    if not _preallocates(environ):
        return "off"
    return f"on, {environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '.75')} of GPU memory at start"


def _preallocates(environ: Mapping[str, str]) -> bool:
    return environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")


def _clashes(installed: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[Finding]:
    if "spyx" in installed:
        yield Finding(
            "spyx",
            installed["spyx"],
            "the upstream distribution has the same import name as spyx-torch",
            "pip uninstall -y spyx && pip install --force-reinstall --no-deps spyx-torch",
        )
    cuda_jax = sorted(name for name in installed if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name))
    cuda_torch = "torch" in installed and any(name.startswith("nvidia-cu") for name in installed)
    if cuda_jax and cuda_torch and _preallocates(environ):
        yield Finding(
            "torch and jax on CUDA",
            f"torch {installed['torch']}, {', '.join(cuda_jax)}",
            "both use the GPU: JAX takes most of its memory at start and torch finds none left",
            "export XLA_PYTHON_CLIENT_PREALLOCATE=false (or install a CPU torch: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu)",
        )


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether no finding names a problem."""
    return all(finding.problem is None for finding in findings)


def report() -> list[Finding]:
    """The findings for this process."""
    return list(examine(installed_versions(), os.environ))
