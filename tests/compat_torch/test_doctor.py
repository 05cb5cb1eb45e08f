"""The doctor's findings, and its command."""

import sys

from typer.testing import CliRunner

from compat_torch import doctor
from compat_torch.__main__ import app

HEALTHY = {**dict.fromkeys(doctor.PACKAGES, "1.0"), "jax": "0.10.2", "jaxlib": "0.10.1"}


def problems(installed, environ=None):
    return {f.name: f for f in doctor.examine(installed, environ or {}) if f.problem}


def test_a_healthy_installation():
    assert problems(HEALTHY) == {}
    findings = {f.name: f.value for f in doctor.examine(HEALTHY, {})}
    assert findings["jax"] == "0.10.2"
    assert "cpu" in findings["devices"]
    assert findings["jax_enable_x64"].startswith("off")
    assert findings["preallocation"].startswith("on, .75")
    assert "jax_default_matmul_precision" in findings


def test_upstream_spyx():
    found = problems({**HEALTHY, "spyx": "1.0.0"})["spyx"]
    assert "same import name" in found.problem
    assert found.fix.startswith("pip uninstall -y spyx")


def test_missing_and_old_packages():
    found = problems({name: version for name, version in HEALTHY.items() if name != "flax"})
    assert found["flax"].fix == "pip install flax"
    assert problems({**HEALTHY, "jax": "0.9.2"}).keys() == {"jax version", "jax and jaxlib"}


def test_torch_and_jax_both_on_cuda():
    both = {**HEALTHY, "torch": "2.13.0", "nvidia-cublas": "13.0", "jax-cuda13-plugin": "0.10.2"}
    found = problems(both)["torch and jax on CUDA"]
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in found.fix
    assert problems(both, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}) == {}
    assert problems({name: v for name, v in both.items() if name != "nvidia-cublas"}) == {}


def test_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "installed_versions", lambda: HEALTHY)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "ok  jax: 0.10.2" in result.output
    monkeypatch.setattr(doctor, "installed_versions", lambda: {**HEALTHY, "spyx": "1.0.0"})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "fix: pip uninstall -y spyx" in result.output


def test_this_installation_is_seen():
    installed = doctor.installed_versions()
    assert installed["jax"] == sys.modules["jax"].__version__
    assert "spyx-torch" in installed
