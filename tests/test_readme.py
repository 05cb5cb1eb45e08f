"""The examples of the README and of docs/ run as they stand."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}: {block.splitlines()[0]}")
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(ROOT / "parity" / "golden" / "lrnnx_s5lti_zoh_a" / "weights.safetensors"), tmp_path / "s5.pt")
    shutil.copytree(ROOT / "parity" / "golden" / "hf_mamba_trained" / "hf", tmp_path / "mamba")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("block", BLOCKS)
def test_example(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if {"torch", "y_t"} <= names.keys():
        names["torch"].testing.assert_close(names["y_t"], names["y"][:, -1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names_exist(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
