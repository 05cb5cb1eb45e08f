"""What the wheel carries."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield {info.filename: info.file_size for info in archive.infolist()}, archive


def test_packages_markers_and_licences(wheel):
    names, archive = wheel
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"spyx", "compat_torch", "parity"}
    assert {"spyx/py.typed", "compat_torch/py.typed", "parity/py.typed"} <= names.keys()
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = archive.read(metadata).decode()
    assert text.count("License-File:") == 2
    assert "Requires-Dist: torch" in text
    assert not [line for line in text.splitlines() if line.startswith("Requires-Dist: torch") and "extra" not in line]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "spyx-parity" in archive.read(entry_points).decode()
    assert "compat-torch" in archive.read(entry_points).decode()


def test_the_smoke_subset_of_the_golden_data(wheel):
    names, _ = wheel
    golden = {name: size for name, size in names.items() if name.startswith("parity/golden/")}
    assert 1e6 < sum(golden.values()) < 2.5e6
    cases = {name.split("/")[2] for name in golden}
    assert {"lrnnx_s5lti_zoh_a", "lrnnx_lru_a", "lrnnx_mamba_mamba_a", "lrnnx_s4_ch2"} <= cases
    assert not [case for case in cases if case.startswith(("hf_", "lrnnx_lm_"))]
