"""Every format is written back bit for bit: names, axes, dtypes, ties, configuration."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

import compat_torch
from compat_torch import checkpoint
from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.architectures.lru_unet import LRUUnet
from compat_torch.architectures.mamba2_lm import Mamba2Config, Mamba2LMHeadModel
from compat_torch.architectures.mamba_lm import MambaConfig, MambaLMHeadModel
from compat_torch.checkpoint.conversion import convert
from compat_torch.models import ltv

GOLDEN = Path(__file__).parents[3] / "parity" / "golden"
LAYERS = ("lrnnx.models.", "models.s4.", "s5.", "lrnnx.architectures.classifier", "backbone of example.py")
QUICK = {
    "flaxS5_zoh_conj_bi", "lrnnx_centaurus_dws_b", "lrnnx_centaurus_full_a", "lrnnx_centaurus_neck_a",
    "lrnnx_centaurus_pointwise_b", "lrnnx_clf_mixed_mean_lengths", "lrnnx_lru_a", "lrnnx_mamba_zoh_b", "lrnnx_rglru_b",
    "lrnnx_s4_gate_ch2", "lrnnx_s4d_is_real", "lrnnx_s5lti_zoh_a", "lrnnx_s5ltv_zoh_conj", "lrnnx_s7_b",
    "s4repo_block_dplr_bidir", "s4repo_s4d_lr0_buffers", "s4repo_digits_trained", "s5pytorch_bidir", "s5pytorch_block",
}  # fmt: skip


def golden(wanted) -> list:
    cases = []
    for file in sorted(GOLDEN.glob("*/case.json")):
        if wanted(json.loads(file.read_text())["cls"]):
            name = file.parent.name
            cases.append(pytest.param(file.parent, marks=() if name in QUICK else pytest.mark.full, id=name))
    return cases


def assert_same(got: dict, want: dict) -> None:
    """Torch tensors of the same names, shapes, dtypes and bits."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        kind = torch.view_as_real(value).dtype if value.is_complex() else value.dtype
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[kind.itemsize]
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (got[name], value))
        assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits)), name


def load_case(folder: Path, path: Path) -> nnx.Module:
    """The layer of a case, with what its file does not say."""
    case = json.loads((folder / "case.json").read_text())
    kwargs, cls = dict(case["kwargs"]), case["cls"].rpartition(":")[2]
    asked = {"discretization", "conj_sym", "final_act", "pooling"}
    given = {key: kwargs[key] for key in asked & kwargs.keys()}
    if cls == "Classifier":
        layers = kwargs["lrnn_cls"]
        layers = [layers] * kwargs["n_layers"] if isinstance(layers[0], str) else layers
        given["lrnn_params"] = [
            {key: own[key] for key in own if key != "d_model"} | ({"discretization": "zoh"} if "amba" in name else {})
            for name, own in layers
        ]
        given["intermediate_pooling"] = "none"
    if "ltv.s5" in case["cls"]:
        given.setdefault("conj_sym", False)
    format = "lrnnx.lti.CentaurusFull" if cls == "CentaurusFull" else None
    if "final_act" in given and given["final_act"] in (None, "glu", "id"):
        del given["final_act"]
    return checkpoint.load(path, format=format, **given)


@pytest.mark.filterwarnings("ignore::compat_torch.errors.ReferenceDefectWarning")
@pytest.mark.parametrize("folder", golden(lambda cls: cls.startswith(LAYERS)))
def test_a_layer_comes_back_bit_for_bit(folder, tmp_path):
    for path in folder.glob("weights*.safetensors"):
        layer = load_case(folder, path)
        checkpoint.save(layer, tmp_path / path.name)
        assert_same(load_file(tmp_path / path.name), load_file(path))
        config, tensors = checkpoint.exported(layer)
        assert config is None
        assert dict(tensors).keys() == load_file(path).keys()


@pytest.mark.parametrize("name", ["weights.safetensors", "lightning.ckpt", "ckpt.pt"])
def test_a_trained_model_from_each_of_its_files(name, tmp_path):
    folder = GOLDEN / "s4repo_digits_trained"
    model = checkpoint.load(folder / name)
    checkpoint.save(model, tmp_path / "w.pt")
    assert_same(torch.load(tmp_path / "w.pt"), load_file(folder / "weights.safetensors"))


def unet(folder: Path) -> Path:
    model = LRUUnet(2, 1, [3, 5], [2, 2], rngs=nnx.Rngs(0))
    checkpoint.save(model, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def mamba2_of_state_spaces(folder: Path) -> Path:
    return convert(GOLDEN / "hf_mamba2_tiny" / "hf", folder / "mamba2", to="mamba_ssm").path


def mamba_layer(folder: Path) -> Path:
    weights = load_file(GOLDEN / "lrnnx_mamba_mamba_a" / "weights.safetensors")
    save_file({name: v for name, v in weights.items() if "dtA_proj" not in name}, folder / "mamba.safetensors")
    return folder / "mamba.safetensors"


SOURCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "hf.mamba": ("hf_mamba_tiny_random/hf", {}),
    "hf.mamba2": ("hf_mamba2_tiny/hf", {}),
    "hf.falcon_mamba": ("hf_falcon_mamba_tiny/hf", {}),
    "hf.recurrent_gemma": ("hf_recurrent_gemma_tiny/hf", {}),
    "mamba_ssm.mamba": ("hf_mamba_trained/mamba_ssm", {}),
    "mamba_ssm.mamba2": (mamba2_of_state_spaces, {}),
    "mamba_ssm.Mamba": (mamba_layer, {}),
    "lrnnx.lm": ("lrnnx_lm_s4_s4d/save_pretrained", {}),
    "lrnnx.classifier": ("lrnnx_clf_vocab", {"pooling": "last", "intermediate_pooling": "none"}),
    "lrnnx.lru_unet": (unet, {"causal": True}),
    "lrnnx.lti.S5": ("lrnnx_s5lti_zoh_a", {"discretization": "zoh"}),
    "lrnnx.lti.LRU": ("lrnnx_lru_a", {}),
    "lrnnx.lti.S4": ("lrnnx_s4_gate_ch2", {}),
    "lrnnx.lti.S4D": ("lrnnx_s4d_is_real", {}),
    "lrnnx.lti.CentaurusNeck": ("lrnnx_centaurus_neck_a", {}),
    "lrnnx.lti.CentaurusPWNeck": ("lrnnx_centaurus_pointwise_b", {}),
    "lrnnx.lti.CentaurusDWS": ("lrnnx_centaurus_dws_b", {"format": "lrnnx.lti.CentaurusDWS"}),
    "lrnnx.lti.CentaurusFull": ("lrnnx_centaurus_full_a", {"format": "lrnnx.lti.CentaurusFull"}),
    "lrnnx.ltv.Mamba": ("lrnnx_mamba_zoh_b", {"discretization": "zoh"}),
    "lrnnx.ltv.S5": ("lrnnx_s5ltv_zoh_conj", {"discretization": "zoh", "conj_sym": True}),
    "lrnnx.ltv.RGLRU": ("lrnnx_rglru_b", {}),
    "lrnnx.ltv.S7": ("lrnnx_s7_b", {}),
    "s4.S4Block": ("s4repo_block_dplr_bidir", {}),
    "s4.S4D": ("s4repo_s4d_t", {}),
    "s4.S4Model": ("s4repo_digits_trained", {}),
    "s5.S5SSM": ("flaxS5_zoh_conj_bi", {"discretization": "zoh", "conj_sym": True}),
    "s5_pytorch.S5": ("s5pytorch_bidir", {}),
    "s5_pytorch.S5Block": ("s5pytorch_block", {}),
}


@pytest.mark.filterwarnings("ignore::compat_torch.errors.ReferenceDefectWarning")
@pytest.mark.parametrize("format", checkpoint.FORMATS)
def test_convert_writes_every_format_back_bit_for_bit(format, tmp_path):
    place, kwargs = SOURCES[format]
    source = place(tmp_path) if callable(place) else GOLDEN / place
    if (source / "weights.safetensors").exists():
        source = source / "weights.safetensors"
    out = tmp_path / ("out" if source.is_dir() else "out.safetensors")
    done = convert(source, out, to=format, **kwargs)
    assert (done.source, done.target) == (format, format)
    assert_same(
        stored(out) if out.is_dir() else load_file(out), stored(source) if source.is_dir() else load_file(source)
    )


FOLDERS = [
    "hf_mamba_trained/hf", "hf_mamba_trained/hf_sharded", "hf_mamba_trained/mamba_ssm", "hf_mamba_tiny_random/hf",
    "hf_mamba_bf16/hf", "hf_mamba2_tiny/hf", "hf_mamba2_tiny_tied/hf", "hf_falcon_mamba_tiny/hf",
    "hf_recurrent_gemma_tiny/hf",
]  # fmt: skip


def stored(folder: Path) -> dict:
    """The tensors of a folder, read by torch and safetensors themselves."""
    tensors: dict = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return tensors


@pytest.mark.parametrize("name", FOLDERS)
def test_a_language_model_comes_back_bit_for_bit(name, tmp_path):
    source = GOLDEN / name
    format = checkpoint.detect(source).format
    model = checkpoint.from_pretrained(source)
    checkpoint.save_pretrained(model, tmp_path / "out", format=format, source=source)
    assert_same(stored(tmp_path / "out"), stored(source))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert (tmp_path / "out" / "generation_config.json").exists() == (source / "generation_config.json").exists()
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["format"] == format


@pytest.mark.parametrize(("source", "target"), [("hf", "mamba_ssm"), ("mamba_ssm", "hf")])
def test_one_reference_s_model_as_the_other_s(source, target, tmp_path):
    folder = GOLDEN / "hf_mamba_trained"
    model = checkpoint.from_pretrained(folder / source)
    checkpoint.save_pretrained(model, tmp_path / "out", format=target)
    assert_same(stored(tmp_path / "out"), stored(folder / target))
    got, want = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder / target))
    if target == "mamba_ssm":
        assert got == want
    else:
        assert got["architectures"] == ["MambaForCausalLM"]
        assert len(got.keys() & want.keys()) > 15
        assert {key: got[key] for key in got if key in want} == {key: want[key] for key in want if key in got}


LRNNX = [
    pytest.param(f"lrnnx_lm_{name}", marks=mark, id=name)
    for name, mark in (
        ("s4_s4d", ()), ("mamba_s7_mlp", ()), ("attn", pytest.mark.full), ("centaurus", pytest.mark.full),
        ("lru_mamba_s5", pytest.mark.full), ("rglru_s7_mlp_ln", pytest.mark.full),
    )
]  # fmt: skip


@pytest.mark.parametrize("name", LRNNX)
def test_a_folder_of_lrnnx_comes_back_bit_for_bit(name, tmp_path):
    source = GOLDEN / name / "save_pretrained"
    kwargs = json.loads((GOLDEN / name / "case.json").read_text())["kwargs"].get("mixer_kwargs") or {}
    model = LRNNLMHeadModel.from_pretrained(source, mixer_kwargs=kwargs)
    checkpoint.save_pretrained(model, tmp_path / "theirs", format="lrnnx.lm")
    assert_same(stored(tmp_path / "theirs"), stored(source))
    theirs = json.loads((source / "config.json").read_text())
    assert theirs.items() <= json.loads((tmp_path / "theirs" / "config.json").read_text()).items()

    model.save_pretrained(tmp_path / "ours")
    again = checkpoint.from_pretrained(tmp_path / "ours")
    assert type(again) is LRNNLMHeadModel
    assert again.config == model.config
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value)


COMMON = {"vocab_size": 21, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}


def mamba2_weights(d_model: int, inner: int, states: int, heads: int, D: int, width: int) -> dict[str, torch.Tensor]:
    """Random weights of two layers; `states` counts all groups, `width` channels of the inner ones are recurrent."""
    rng, conv = np.random.default_rng(0), width + 2 * states
    mixer = {
        "in_proj.weight": (2 * (inner - width) + width + conv + heads, d_model), "conv1d.weight": (conv, 1, 4),
        "conv1d.bias": (conv,), "dt_bias": (heads,), "A_log": (heads,), "D": (D,), "norm.weight": (width,),
        "out_proj.weight": (d_model, inner),
    }  # fmt: skip
    shapes = {"backbone.embedding.weight": (32, d_model), "backbone.norm_f.weight": (d_model,)}
    shapes["lm_head.weight"] = (32, d_model)
    for i in range(2):
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
    return {name: torch.tensor(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def test_mamba2_of_state_spaces(tmp_path):
    ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 4, "d_ssm": 16, "D_has_hdim": True, "ngroups": 2}
    ssm["dt_limit"] = [0.0, 0.5]
    config = {
        **COMMON, "d_model": 12, "d_intermediate": 0, "n_layer": 2, "ssm_cfg": ssm, "attn_layer_idx": [],
        "attn_cfg": {}, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    tensors = mamba2_weights(12, inner=24, states=2 * 8, heads=4, D=16, width=16)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    assert checkpoint.detect(tmp_path / "source").format == "mamba_ssm.mamba2"
    model: Any = checkpoint.from_pretrained(tmp_path / "source")
    assert model.config.time_step_limit == (0.0, 0.5)
    assert (model.config.num_heads, model.config.d_ssm, model.config.n_groups) == (4, 16, 2)
    checkpoint.save_pretrained(model, tmp_path / "out", format="mamba_ssm")
    assert_same(stored(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    with pytest.raises(ValueError, match=r"cannot be written as hf\.mamba2: D_has_hdim"):
        checkpoint.save_pretrained(model, tmp_path / "hf")


def test_mamba2_of_mistral(tmp_path):
    config = {**COMMON, "model_type": "mamba", "dim": 32, "n_layers": 2, "n_groups": 1, "tie_embeddings": False}
    config["pad_vocab_size_multiple"] = 16
    tensors = mamba2_weights(32, inner=64, states=128, heads=1, D=1, width=64)
    (tmp_path / "params.json").write_text(json.dumps(config))
    save_file({f"model.{name}": value for name, value in tensors.items()}, tmp_path / "consolidated.safetensors")
    found = checkpoint.detect(tmp_path)
    assert found.format == "mamba_ssm.mamba2"
    assert any("n_groups" in line for line in found.evidence)
    model: Any = checkpoint.from_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings
    checkpoint.save_pretrained(model, tmp_path / "out", format="mamba_ssm")
    assert_same(stored(tmp_path / "out"), tensors)
    assert checkpoint.detect(tmp_path / "out").arguments["config"].padded_vocab_size == 32


def test_settings_come_back_through_the_other_reference(tmp_path):
    model: Any = checkpoint.from_pretrained(GOLDEN / "hf_mamba_tiny_random" / "hf")
    checkpoint.save_pretrained(model, tmp_path / "a", format="mamba_ssm")
    again: Any = checkpoint.from_pretrained(tmp_path / "a")
    for name in (
        "vocab_size", "padded_vocab_size", "hidden_size", "state_size", "conv_kernel", "expand", "time_step_rank",
        "use_bias", "use_conv_bias", "tie_word_embeddings", "residual_in_fp32",
    ):  # fmt: skip
        assert getattr(again.config, name) == getattr(model.config, name), name
    checkpoint.save_pretrained(again, tmp_path / "b", format="hf")
    assert_same(stored(tmp_path / "b"), stored(GOLDEN / "hf_mamba_tiny_random" / "hf"))


def test_a_vocabulary_that_is_no_multiple(tmp_path):
    config = MambaConfig(vocab_size=17, hidden_size=4, num_hidden_layers=1)
    padded = MambaConfig(vocab_size=17, hidden_size=4, num_hidden_layers=1, pad_vocab_size_multiple=8)
    for given, multiple, rows in ((config, 1, 17), (padded, 8, 24)):
        model = nnx.eval_shape(lambda given=given: MambaLMHeadModel(given))
        theirs, hf = (dict(checkpoint.exported(model, name)[0] or {}) for name in ("mamba_ssm", "hf"))
        assert (theirs["vocab_size"], theirs["pad_vocab_size_multiple"], hf["vocab_size"]) == (17, multiple, rows)


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    config = MambaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, layer_norm_epsilon=1e-3)
    model = nnx.eval_shape(lambda: MambaLMHeadModel(config))
    with pytest.raises(ValueError, match=r"written as mamba_ssm\.mamba: layer_norm_epsilon = 0\.001"):
        checkpoint.exported(model, "mamba_ssm")
    with pytest.raises(ValueError, match=r"format='s4'; choose from 'hf\.mamba', 'mamba_ssm\.mamba'"):
        checkpoint.exported(model, "s4")
    layer = nnx.eval_shape(lambda: ltv.Mamba(4, discretization="zoh"))
    with pytest.raises(ValueError, match="its discretization is 'zoh', not 'mamba'"):
        checkpoint.save(layer, tmp_path / "w.safetensors", format="mamba_ssm.Mamba")
    with pytest.raises(ValueError, match=r"lrnnx\.ltv\.Mamba has no config\.json: use save"):
        checkpoint.save_pretrained(layer, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"no checkpoint format has the class Linear"):
        checkpoint.exported(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_of_mamba_ssm(tmp_path):
    weights = load_file(GOLDEN / "lrnnx_mamba_mamba_a" / "weights.safetensors")
    layer = checkpoint.load(GOLDEN / "lrnnx_mamba_mamba_a" / "weights.safetensors", discretization="mamba")
    checkpoint.save(layer, tmp_path / "w.safetensors", format="mamba_ssm.Mamba")
    assert_same(load_file(tmp_path / "w.safetensors"), {n: v for n, v in weights.items() if "dtA_proj" not in n})
    assert checkpoint.detect(tmp_path / "w.safetensors").format == "mamba_ssm.Mamba"
    again = checkpoint.load(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(compat_torch.state_dict(again)["dtA_proj.bias"], weights["dt_proj.bias"])


def test_existing_files_are_kept(tmp_path):
    layer = checkpoint.load(GOLDEN / "lrnnx_s7_a" / "weights.safetensors")
    checkpoint.save(layer, tmp_path / "w.safetensors")
    with pytest.raises(FileExistsError):
        checkpoint.save(layer, tmp_path / "w.safetensors")
    checkpoint.save(layer, tmp_path / "w.safetensors", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_dtype_of_the_configuration_follows_the_weights(tmp_path):
    model = checkpoint.from_pretrained(GOLDEN / "hf_mamba_bf16" / "hf", dtype=jnp.float32)
    config, tensors = checkpoint.exported(model)
    assert config is not None
    assert config["dtype"] == "float32"
    assert {value.dtype for _, value in tensors} == {np.dtype(np.float32)}


def test_formats_of_a_module():
    config = Mamba2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8, n_groups=1, state_size=2
    )
    model = nnx.eval_shape(lambda: Mamba2LMHeadModel(config))
    assert checkpoint.formats_of(model) == ["hf.mamba2", "mamba_ssm.mamba2"]
    assert checkpoint.formats_of(nnx.eval_shape(lambda: ltv.S7(2, 2))) == ["lrnnx.ltv.S7"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf_mamba_trained/mamba_ssm", "hf_mamba2_tiny_tied/hf", "hf_recurrent_gemma_tiny/hf"])
def test_transformers_reads_what_we_write(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = checkpoint.from_pretrained(GOLDEN / name)
    checkpoint.save_pretrained(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    ids = np.random.default_rng(0).integers(0, 50, (2, 7))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits
    np.testing.assert_allclose(model(jnp.asarray(ids)).logits, expected, atol=1e-4)
