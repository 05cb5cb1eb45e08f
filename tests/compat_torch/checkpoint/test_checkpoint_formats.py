"""`checkpoint.detect` on checkpoints of every reference, S4 before version 4, and what is refused."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import erf

import compat_torch
from compat_torch import checkpoint
from compat_torch.errors import CheckpointError, StateDictMismatchError, UnknownFormatError

GOLDEN = Path(__file__).parents[3] / "parity" / "golden"
FORMAT_OF = {
    "LRNNLMHeadModel": "lrnnx.lm",
    "Classifier": "lrnnx.classifier",
    "models.s4.s4:S4Block": "s4.S4Block",
    "models.s4.s4d:S4D": "s4.S4D",
    "s5.s5_model:S5": "s5_pytorch.S5",
    "s5.s5_model:S5Block": "s5_pytorch.S5Block",
    "s5.ssm:S5SSM": "s5.S5SSM",
    "S4D backbone": "s4.S4Model",
}
ASKED = {"pooling": "last", "intermediate_pooling": "none", "conj_sym": False}
QUICK = {
    "flaxS5_zoh_conj_bi", "flaxS5_zoh_full_bi", "lrnnx_centaurus_dws_a", "lrnnx_centaurus_full_a",
    "lrnnx_centaurus_neck_b", "lrnnx_centaurus_pointwise_a", "lrnnx_clf_mixed_mean_lengths", "lrnnx_clf_vocab",
    "lrnnx_lru_a", "lrnnx_mamba_zoh_b", "lrnnx_rglru_b", "lrnnx_s4_gate_ch2", "lrnnx_s4_rank2_legt",
    "lrnnx_s4d_gate3_ch2", "lrnnx_s4d_is_real", "lrnnx_s4d_n_ssm2", "lrnnx_s5lti_zoh_a", "lrnnx_s5ltv_zoh_conj",
    "lrnnx_s7_b", "s4repo_block_diag_real", "s4repo_block_dplr_bidir", "s4repo_block_diag_act", "s4repo_s4d_nt",
    "s4repo_digits_trained", "s5pytorch_bidir", "s5pytorch_block",
}  # fmt: skip


def golden_cases():
    for folder in sorted(GOLDEN.iterdir()):
        if (folder / "weights.safetensors").exists() and "lrnnx_lm" not in folder.name:
            yield pytest.param(folder, marks=() if folder.name in QUICK else pytest.mark.full, id=folder.name)


def expected_format(cls: str) -> str:
    if cls.startswith("lrnnx.models."):
        family, _, rest = cls.removeprefix("lrnnx.models.").partition(".")
        return f"lrnnx.{family}.{rest.partition(':')[2]}"
    if "example.py" in cls:
        return "s4.S4Model"
    return FORMAT_OF.get(cls) or FORMAT_OF[cls.rpartition(":")[2]]


def arguments_of(case: dict) -> dict:
    """What a caller knows of a case and the file does not say."""
    kwargs = dict(case["kwargs"])
    if isinstance(layers := kwargs.pop("lrnn_cls", None), list):
        layers = [layers] * kwargs["n_layers"] if isinstance(layers[0], str) else layers
        given = [{"discretization": "mamba", **own} if "mamba" in name else own for name, own in layers]
        kwargs["lrnn_params"] = [{key: own[key] for key in own if key != "d_model"} for own in given]
    if "vocab_size" in kwargs:
        del kwargs["input_dim"]
    return {**ASKED, **kwargs}


@pytest.mark.parametrize("folder", list(golden_cases()))
def test_the_format_and_arguments_of_every_reference(folder):
    case = json.loads((folder / "case.json").read_text())
    name, kwargs = expected_format(case["cls"]), arguments_of(case)
    path = folder / "weights.safetensors"
    given = {key: kwargs[key] for key in ("conj_sym", "lrnn_params", "final_act") if key in kwargs}
    found = checkpoint.detect(path, format=name if "CentaurusFull" in name else None, **given)
    assert found.format == name
    assert any("tensors: " in line for line in found.evidence)
    for key, value in found.arguments.items():
        if key in kwargs and key not in ("lrnn_params", "num_classes"):
            assert kwargs[key] == value, key
    assert set(found.asks) <= kwargs.keys()
    sizes = {"d_model", "d_state", "H", "P", "width", "state_width", "dim", "state_dim", "channels", "n_ssm", "rank"}
    sizes |= {"bottleneck", "gate", "d_conv", "expand", "dt_rank", "bias", "conv_bias", "bidirectional", "bidir"}
    sizes |= {"is_real", "n_layers", "d_input", "d_output", "input_dim", "vocab_size", "sub_state_dim", "mode"}
    unused = {"rank"} if "S4D" in name or found.arguments.get("mode") == "diag" else {"input_dim"}
    if name == "lrnnx.classifier":
        sizes -= {"d_state"}
    assert (sizes & case["kwargs"].keys()) - unused <= found.arguments.keys() | {"dt_rank"}


@pytest.mark.parametrize(
    ("folder", "name", "evidence"),
    [
        ("hf_mamba_trained/hf", "hf.mamba", "model_type 'mamba'"),
        ("hf_mamba_trained/hf_sharded", "hf.mamba", "model_type 'mamba'"),
        ("hf_mamba_trained/mamba_ssm", "mamba_ssm.mamba", "ssm_cfg of Mamba1"),
        ("hf_mamba2_tiny/hf", "hf.mamba2", "model_type 'mamba2'"),
        ("hf_falcon_mamba_tiny/hf", "hf.falcon_mamba", "model_type 'falcon_mamba'"),
        ("hf_recurrent_gemma_tiny/hf", "hf.recurrent_gemma", "model_type 'recurrent_gemma'"),
        ("lrnnx_lm_centaurus/save_pretrained", "lrnnx.lm", "mixer_types"),
    ],
)
def test_folders(folder, name, evidence):
    found = checkpoint.detect(GOLDEN / folder)
    assert found.format == name
    assert any(evidence in line for line in found.evidence)
    assert found.asks == {}
    assert found.config == json.loads((GOLDEN / folder / "config.json").read_text())


def test_the_folder_of_a_file_says_what_it_is():
    found = checkpoint.detect(GOLDEN / "hf_falcon_mamba_tiny" / "hf" / "model.safetensors")
    assert found.format == "hf.falcon_mamba"
    with pytest.raises(CheckpointError, match=r"several formats.*'hf\.mamba', 'hf\.falcon_mamba'"):
        checkpoint.detect(GOLDEN / "hf_falcon_mamba_tiny" / "pytorch_model.bin")
    assert set(checkpoint.detect(GOLDEN / "hf_mamba2_tiny" / "pytorch_model.bin").asks) == {"n_groups"}


def test_a_configuration_is_inferred_from_a_bare_file():
    config = checkpoint.detect(GOLDEN / "hf_mamba_tiny_random" / "pytorch_model.bin", format="hf.mamba").arguments[
        "config"
    ]
    stated = json.loads((GOLDEN / "hf_mamba_tiny_random" / "hf" / "config.json").read_text())
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "time_step_rank"):
        assert getattr(config, name) == stated[name]
    for name in ("intermediate_size", "use_bias", "use_conv_bias", "tie_word_embeddings"):
        assert getattr(config, name) == stated[name]


def test_what_the_layers_of_a_language_model_lack_is_asked_for():
    found = checkpoint.detect(GOLDEN / "lrnnx_lm_lru_mamba_s5" / "weights.safetensors")
    wanted = {"mixer_kwargs={'Mamba': {'discretization': ...}}", "mixer_kwargs={'S5': {'discretization': ...}}"}
    assert set(found.asks) == wanted
    assert found.arguments["mixer_kwargs"]["Mamba"]["d_conv"] == 4
    found = checkpoint.detect(GOLDEN / "lrnnx_lm_attn" / "weights.safetensors")
    assert set(found.asks) == {"mixer_kwargs={'attn': {'num_heads': ...}}"}
    with pytest.raises(CheckpointError, match=r"mixer_kwargs=\{'attn': \{'num_heads': ...\}\}: the number of heads"):
        checkpoint.load(GOLDEN / "lrnnx_lm_attn" / "weights.safetensors")


def test_what_is_assumed_is_said(caplog):
    caplog.set_level(logging.INFO, "compat_torch")
    path = GOLDEN / "lrnnx_s4d_default" / "weights.safetensors"
    assert checkpoint.detect(path).assumed["disc"] == "zoh"
    assert "disc" not in checkpoint.detect(path, disc="bilinear").assumed
    checkpoint.load(path, disc="bilinear")
    assert "assumed: transposed=True" in caplog.text


def test_hyper_parameters_fill_in_what_the_tensors_lack(tmp_path):
    found = checkpoint.detect(GOLDEN / "s4repo_digits_trained" / "lightning.ckpt")
    assert found.assumed == {}
    assert (found.arguments["prenorm"], found.arguments["dropout"]) == (False, 0.1)
    assert "hyper_parameters give dropout, prenorm" in found.evidence
    weights = torch.load(GOLDEN / "s4repo_digits_trained" / "ckpt.pt", weights_only=False)["model"]
    hyper = {"model": {"prenorm": True, "dropout": object}, "n_layers": 9, "lr": 0.0, "precision": "low"}
    torch.save({"state_dict": weights, "hyper_parameters": hyper}, tmp_path / "w.ckpt")
    found = checkpoint.detect(tmp_path / "w.ckpt", dropout=0.5)
    assert (found.arguments["prenorm"], found.arguments["n_layers"], found.arguments["dropout"]) == (True, 2, 0.5)
    assert found.arguments.keys() == {"prenorm", "dropout", "d_input", "d_output", "d_model", "d_state", "n_layers"}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("s4repo_digits_trained/lightning.ckpt", {}),
        ("flaxS5_zoh_conj_bi/weights.safetensors", {"discretization": "zoh", "conj_sym": True}),
        ("lrnnx_clf_vocab/weights.safetensors", {"pooling": "mean", "intermediate_pooling": "none"}),
        pytest.param("s5pytorch_bidir/weights.pt", {}, marks=pytest.mark.full),
        pytest.param("lrnnx_s4_gate2/weights.safetensors", {"transposed": False, "l_max": 17}, marks=pytest.mark.full),
        pytest.param("hf_mamba2_tiny/hf", {}, marks=pytest.mark.full),
        pytest.param("hf_recurrent_gemma_tiny/hf", {}, marks=pytest.mark.full),
    ],
)
def test_what_is_loaded_computes_what_the_reference_did(name, kwargs):
    io = load_file(GOLDEN / name.partition("/")[0] / "io.safetensors")
    model: Any = checkpoint.load(GOLDEN / name, **kwargs)
    y = model(jnp.asarray(io["input_ids"] if "input_ids" in io else io["x"]))
    y = y[0] if isinstance(y, tuple) else y
    expected = io["logits"] if "logits" in io else io["y"]
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=1e-5)


def test_modes_that_shapes_do_not_tell_apart(tmp_path):
    path = GOLDEN / "lrnnx_centaurus_full_a" / "weights.safetensors"
    message = r"'lrnnx\.lti\.CentaurusDWS' \(mode 'dws'\), 'lrnnx\.lti\.CentaurusFull' \(mode 'full'\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.detect(path)
    assert checkpoint.detect(path, format="lrnnx.lti.CentaurusDWS").arguments["d_model"] == 16
    with pytest.raises(CheckpointError, match=r"not of format lrnnx\.lti\.CentaurusFull: N = 5 is not a square"):
        checkpoint.detect(GOLDEN / "lrnnx_centaurus_dws_a" / "weights.safetensors", format="lrnnx.lti.CentaurusFull")


CONFIG = {"d_model": 16, "n_layer": 2, "vocab_size": 56, "ssm_cfg": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer 'Mamba3', which is not supported"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]: a hybrid with attention layers"),
        ({"d_intermediate": 64}, "d_intermediate = 64: a hybrid with MLP layers"),
        ({"rms_norm": False}, "LayerNorm is not supported"),
        (
            {"model_type": "llama"},
            "'llama' is not supported; supported are mamba, mamba2, falcon_mamba, rec",
        ),
    ],
)
def test_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    save_file({"backbone.embedding.weight": np.zeros((56, 16), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 97}, "says hidden_size = 97, the tensors say 96"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers = 1000000000, the tensors say 3"),
        ({"state_size": "many"}, "state_size must be"),
        ({"state_size": 15}, "expected float32\\[192, 15\\], got float32\\[192, 16\\]"),
        ({"use_bias": True}, "missing: .*in_proj.bias"),
        ({"hidden_size": None}, "says hidden_size = None"),
    ],
)
def test_configurations_that_contradict_the_tensors(tmp_path, change, message):
    source = GOLDEN / "hf_mamba_trained" / "hf"
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "says n_layer = 3, the tensors say 2"),
        ({"mixer_types": ["LRU", "Centaurus"]}, "no layer of lrnnx of width 16"),
        ({"mixer_types": 3}, "do not make a lrnnx.lm"),
        ({"mixer_kwargs": [1]}, "do not make a lrnnx.lm"),
        ({"d_state": 10**12}, "says d_state = 1000000000000"),
        ({"surprise": 1}, "config.json has surprise, which lrnnx.lm does not know"),
        ({"vocab_size": -1}, "config.json does not make a lrnnx.lm: .*vocab_size"),
    ],
)
def test_configurations_of_lrnnx_that_do_not_fit(tmp_path, change, message):
    source = GOLDEN / "lrnnx_lm_centaurus"
    config = json.loads((source / "save_pretrained" / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "save_pretrained" / "pytorch_model.bin", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.from_pretrained(tmp_path)


def test_adapters_are_refused(tmp_path):
    save_file({"base.q.lora_A.weight": np.zeros((2, 3), np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="LoRA adapters"):
        checkpoint.detect(tmp_path / "w.safetensors")


def test_where_to_look_for_a_model(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*not a repository"):
        checkpoint.from_pretrained(tmp_path / "none")
    save_file({"A": np.zeros(2, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"is a file: use load"):
        checkpoint.from_pretrained(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="revision='main' is for repositories"):
        checkpoint.from_pretrained(tmp_path, revision="main")
    asked = []

    def fetch(*arguments):
        asked.append(arguments)
        return GOLDEN / "hf_mamba_tiny_random" / "hf"

    monkeypatch.setattr("compat_torch.checkpoint.hub.fetch", fetch)
    model = checkpoint.from_pretrained("someone/mamba", revision="v1")
    assert asked == [("someone/mamba", "v1")]
    assert type(model).__name__ == "MambaLMHeadModel"


def test_a_head_that_differs_is_untied(tmp_path):
    source = GOLDEN / "hf_mamba_trained" / "mamba_ssm"
    weights = torch.load(source / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    state = compat_torch.state_dict(checkpoint.from_pretrained(tmp_path))
    np.testing.assert_array_equal(state["lm_head.weight"], weights["lm_head.weight"].numpy() + 1)
    np.testing.assert_array_equal(state["backbone.embedding.weight"], weights["lm_head.weight"].numpy())


def test_copies_of_s4_tensors_must_be_equal(tmp_path):
    weights = load_file(GOLDEN / "lrnnx_s4d_default" / "weights.safetensors")
    for kept in (lambda name: not name.startswith("layer."), lambda name: f"layer.kernel.{name}" not in weights):
        save_file({name: value for name, value in weights.items() if kept(name)}, tmp_path / "one.safetensors")
        state = compat_torch.state_dict(checkpoint.load(tmp_path / "one.safetensors"))
        assert state.keys() == weights.keys()
        np.testing.assert_array_equal(state["layer.kernel.C"], weights["C"])
    save_file(weights | {"layer.kernel.C": weights["C"] + 1}, tmp_path / "two.safetensors")
    with pytest.raises(StateDictMismatchError, match=r"layer\.kernel\.C and C are one parameter"):
        checkpoint.load(tmp_path / "two.safetensors")


def version_3(weights: dict, layer: str = "") -> dict:
    """The names and values that version 3 of state-spaces/s4 had."""
    names = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag", "l_kernel": "L"}
    result = {}
    for name, value in weights.items():
        leaf = name.rpartition(".")[2]
        if name.startswith("layer.kernel."):
            value = {"inv_dt": np.squeeze(value), "A_imag": -value}.get(leaf, value)
            name = f"kernel.kernel.{names.get(leaf, leaf)}"
        result[layer + name.removeprefix("layer.")] = value.copy()
    return result


@pytest.mark.parametrize("case", ["s4repo_block_dplr_default", "s4repo_block_diag_default"])
def test_version_3_of_s4_is_converted(tmp_path, case, caplog):
    caplog.set_level(logging.INFO, "compat_torch")
    weights = load_file(GOLDEN / case / "weights.safetensors")
    save_file(version_3(weights), tmp_path / "w.safetensors")
    model = checkpoint.load(tmp_path / "w.safetensors")
    for name, value in compat_torch.state_dict(model).items():
        np.testing.assert_array_equal(value, weights[name])
    assert "converted 1 S4 layers of an older version" in caplog.text

    inside = version_3(weights, "layers.3.layer.") | {"encoder.weight": np.zeros((2, 2), np.float32)}
    save_file({f"model.{name}": value for name, value in inside.items()}, tmp_path / "m.safetensors")
    with pytest.raises(UnknownFormatError, match=r"prefix='layers\.3\.layer'\): it looks like s4\.S4Block"):
        checkpoint.load(tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors", prefix="model.layers.3.layer")
    np.testing.assert_array_equal(compat_torch.state_dict(again)["layer.kernel.A_imag"], weights["layer.kernel.A_imag"])


def test_version_3_computes_what_its_names_say(tmp_path):
    rng = np.random.default_rng(5)
    H, n, L = 3, 4, 11
    old = {
        "kernel.kernel.log_dt": rng.uniform(-4, -2, H),
        "kernel.kernel.log_w_real": rng.normal(size=(H, n)) * 0.3,
        "kernel.kernel.w_imag": rng.uniform(0.5, 6, (H, n)),
        "kernel.kernel.B": rng.normal(size=(1, H, n, 2)),
        "kernel.kernel.C": rng.normal(size=(1, H, n, 2)),
        "D": rng.normal(size=(1, H)),
        "output_linear.0.weight": rng.normal(size=(2 * H, H)),
        "output_linear.0.bias": rng.normal(size=2 * H),
    }
    save_file({name: value.astype(np.float32) for name, value in old.items()}, tmp_path / "w.safetensors")
    x = rng.normal(size=(2, H, L)).astype(np.float32)

    dt = np.exp(old["kernel.kernel.log_dt"])[:, None]
    A = -np.exp(old["kernel.kernel.log_w_real"]) + 1j * old["kernel.kernel.w_imag"]
    B, C = (old[f"kernel.kernel.{name}"][0] @ np.array([1, 1j]) for name in "BC")
    modes = np.exp(dt * A)[..., None] ** np.arange(L)
    kernel = 2 * np.einsum("hn,hnl->hl", C * B * (np.exp(dt * A) - 1) / A, modes).real
    y = np.stack([[np.convolve(row[h], kernel[h])[:L] for h in range(H)] for row in x]) + old["D"].T * x
    y = y * (1 + erf(y / np.sqrt(2))) / 2
    out = np.einsum("oh,bhl->bol", old["output_linear.0.weight"], y) + old["output_linear.0.bias"][:, None]
    expected = out[:, :H] / (1 + np.exp(-out[:, H:]))

    model: Any = checkpoint.load(tmp_path / "w.safetensors")
    np.testing.assert_allclose(model(jnp.asarray(x))[0], expected, atol=2e-5)


def test_old_and_new_names_at_once(tmp_path):
    weights = load_file(GOLDEN / "s4repo_block_diag_default" / "weights.safetensors")
    both = version_3(weights) | {"layer.kernel.A_imag": weights["layer.kernel.A_imag"]}
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("two tensors for layer.kernel.A_imag")):
        checkpoint.load(tmp_path / "w.safetensors")


def test_absurd_indices_do_not_make_endless_lists(tmp_path):
    name = "backbone.layers.999999.mixer.A_log"
    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "w.safetensors", format="mamba_ssm.mamba")
    assert len(str(caught.value)) < 4000
