"""Files without config.json: what shapes tell is inferred, the rest asked for by name, or assumed and logged."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import torch_models
from safetensors.numpy import load_file, save_file

import compat_torch
from compat_torch.architectures.lru_unet import LRUUnet
from compat_torch.checkpoint import detect, from_pretrained, load, load_into, save
from compat_torch.checkpoint.conversion import convert
from compat_torch.errors import CheckpointError, StateDictMismatchError

GOLDEN = Path(__file__).parents[3] / "parity" / "golden"
NOT_IN_SHAPES = {
    "extra", "bos_token_id", "eos_token_id", "pad_token_id", "chunk_size", "initializer_range", "vocab_size",
    "rescale_prenorm_residual", "w_init_variance_scale", "d_ssm",
}  # fmt: skip


def same_outputs(a, b):
    ids = jnp.asarray(np.random.default_rng().integers(0, 60, (2, 19)), jnp.int32)
    ours, theirs = (nnx.jit(lambda model, ids: model(ids).logits)(model, ids) for model in (a, b))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("hf_mamba2_tiny", {"n_groups": 2, "chunk_size": 16}),
        ("hf_mamba2_tiny_tied", {"n_groups": 1, "chunk_size": 32, "time_step_limit": (0.01, 0.2)}),
        ("hf_recurrent_gemma_tiny", {"attention_window_size": 16}),
    ],
)
def test_a_bare_file_is_the_model_of_its_folder(case, given):
    whole: Any = from_pretrained(GOLDEN / case / "hf")
    bare: Any = load(GOLDEN / case / "pytorch_model.bin", **given)
    for field in dataclasses.fields(whole.config):
        if field.name not in NOT_IN_SHAPES | {"block_types"}:
            assert getattr(bare.config, field.name) == getattr(whole.config, field.name), field.name
    same_outputs(bare, whole)


@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        ("hf_mamba2_tiny", "n_groups", "n_groups=...: the number of groups of heads"),
        ("hf_recurrent_gemma_tiny", "attention_window_size", "attention_window_size=...: how many steps attention"),
    ],
)
def test_what_shapes_do_not_tell_is_asked_for_by_name(case, name, message):
    path = GOLDEN / case / "pytorch_model.bin"
    assert set(detect(path).asks) == {name}
    with pytest.raises(CheckpointError, match=f"does not store these arguments; pass them to load:\n  {message}"):
        load(path)


def test_without_recurrent_blocks_the_heads_are_asked_for(tmp_path):
    weights = load_file(GOLDEN / "hf_recurrent_gemma_tiny" / "hf" / "model.safetensors")
    attention = {n.replace("layers.2", "layers.0"): v for n, v in weights.items() if "layers." not in n or ".2." in n}
    save_file(attention, tmp_path / "w.safetensors")
    assert set(detect(tmp_path / "w.safetensors").asks) == {"num_attention_heads", "attention_window_size"}
    model: Any = load(tmp_path / "w.safetensors", num_attention_heads=4, attention_window_size=16)
    assert (model.config.block_types, model.config.num_key_value_heads) == (("attention",), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_groups": 5}, "n_groups must be a divisor of"),
        ({"n_groups": -1}, "n_groups must be a divisor of"),
        ({"n_groups": "two" * 100}, "n_groups must be a divisor of"),
        ({"n_groups": 32}, "n_groups must divide num_heads"),
        ({"n_groups": 2, "time_step_limit": 3}, "time_step_limit must be two ascending numbers"),
    ],
)
def test_what_is_given_must_fit(given, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(GOLDEN / "hf_mamba2_tiny" / "pytorch_model.bin", **given)
    assert len(str(caught.value)) < 500


def test_what_shapes_or_a_configuration_tell_cannot_be_given():
    with pytest.raises(TypeError, match=r"unexpected arguments \['hidden_size'\]"):
        load(GOLDEN / "hf_mamba2_tiny" / "pytorch_model.bin", n_groups=2, hidden_size=32)
    with pytest.raises(TypeError, match=r"unexpected arguments \['n_groups'\]"):
        from_pretrained(GOLDEN / "hf_mamba2_tiny" / "hf", n_groups=2)


def test_what_is_assumed_is_said_and_can_be_given(caplog):
    path = GOLDEN / "hf_mamba2_tiny" / "pytorch_model.bin"
    with caplog.at_level(logging.INFO, "compat_torch"):
        default: Any = load(path, n_groups=2)
    assert "assumed: layer_norm_epsilon=1e-05, residual_in_fp32=True, time_step_limit=(0.0, inf)" in caplog.text
    assert default.config.time_step_limit == (0.0, float("inf"))
    given: Any = load(path, n_groups=2, time_step_limit=(0.0, 0.01), layer_norm_epsilon=1e-3)
    assert (given.config.time_step_limit, given.config.layer_norm_epsilon) == ((0.0, 0.01), 1e-3)
    assert "time_step_limit" not in detect(path, n_groups=2, time_step_limit=(0.0, 0.01)).assumed
    plain: Any = load(GOLDEN / "hf_mamba_tiny_random" / "pytorch_model.bin", format="hf.mamba", layer_norm_epsilon=1e-6)
    assert plain.config.layer_norm_epsilon == 1e-6


def test_channels_beside_the_recurrence(tmp_path):
    """Of state-spaces: d_ssm = 16 of 24 channels, D by channel, two groups of 8 states, 4 heads."""
    rng, prefix = np.random.default_rng(), "backbone.layers.0"
    shapes = {
        "mixer.in_proj.weight": (2 * 24 + 2 * 16 + 4, 12), "mixer.dt_bias": (4,),
        "mixer.conv1d.weight": (48, 1, 4), "mixer.conv1d.bias": (48,), "mixer.A_log": (4,),
        "mixer.D": (16,), "mixer.norm.weight": (16,), "mixer.out_proj.weight": (12, 24), "norm.weight": (12,),
    }  # fmt: skip
    shapes = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
    shapes |= {"backbone.embedding.weight": (9, 12), "backbone.norm_f.weight": (12,)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "w.safetensors")
    config = load(tmp_path / "w.safetensors", n_groups=2).config
    expected = {"d_ssm": 16, "D_has_hdim": True, "state_size": 8, "num_heads": 4, "head_dim": 4, "expand": 2}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.tie_word_embeddings


def test_convert_takes_what_a_bare_file_lacks(tmp_path):
    source = GOLDEN / "hf_mamba2_tiny" / "pytorch_model.bin"
    with pytest.raises(CheckpointError, match="n_groups"):
        convert(source, tmp_path / "out", to="hf")
    done = convert(source, tmp_path / "out", to="hf", verify=True, n_groups=2, chunk_size=16)
    assert done.difference is not None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_groups"] == 2
    same_outputs(from_pretrained(tmp_path / "out"), from_pretrained(GOLDEN / "hf_mamba2_tiny" / "hf"))


@pytest.mark.parametrize("value", ["yes", 1, None, [True]])
@pytest.mark.parametrize(
    ("case", "name", "with_head"),
    [
        ("hf_mamba_tiny_random/hf", "tie_word_embeddings", False),
        ("hf_mamba_tiny_random/hf", "tie_word_embeddings", True),
        ("hf_mamba2_tiny/hf", "tie_word_embeddings", True),
        ("hf_recurrent_gemma_tiny/hf", "tie_word_embeddings", True),
        ("lrnnx_lm_centaurus/save_pretrained", "tie_embeddings", True),
    ],
)
def test_ties_of_a_wrong_type_are_refused(tmp_path, case, name, with_head, value):
    shutil.copytree(GOLDEN / case, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, name: value}))
    if with_head:
        weights = dict(compat_torch.read_state_dict(next((tmp_path / "m").glob("*model.[sb]*"))))
        embedding = next(value for name, value in weights.items() if "embed" in name)
        weights["lm_head.weight"] = embedding + 1
        for file in (tmp_path / "m").glob("*model.[sb]*"):
            file.unlink()
        save_file({name: np.array(value) for name, value in weights.items()}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_.*embeddings must be (true or false|a bool)"):
        from_pretrained(tmp_path / "m")


def unet(**kwargs: Any) -> Any:
    # Eight channels: a LayerNorm of two is a step function of their difference, and float32 errors grow 300-fold.
    sizes = {"in_channels": 8, "out_channels": 1, "channels": [9, 10], "resample_factors": [3, 2], "reference": "paper"}
    return LRUUnet(**{**sizes, **kwargs}, rngs=nnx.Rngs(int(np.random.default_rng().integers(1 << 30))))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_unet_of_lrnnx(tmp_path, ending):
    oracle = torch_models.load(torch_models.Unet(8, 1, (9, 10), (3, 2), (1, 2)), unet().state_dict()).float()
    weights, path = oracle.state_dict(), tmp_path / f"w.{ending}"
    if ending == "pt":
        torch.save({"state_dict": {f"model.{name}": value for name, value in weights.items()}}, path)
    else:
        save_file({name: value.numpy() for name, value in weights.items()}, path)
    found = detect(path)
    assert (found.format, found.asks) == ("lrnnx.lru_unet", {"causal": (False, True)})
    with pytest.raises(CheckpointError, match=r"pass them to load:\n  causal=...: one of False, True"):
        load(path)
    model: Any = load(path, causal=True, reference="paper")
    sizes = (model.in_channels, model.out_channels, model.channels, model.resample_factors)
    assert sizes == (8, 1, (8, 9, 10), (3, 2))
    x = np.random.default_rng().standard_normal((2, 8, 11), np.float32)
    expected = oracle.double()(torch.from_numpy(x).double()).detach().numpy()
    y = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)
    save(model, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value.numpy())
    convert(path, tmp_path / "out.pt", to="lrnnx", verify=True, causal=True, reference="paper")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), dict(weights), atol=0, rtol=0)


@pytest.mark.parametrize("sizes", [{"out_channels": 2}, {"in_channels": 1, "channels": [3], "resample_factors": [2]}])
def test_widths_of_a_unet(tmp_path, sizes):
    model = unet(**sizes)
    save(model, tmp_path / "w.safetensors")
    again: Any = load(tmp_path / "w.safetensors", causal=True, reference="paper")
    assert (again.channels, again.out_channels) == (model.channels, model.out_channels)
    x = jnp.ones((1, model.in_channels, 7))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(run(again, x), run(model, x))


def test_a_unet_with_a_level_missing_or_of_another_width(tmp_path):
    weights = {name: np.array(value) for name, value in unet().state_dict().items()}
    save_file({n: v for n, v in weights.items() if not n.startswith("up_ssms.1.0")}, tmp_path / "w.safetensors")
    with pytest.raises(StateDictMismatchError, match=r"missing: up_ssms\.1\.0\.deconv\.weight"):
        load(tmp_path / "w.safetensors", causal=True)
    save_file(weights | {"up_ssms.0.1.1.norm.bias": np.ones(5, "f4")}, tmp_path / "w.safetensors")
    with pytest.raises(StateDictMismatchError, match=r"up_ssms\.0\.1\.1\.norm\.bias: expected float32\[9\]"):
        load(tmp_path / "w.safetensors", causal=True, reference="paper")


def test_a_unet_inside_a_module(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.denoise, self.out = unet(), nnx.Linear(1, 2, rngs=nnx.Rngs(0))

    net, weights = Net(), {f"denoise.{n}": np.array(v) for n, v in unet().state_dict().items()}
    weights |= {"out.weight": np.ones((2, 1), "f4"), "out.bias": np.zeros(2, "f4")}
    save_file(weights, tmp_path / "w.safetensors")
    assert load_into(net, tmp_path / "w.safetensors").complete
    for name, value in compat_torch.state_dict(net).items():
        np.testing.assert_array_equal(value, weights[name])
