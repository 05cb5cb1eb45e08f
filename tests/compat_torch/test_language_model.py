"""compat_torch.architectures.language_model: prompts and steps, padding, folders, training, errors."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.errors import CheckpointError, StateDictMismatchError
from compat_torch.layers import GatedMLP

GOLDEN = Path(__file__).parents[2] / "parity" / "golden"
KWARGS = {"S5": {"discretization": "zoh"}, "Centaurus": {"sub_state_dim": 2}, "attn": {"num_heads": 2, "causal": True}}
MODELS = {
    "lti": ("LRU", "S5", "Centaurus"),
    "s4": ("S4D", "S4"),
    "ltv": ("Mamba", "RGLRU", "S7"),
    "attention": ("LRU", "attn"),
}

FAMILIES = [
    pytest.param(mixers, id=name, marks=[pytest.mark.full] if name in ("lti", "s4") else [])
    for name, mixers in MODELS.items()
]


def make(mixers=("LRU", "Mamba"), seed=0, **kwargs):
    extra = {name: value for name, value in KWARGS.items() if name in mixers}
    sizes = {"d_model": 4, "d_state": 4, "n_layer": len(mixers), "vocab_size": 10, "mixer_types": list(mixers)}
    model = LRNNLMHeadModel(**{**sizes, "mixer_kwargs": extra, "rngs": nnx.Rngs(seed), **kwargs})
    model.eval()
    return model


def tokens(*shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 10)


@pytest.mark.parametrize("mixers", FAMILIES)
def test_prompts_in_pieces_and_steps_are_the_whole(mixers):
    model, ids = make(mixers, d_intermediate=3), tokens(2, 7)
    whole = model(ids).logits
    assert whole.shape == (2, 7, 16)
    cache = model.allocate_inference_cache(2, 7)
    first, cache = model.prefill(ids[:, :3], cache)
    second, cache = model.prefill(ids[:, 3:5], cache)
    kept, logits = jax.tree.map(np.array, cache), [first.logits, second.logits]
    step = nnx.jit(lambda model, ids, cache: model.step(ids, cache))
    for t in (5, 6):
        out, cache = step(model, ids[:, t : t + 1], cache)
        logits.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, atol=2e-6)
    assert jax.tree.structure(kept) == jax.tree.structure(cache)
    np.testing.assert_allclose(model(ids, num_last_tokens=2).logits, whole[:, -2:], atol=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("mixers", FAMILIES)
def test_padding_changes_nothing(mixers):
    model, ids, lengths = make(mixers), tokens(3, 6), jnp.array([6, 2, 0])
    out = model(ids, lengths=lengths).logits
    other = model(jnp.where(jnp.arange(6) < lengths[:, None], ids, 9), lengths=lengths).logits
    np.testing.assert_array_equal(out, other)
    for row, n in enumerate([6, 2]):
        np.testing.assert_allclose(out[row, :n], model(ids[row : row + 1, :n]).logits[0], atol=2e-6)
        np.testing.assert_array_equal(out[row, n:], 0)
    (after, cache) = model.prefill(ids, model.allocate_inference_cache(3, 8), lengths=lengths)
    np.testing.assert_allclose(after.logits, out, atol=2e-6)
    (further, _) = model.step(ids[:, :1], cache)
    alone = model(jnp.concatenate([ids[1:2, :2], ids[1:2, :1]], 1)).logits
    np.testing.assert_allclose(further.logits[1, 0], alone[0, -1], atol=2e-6)


def test_attention_that_is_not_causal_has_no_step():
    model = make(("attn", "LRU"), mixer_kwargs={"attn": {"num_heads": 2}})
    with pytest.raises(ValueError, match="causal=False sees the whole sequence"):
        model.allocate_inference_cache(1, 4)
    ids = tokens(1, 5)
    changed = ids.at[0, -1].add(1) % 10
    assert not np.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])
    paper = make(("attn", "LRU"), mixer_kwargs={"attn": {"num_heads": 2}}, reference="paper")
    np.testing.assert_allclose(paper(ids).logits[:, 0], paper(changed).logits[:, 0], atol=1e-6)
    paper.allocate_inference_cache(1, 4)


def test_integration_timesteps_reach_the_mixers_that_vary():
    model, ids, dt = make(), tokens(2, 5), jnp.full((2, 5), 0.5)
    whole = model(ids, integration_timesteps=dt).logits
    assert not np.allclose(whole, model(ids).logits)
    cache, logits = model.allocate_inference_cache(2, 5), []
    for t in range(5):
        out, cache = model.step(ids[:, t : t + 1], cache, dt[:, t])
        logits.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, atol=2e-6)
    with pytest.raises(ValueError, match="needs a mixer with an event mode"):
        make(("LRU",))(ids, integration_timesteps=dt)


def test_integration_timesteps_pass_by_the_mixers_without_an_event_mode():
    model, ids, dt = make(("Mamba", "S7", "LRU")), tokens(2, 4), jnp.full((2, 4), 0.5)
    whole = model(ids, integration_timesteps=dt).logits
    first, cache = model.prefill(ids[:, :3], model.allocate_inference_cache(2, 4), dt[:, :3])
    last, _ = model.step(ids[:, 3:], cache, dt[:, 3:])
    np.testing.assert_allclose(jnp.concatenate([first.logits, last.logits], 1), whole, atol=2e-6)
    assert not np.allclose(whole, model(ids).logits)
    with pytest.raises(ValueError, match=r"event mode \(Mamba\), the mixers are \('S7', 'LRU'\)"):
        make(("S7", "LRU"))(ids, integration_timesteps=dt)


def test_a_tied_head_is_the_embedding():
    tied, free = make(), make(tie_embeddings=False)
    weights = tied.state_dict()
    assert tied.lm_head.weight is tied.backbone.embedding.embedding
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["backbone.embedding.weight"])
    assert free.state_dict()["lm_head.weight"].shape == (16, 4)
    free.load_state_dict({**weights})
    np.testing.assert_allclose(free(tokens(1, 4)).logits, tied(tokens(1, 4)).logits, atol=1e-6)
    with pytest.raises(StateDictMismatchError, match="are one parameter"):
        tied.load_state_dict({**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    free.tie_weights()
    assert free.config["tie_embeddings"]


def test_a_saved_folder_loses_nothing(tmp_path):
    mixers = ("S5", "Mamba", "S4D")
    extra = {
        "S5": {"discretization": "dirac", "conj_sym": True},
        "Mamba": {"d_conv": 2, "dtype": jnp.float32},
        "S4D": {"channels": 2},
    }
    model = make(
        mixers, mixer_kwargs=extra, d_intermediate=3, rms_norm=False, residual_in_fp32=True, pad_vocab_size_multiple=4
    )
    model.save_pretrained(tmp_path / "model")
    again = LRNNLMHeadModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    np.testing.assert_array_equal(again(tokens(2, 5)).logits, model(tokens(2, 5)).logits)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "tie_embeddings": False},
        {"dtype": "bfloat16", "param_dtype": jnp.float32, "residual_in_fp32": True},
        {"precision": jax.lax.Precision.DEFAULT, "reference": "paper", "norm_epsilon": 1e-3},
        {"initializer_cfg": {"initializer_range": 0.5}, "fused_add_norm": False, "vocab_size": 8},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_saved_folder_keeps_dtypes_ties_and_every_argument(arguments, tmp_path):
    model = make(**arguments)
    model.save_pretrained(tmp_path / "model")
    again = LRNNLMHeadModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert type(again.lm_head) is type(model.lm_head)
    weights, loaded = model.state_dict(), again.state_dict()
    assert {name: value.dtype for name, value in loaded.items()} == {n: v.dtype for n, v in weights.items()}
    ids = tokens(2, 5) % model.vocab_size
    logits = model(ids).logits
    assert again(ids).logits.dtype == logits.dtype
    assert np.isfinite(np.asarray(logits, np.float32)).all()
    np.testing.assert_array_equal(again(ids).logits, logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_asked_for_when_loading_is_that_of_weights_and_activations(dtype, tmp_path):
    make(dtype=jnp.bfloat16).save_pretrained(tmp_path / "model")
    model = LRNNLMHeadModel.from_pretrained(tmp_path / "model", dtype=dtype)
    assert model(tokens(2, 5)).logits.dtype == dtype
    dtypes = {value.dtype for name, value in model.state_dict().items() if name.endswith("out_proj.weight")}
    assert dtypes == {jnp.dtype(dtype)}
    assert "dtype" not in model.config


def test_an_mlp_of_ones_own_is_asked_for_when_loading(tmp_path):
    mlp = partial(GatedMLP, activation=jnp.tanh)
    model = make(d_intermediate=4, mlp_cls=mlp)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"config\.json has its name only: pass mlp_cls to from_pretrained"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "model")
    again = LRNNLMHeadModel.from_pretrained(tmp_path / "model", mlp_cls=mlp)
    np.testing.assert_array_equal(again(tokens(2, 5)).logits, model(tokens(2, 5)).logits)


def test_float64_weights_are_not_rounded():
    with jax.enable_x64(True):
        model = make(("LRU",), param_dtype=jnp.float64)
        loaded = make(("LRU",), seed=1)
        loaded.load_state_dict(model.state_dict())
        logits = loaded(tokens(1, 4)).logits
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, model(tokens(1, 4)).logits, atol=1e-14)


@pytest.mark.parametrize("case", ["lrnnx_lm_lru_mamba_s5", "lrnnx_lm_rglru_s7_mlp_ln"])
def test_a_folder_that_lrnnx_saved(case):
    about = json.loads((GOLDEN / case / "case.json").read_text())["kwargs"]
    folder = GOLDEN / case / "save_pretrained"
    model = LRNNLMHeadModel.from_pretrained(folder, mixer_kwargs=about.get("mixer_kwargs"))
    io = load_file(GOLDEN / case / "io.safetensors")
    np.testing.assert_allclose(model(io["input_ids"]).logits, io["logits"], atol=1e-5)


def test_folders_that_do_not_fit_say_so(tmp_path):
    shutil.copytree(GOLDEN / "lrnnx_lm_lru_mamba_s5" / "save_pretrained", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"mixer_kwargs=\{'S5': \{'discretization'"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "m")
    next((tmp_path / "m").glob("pytorch_model*")).unlink()
    with pytest.raises(CheckpointError, match=r"no weights .model\.safetensors"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "m")


def test_it_overfits_a_small_batch_and_padding_does_not_count():
    model, ids, lengths = make(("LRU", "Mamba"), d_model=8), tokens(3, 9, seed=4), jnp.array([9, 5, 7])

    def loss(model, ids, lengths):
        logits = model(ids[:, :-1], lengths=lengths - 1).logits
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return jnp.sum(each * (jnp.arange(8) < lengths[:, None] - 1)) / jnp.sum(lengths - 1)

    rows = [
        loss(model, jnp.pad(ids[r : r + 1, :n], ((0, 0), (0, 9 - n))), jnp.array([n])) for r, n in enumerate([9, 5, 7])
    ]
    np.testing.assert_allclose(loss(model, ids, lengths), np.dot(rows, [8, 4, 6]) / 18, rtol=1e-5)
    filled = jnp.where(jnp.arange(9) < lengths[:, None], ids, 0)
    np.testing.assert_allclose(loss(model, ids, lengths), loss(model, filled, lengths), rtol=1e-6)
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, ids, lengths)
        optimizer.update(model, grads)
        return value

    values = [float(train(model, optimizer)) for _ in range(120)]
    assert values[-1] < values[0] / 10


@pytest.mark.full
def test_bfloat16_keeps_the_residual_wide():
    model = make(dtype=jnp.bfloat16, residual_in_fp32=True)
    single = make(residual_in_fp32=True)
    single.load_state_dict({name: value.astype(jnp.float32) for name, value in model.state_dict().items()})
    ids = tokens(2, 6)
    logits = model(ids).logits
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), single(ids).logits, atol=1e-2)


def test_the_initialisation_is_gpt2s():
    model = LRNNLMHeadModel(64, 4, 4, 100, ["Mamba"] * 4, d_intermediate=64, rngs=nnx.Rngs(0))
    weights = {name: np.asarray(value) for name, value in model.state_dict().items()}
    assert 0.018 < weights["backbone.embedding.weight"].std() < 0.022
    for name, fan_in in (("mixer.out_proj", 128), ("mlp.fc2", 128)):
        bound = (fan_in * 2 * 4) ** -0.5
        assert 0.9 * bound < np.abs(weights[f"backbone.layers.1.{name}.weight"]).max() <= bound
    assert np.abs(weights["backbone.layers.1.mixer.dt_proj.bias"]).max() > 0
    custom = make(initializer_cfg={"initializer_range": 1.0})
    assert np.asarray(custom.state_dict()["lm_head.weight"]).std() > 0.5


def test_torch_ids_give_torch_logits():
    ids = torch.tensor([[1, 2, 3]])
    logits = make()(ids).logits
    assert isinstance(logits, torch.Tensor)
    np.testing.assert_allclose(logits, make()(np.asarray(ids)).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixer_types": ["LRU"]}, ValueError, "must have n_layer = 2 entries"),
        ({"mixer_types": ["LRU", "GRU"]}, ValueError, "mixer_type must be 'attn' or one of"),
        ({"mixer_kwargs": {"S5": {}}}, ValueError, r"mixer_kwargs has \['S5'\]"),
        ({"mixer_types": ["LRU", "S5"], "mixer_kwargs": {}}, TypeError, "discretization"),
        ({"mixer_types": ["LRU", "S4D"], "mixer_kwargs": {"S4D": {"transposed": True}}}, ValueError, "transposed=True"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be a positive integer"),
        ({"d_intermediate": -5}, ValueError, "d_intermediate must be an integer, at least 0, got -5"),
        ({"d_intermediate": 2.5}, ValueError, "d_intermediate must be an integer, at least 0, got 2.5"),
        ({"mixer_kwargs": {"LRU": {"d_state": 9}}}, TypeError, r"arguments of LRU must not have \['d_state'\]"),
        (
            {"mixer_types": ["LRU", "attn"], "mixer_kwargs": {"attn": {"num_heads": 2, "device": "cuda"}}},
            TypeError,
            r"arguments of attn must not have \['device'\]",
        ),
        ({"dtype": jnp.int8}, TypeError, "LRNNLMHeadModel: dtype must be a real floating point dtype"),
        ({"dtype": torch.bfloat16}, TypeError, r"dtype, such as jnp\.float32 or jnp\.bfloat16, got torch\.bfloat16"),
        ({"device": "cuda"}, ValueError, "device must be None or 'cpu'"),
    ],
)
def test_arguments_it_cannot_honour_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**{"n_layer": 2, **arguments})


def test_inputs_that_do_not_fit_raise():
    model, ids = make(), tokens(2, 4)
    with pytest.raises(ValueError, match=r"expects token ids \(B, L\), got shape \(2,\)"):
        model(ids[:, 0])
    with pytest.raises(TypeError, match="integer token ids"):
        model(ids.astype(jnp.float32))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=ids)
    with pytest.raises(ValueError, match="use prefill"):
        model(ids, inference_params=object())
    for bad in ([[3, -1]], [[16, 0]]):
        with pytest.raises(ValueError, match=r"token ids must be from 0 to 15, got (-1|16)"):
            model(np.array(bad))


def test_padding_may_hold_any_id():
    model, ids = make(), np.array(tokens(2, 5))
    padded = np.where(np.arange(5) < np.array([[5], [2]]), ids, -100)
    lengths = np.array([5, 2])
    np.testing.assert_array_equal(model(padded, lengths=lengths).logits, model(ids, lengths=lengths).logits)


def test_caches_and_steps_that_do_not_fit_raise():
    model, ids = make(), tokens(2, 3)
    cache = model.allocate_inference_cache(2, 3)
    for wrong in (None, {}, {0: cache[0]}, [cache[0], cache[1]]):
        with pytest.raises(ValueError, match="must have one entry for each of the 2 layers"):
            model.prefill(ids, wrong)
        with pytest.raises(ValueError, match="must have one entry for each of the 2 layers"):
            model.step(ids[:, :1], wrong)
    for entry in (0, 1):
        with pytest.raises(ValueError, match="must have one entry for each of the 2 layers"):
            model.prefill(ids, {**cache, entry: None})
    for width in (0, 2):
        with pytest.raises(ValueError, match=rf"step takes one token a row, \(B, 1\), got \(2, {width}\)"):
            model.step(ids[:, :width], cache)
