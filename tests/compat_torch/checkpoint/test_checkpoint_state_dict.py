"""Finding the state_dict in a checkpoint, its prefixes, and the objects beside it."""

import argparse
import functools
import logging
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compat_torch.checkpoint import Record, as_plain, read_state_dict
from compat_torch.checkpoint.source import open_source
from compat_torch.checkpoint.torch_zip import read_torch_zip
from compat_torch.errors import CheckpointError

WEIGHTS = {"A": torch.ones(3, 2), "sub.B": torch.zeros(2)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3},
        {"state_dict": prefixed("model."), "hyper_parameters": {"d": 1}, "loops": {"a": {}}},
        {"model": WEIGHTS, "acc": 90.5, "epoch": 7},
        {"model": prefixed("module."), "loss": torch.tensor(0.5)},
        {"model_state_dict": prefixed("_orig_mod.module."), "optimizer": {"state": {0: torch.ones(1)}}},
        {"epoch": 1, "model": {"state_dict": prefixed("ema.model.")}},
    ],
    ids=["bare", "state_dict", "lightning", "script", "ddp", "compiled", "nested"],
)
def test_found(tmp_path, content):
    torch.save(content, tmp_path / "w.ckpt")
    tensors = read_state_dict(tmp_path / "w.ckpt")
    assert list(tensors) == list(WEIGHTS)
    np.testing.assert_array_equal(tensors["A"], np.ones((3, 2)))


def test_prefixes_are_logged_and_only_taken_off_when_all_names_have_them(tmp_path, caplog):
    caplog.set_level(logging.INFO, "compat_torch")
    save_file(prefixed("module.model."), tmp_path / "w.safetensors")
    assert list(read_state_dict(tmp_path / "w.safetensors")) == sorted(WEIGHTS)
    assert "'module.model.'" in caplog.text
    save_file({**prefixed("model."), "head": torch.ones(1)}, tmp_path / "v.safetensors")
    assert set(read_state_dict(tmp_path / "v.safetensors")) == {"model.A", "model.sub.B", "head"}


@pytest.mark.parametrize("prefix", ["model.layers.0", "layers.0", "layers.0.", "state_dict.model.layers.0"])
def test_sub_tree(tmp_path, prefix):
    weights = prefixed("model.layers.0.") | {"model.layers.1.A": torch.ones(1)}
    torch.save({"state_dict": weights}, tmp_path / "w.ckpt")
    assert list(read_state_dict(tmp_path / "w.ckpt", prefix=prefix)) == list(WEIGHTS)


def test_prefix_chooses_between_wrappers(tmp_path):
    torch.save({"model": WEIGHTS, "ema": {"E": torch.ones(1)}}, tmp_path / "w.ckpt")
    assert list(read_state_dict(tmp_path / "w.ckpt", prefix="ema")) == ["E"]


def test_a_prefix_with_nothing_below_it(tmp_path):
    save_file(prefixed("layers.0."), tmp_path / "w.safetensors")
    message = r"nothing below prefix='layers\.1\.'.*layers\.0, layers\.0\.sub"
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "w.safetensors", prefix="layers.1")


class Net(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no state_dict"),
        ({"optimizer": {"lr": 1.0}, "epoch": 3}, "no state_dict.*'optimizer' .a dict"),
        ({"w": torch.ones(1), "note": "text"}, "not tensors: 'note' .a str"),
        ({"w": torch.ones(1), 3: torch.ones(1)}, "not tensors: '3'"),
        ({"w": torch.ones(2).to_sparse()}, "no state_dict.*_rebuild_sparse_tensor"),
        ({"v": torch.ones(2), "w": torch.ones(2).to_sparse()}, "not tensors.*_rebuild_sparse_tensor"),
        (torch.ones(3), "holds a tensor, not a state_dict"),
        ([torch.ones(3)], "holds a list"),
        (Net(2, 2), r"Net object, not a state_dict: save model\.state_dict"),
    ],
)
def test_no_usable_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(tmp_path / "w.pt")
    assert "w.pt" in str(caught.value)


def test_objects_beside_the_weights_become_records(tmp_path, caplog):
    content = {
        "state_dict": WEIGHTS,
        "hyper_parameters": {
            "args": argparse.Namespace(d_model=4, layer="s5"),
            "factory": functools.partial(torch.nn.Linear, 3, bias=False),
        },
    }
    torch.save(content, tmp_path / "w.ckpt")
    assert list(read_state_dict(tmp_path / "w.ckpt")) == list(WEIGHTS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "functools.partial" in caplog.text

    contents = read_torch_zip(open_source(tmp_path / "w.ckpt"))
    names = {"argparse.Namespace", "functools.partial", "torch.nn.modules.linear.Linear"}
    assert set(contents.replaced) == names
    plain = as_plain(contents.content)
    assert isinstance(plain, dict)
    assert plain["hyper_parameters"]["args"] == {"d_model": 4, "layer": "s5"}
    factory = plain["hyper_parameters"]["factory"]
    assert isinstance(factory, Record)
    assert factory.name == "functools.partial"


@pytest.fixture
def omegaconf(monkeypatch):
    """Classes with the names, and the pickled fields, of OmegaConf's."""
    made = {}
    for module, names in {
        "dictconfig": ["DictConfig"],
        "listconfig": ["ListConfig"],
        "nodes": ["AnyNode"],
    }.items():
        fake = types.ModuleType(f"omegaconf.{module}")
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        for name in names:
            made[name] = type(name, (), {"__module__": fake.__name__})
            setattr(fake, name, made[name])
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def node(name, **fields):
        instance = made[name]()
        vars(instance).update(fields, _metadata=object(), _parent=None)
        return instance

    return node


def test_omegaconf_becomes_plain(tmp_path, omegaconf):
    one, two, four = (omegaconf("AnyNode", _val=value) for value in (1, "two", 4))
    inner = omegaconf("ListConfig", _content=[one, two])
    config = omegaconf("DictConfig", _content={"d_model": four, "layers": inner, "none": None})
    inner._parent = config
    torch.save({"state_dict": WEIGHTS, "hyper_parameters": config}, tmp_path / "w.ckpt")
    content = read_torch_zip(open_source(tmp_path / "w.ckpt")).content
    assert isinstance(content, dict)
    assert as_plain(content["hyper_parameters"]) == {"d_model": 4, "layers": [1, "two"], "none": None}


class AttributeDict(dict):
    pass


def test_subclasses_of_containers(tmp_path):
    content = {"hyper_parameters": AttributeDict(d_model=4), "state_dict": WEIGHTS}
    torch.save(content, tmp_path / "w.ckpt")
    content = read_torch_zip(open_source(tmp_path / "w.ckpt")).content
    assert isinstance(content, dict)
    assert isinstance(content["hyper_parameters"], Record)
    assert as_plain(content["hyper_parameters"]) == {"d_model": 4}


def test_cycles_and_shared_parts():
    shared = [1]
    value: dict = {"a": shared, "b": (shared, shared)}
    value["self"] = value
    plain = as_plain(value)
    assert isinstance(plain, dict)
    assert plain["self"] is plain
    assert plain["a"] is plain["b"][0]
