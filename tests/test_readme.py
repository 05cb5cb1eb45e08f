"""The examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(ROOT / "parity" / "golden" / "lrnnx_s5lti_zoh_a" / "weights.safetensors"), tmp_path / "s5.pt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_example(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "torch" in names:
        names["torch"].testing.assert_close(names["y_t"], names["y"][:, -1])


def test_files_that_it_names_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
