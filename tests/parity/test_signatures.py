"""Every class of lrnnx is here with the reference's constructor arguments: names, order, defaults."""

import importlib
import inspect
import json
import sys

import pytest

from parity.live_signatures import ANY, CLASSES, FILE, REQUIRED, arguments, main

STORED = json.loads(FILE.read_text())
OTHERWISE = {
    "models.lti.s4d:S4D": {"layer_args": None},  # by name, then init_args
    "models.lti.s4:S4": {"layer_args": None},
    "architectures.lru_unet:LRUUnet": {"dtype": None},  # follows the input
    "layers.block:Block": {"mlp_cls": None, "norm_cls": None},  # None is nn.Identity, and LayerNorm
}
"""Our defaults where they are not the reference's; an argument for any others may have names."""


def ours(cls):
    module, name = cls.split(":")
    return getattr(importlib.import_module(f"compat_torch.{module}"), name)


@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_the_references(cls):
    found, other = arguments(ours(cls)), OTHERWISE.get(cls, {})
    named = [name for name, default in STORED[cls].items() if default != ANY]
    assert [name for name in found if name in named] == named
    assert list(found)[: len(named)] == named
    for name in named:
        assert found[name] == other.get(name, STORED[cls][name]), name
    if ANY in STORED[cls].values():
        assert ANY in found.values()


@pytest.mark.parametrize("cls", CLASSES)
def test_what_we_add_is_by_name_only(cls):
    make = ours(cls).__new__ if "__new__" in vars(ours(cls)) else ours(cls).__init__
    added = [p for name, p in list(inspect.signature(make).parameters.items())[1:] if name not in STORED[cls]]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in added), added


def test_the_stored_arguments_are_of_every_class():
    assert list(STORED) == list(CLASSES)
    assert STORED["models.ltv.mamba:Mamba"]["d_model"] == REQUIRED


def test_without_the_reference_nothing_is_compared(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lrnnx", None)
    assert main([]) == 2
    assert "the reference cannot be imported" in capsys.readouterr().out
