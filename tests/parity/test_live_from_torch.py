"""`python -m parity.live_from_torch` and `live_training` without the references: what they say, what they find out."""

import sys

import pytest
import torch
from oracles import torch_models
from oracles.torch_modules import stand_in

from parity import live_from_torch, live_training
from parity.live_from_torch import Live, check


class Rows(torch_models.LRU):
    """Over rows; `factor` makes it another layer than its names say."""

    factor = 1.0

    def forward(self, x):
        return self.factor * torch.stack([super(Rows, self).forward(row) for row in x])


def lru(factor):
    module = stand_in("lrnnx.models.lti.lru:LRU", Rows)(3, 4)
    module.factor = factor
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "identical"), (1.001, "differs")])
def test_a_wrong_module_is_found_out(factor, verdict):
    row = check(Live("lru", lambda: lru(factor), (2, 7, 3)), seed=0)
    assert (row.case, row.subject, row.verdict) == ("lru", "compat_torch.LRU", verdict)


def test_a_module_that_is_not_converted_is_a_difference():
    row = check(Live("linear", lambda: torch.nn.Linear(3, 3), (2, 7, 3)), seed=0)
    assert row.verdict == "differs"
    assert "from_torch does not know" in row.note


@pytest.fixture
def absent(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("lrnnx", "mamba_ssm", "s5")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lrnnx", "s5"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(live_from_torch.importlib.util, "find_spec", lambda name: None)


def test_missing_references_are_rows(absent, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["live_from_torch"])
    assert live_from_torch.main() == 1
    printed = capsys.readouterr().out
    assert "0 identical, 0 differ" in printed
    for words in ("s5-pytorch==", "mamba-ssm==", "lrnnx=="):
        assert words in printed


def test_training_without_the_reference(absent, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["live_training", "-k", "lru"])
    assert live_training.main() == 2
    assert "lrnnx==" in capsys.readouterr().out
