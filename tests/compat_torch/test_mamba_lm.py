"""Mamba and Falcon Mamba against transformers with fresh weights; pieces, steps, padding, precision, held-out text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles.transformers_models import (
    close,
    gradients_of,
    outputs_of,
    reference,
    state_spaces_name,
    twin,
)
from safetensors.numpy import load_file

from compat_torch.architectures.mamba_lm import FalconMamba, FalconMambaConfig, MambaConfig, MambaLMHeadModel
from compat_torch.state import state_dict
from parity.case import GOLDEN

SIZES = {
    "vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4,
    "layer_norm_epsilon": 1e-4,
}  # fmt: skip
OURS = {"Mamba": MambaLMHeadModel, "FalconMamba": FalconMamba}
FALCON_TOO = [pytest.param("Mamba"), pytest.param("FalconMamba", marks=pytest.mark.full)]

run = nnx.jit(lambda model, ids: model(ids, output_hidden_states=True))


def ours(theirs, **options):
    cls = OURS[type(theirs).__name__.removesuffix("ForCausalLM")]
    rename = {} if cls is FalconMamba else {"rename": state_spaces_name}
    return twin(theirs, cls, **rename, **options)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


@pytest.fixture(scope="module", params=FALCON_TOO)
def pair(request):
    theirs = reference(request.param, **SIZES)
    return theirs, ours(theirs)


def check_it_is_transformers(theirs, B, L, seed=0):
    model, ids = ours(theirs), tokens(B, L, seed=seed)
    logits, states = outputs_of(theirs, ids)
    out = run(model, ids)
    assert out.logits.dtype == jnp.float32
    close(out.logits, logits)
    for mine, state in zip(out.hidden_states, states, strict=True):
        close(mine, state)


@pytest.mark.parametrize("architecture", OURS)
def test_is_transformers(architecture):
    check_it_is_transformers(reference(architecture, seed=1, **SIZES), 2, 17)


@pytest.mark.full
@pytest.mark.parametrize("architecture", OURS)
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "use_bias": True},
        {"use_conv_bias": False, "conv_kernel": 2, "time_step_rank": 3},
        {"expand": 3, "residual_in_fp32": False, "num_hidden_layers": 1},
        {"intermediate_size": 20, "state_size": 1, "conv_kernel": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("B", "L"), [(3, 3), (1, 1), (2, 31)])
def test_is_transformers_with_other_settings(architecture, changes, B, L):
    check_it_is_transformers(reference(architecture, seed=L, **{**SIZES, **changes}), B, L, seed=B)


def test_gradients_are_those_of_transformers(pair):
    theirs, model = pair
    ids, w = tokens(2, 7), np.random.default_rng(1).normal(size=(2, 7, 23)).astype(np.float32)
    expected = gradients_of(theirs, ids, w)
    grads = state_dict(nnx.jit(nnx.grad(lambda model: jnp.sum(model(ids).logits * w)))(model))
    for name, gradient in expected.items():
        mine = name if name in grads else name.replace("embeddings", "embedding")
        close(grads[mine], gradient, 5e-5)


def test_pieces_and_steps_are_the_whole(pair):
    _, model = pair
    ids = tokens(2, 11)
    whole = run(model, ids).logits
    cache = model.allocate_inference_cache(2, 11)
    before = jax.tree.map(np.asarray, cache)
    prefill, step = nnx.jit(lambda m, i, c: m.prefill(i, c)), nnx.jit(lambda m, i, c: m.step(i, c))
    found = []
    for piece in (ids[:, :2], ids[:, 2:2], ids[:, 2:8]):
        out, cache = prefill(model, piece, cache)
        found.append(out.logits)
    for t in range(8, 11):
        out, cache = step(model, ids[:, t : t + 1], cache)
        assert out.logits.shape == (2, 1, 23)
        found.append(out.logits)
    close(np.concatenate(found, 1), whole)
    assert cache[0]["seqlen_offset"].tolist() == [11, 11]
    jax.tree.map(np.testing.assert_array_equal, before, model.allocate_inference_cache(2, 11))


def test_padded_rows_are_what_they_are_alone(pair):
    _, model = pair
    rows, places = tokens(3, 5), (slice(2, 7), slice(0, 5), slice(1, 6))
    padded, mask = np.full((3, 7), 22), np.zeros((3, 7), int)
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = rows[row], 1
    out = nnx.jit(lambda m, i, a: m(i, a, output_hidden_states=True))(model, padded, mask)
    alone = run(model, rows)
    for row, place in enumerate(places):
        close(out.logits[row, place], alone.logits[row], 1e-6)
        close(out.hidden_states[0][row, place], alone.hidden_states[0][row], 1e-6)
    for part in (out.logits, *out.hidden_states):
        assert not np.asarray(part)[mask == 0].any()


def test_a_padded_prompt_goes_on_as_it_does_alone(pair):
    _, model = pair
    rows, lengths = tokens(2, 6), np.array([4, 6])
    prompt = np.where(np.arange(6) < lengths[:, None], rows, 22)

    @nnx.jit
    def go_on(model, prompt, lengths, ids):
        out, cache = model.prefill(prompt, model.allocate_inference_cache(2, 7), lengths=lengths, last_only=True)
        return out.logits, model.step(ids, cache)[0].logits

    last, after = go_on(model, prompt, lengths, rows[:, :1])
    assert last.shape == (2, 1, 23)
    for row, n in enumerate(lengths):
        whole = run(model, np.concatenate([rows[row, :n], rows[row, :1], rows[row, : 6 - n]])[None]).logits[0]
        close(last[row, 0], whole[n - 1])
        close(after[row, 0], whole[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision_is_as_near_to_float64_as_that_of_transformers(pair, dtype):
    theirs, _ = pair
    theirs = type(theirs)(theirs.config).eval()
    theirs.load_state_dict(pair[0].state_dict())
    theirs.to(dtype)
    model, ids = ours(theirs), tokens(2, 13)
    with jax.enable_x64(True):
        wide = nnx.eval_shape(lambda: type(model)(model.config))
        wide.load_state_dict(model.state_dict(), dtype=jnp.float64)
        exact = np.asarray(run(wide, ids).logits)
    scale = max(1.0, np.abs(exact).max())
    out = run(model, ids)
    assert out.logits.dtype == jnp.float32
    assert all(state.dtype == jnp.float32 for state in out.hidden_states)
    assert {value.dtype.name for value in model.state_dict().values()} == {str(dtype).removeprefix("torch.")}
    error = np.abs(np.asarray(out.logits) - exact).max() / scale
    own = np.abs(outputs_of(theirs, ids)[0] - exact).max() / scale
    assert error <= max(1e-2, 1.5 * own)
    cache = model.allocate_inference_cache(2, 13)[0]
    assert (cache["conv_state"].dtype.name, cache["lrnn_state"].dtype) == (str(dtype)[6:], jnp.float32)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream_has_the_dtype_of_transformers(dtype, wide):
    theirs = reference("Mamba", **SIZES, residual_in_fp32=wide).to(dtype)
    ids = tokens(1, 3)
    with torch.no_grad():
        states = theirs(torch.tensor(ids), output_hidden_states=True, use_cache=False).hidden_states
    model = ours(theirs)
    assert model._embed(ids).dtype.name == str(dtype).removeprefix("torch.")
    found = run(model, ids).hidden_states
    assert [state.dtype.name for state in found] == [str(state.dtype).removeprefix("torch.") for state in states]


def test_dtype_widens_the_arithmetic_of_half_precision_weights(pair):
    _, model = pair
    ids = tokens(2, 5)
    half = {name: value.astype(jnp.bfloat16) for name, value in model.state_dict().items()}
    mixed, plain = (nnx.eval_shape(lambda d=d: type(model)(model.config, dtype=d)) for d in (jnp.float32, None))
    mixed.load_state_dict(half)
    plain.load_state_dict(half, dtype=jnp.float32)
    close(run(mixed, ids).logits, run(plain, ids).logits)


@pytest.mark.parametrize("cls", OURS.values())
def test_new_models_are_reproducible_tied_and_sized(cls):
    config = cls.config_class(**{**SIZES, "num_hidden_layers": 1, "pad_vocab_size_multiple": 8})
    make = nnx.jit(lambda rngs: cls(config, rngs=rngs))
    one, same, other = (make(nnx.Rngs(seed)) for seed in (0, 0, 1))
    weights = one.state_dict()
    name = "backbone.embeddings.weight" if cls is FalconMamba else "backbone.embedding.weight"
    assert weights[name].shape == (24, 12)
    np.testing.assert_array_equal(weights[name], weights["lm_head.weight"])
    assert not any("dtA" in key for key in weights)
    assert len(weights) == 2 + 10 + 1
    jax.tree.map(np.testing.assert_array_equal, weights, same.state_dict())
    assert not np.array_equal(weights[name], other.state_dict()[name])
    assert len(jax.tree.leaves(nnx.state(one, nnx.Param))) == len(weights) - 1


def test_trained_weights_predict_held_out_text():
    folder = GOLDEN / "hf_mamba_trained"
    io = load_file(folder / "io.safetensors")
    config = MambaConfig.from_dict(json.loads((folder / "hf" / "config.json").read_text()))
    model = nnx.eval_shape(lambda: MambaLMHeadModel(config))
    weights = load_file(folder / "hf" / "model.safetensors")
    model.load_state_dict({name.replace("embeddings", "embedding"): value for name, value in weights.items()})
    ids = io["heldout_ids"].astype(np.int32)
    likely = jax.nn.log_softmax(nnx.jit(lambda m, i: m(i).logits)(model, ids[:, :-1]))
    close(-np.take_along_axis(np.asarray(likely), ids[:, 1:, None], -1)[0, :, 0], io["heldout_token_loss"])


def test_configurations_are_those_of_transformers():
    from transformers import FalconMambaConfig as Falcon
    from transformers import MambaConfig as Plain

    for theirs, mine in ((Plain, MambaConfig), (Falcon, FalconMambaConfig)):
        for changes in ({}, {"hidden_size": 40, "expand": 3}, {"hidden_size": 40, "intermediate_size": 44}):
            written = json.loads(theirs(**changes).to_json_string(use_diff=False))
            config = mine.from_dict(written)
            assert config.to_dict().items() >= {k: v for k, v in written.items() if k != "model_type"}.items()
            assert mine.from_dict(config.to_dict()) == config
            for name in ("intermediate_size", "time_step_rank", "tie_word_embeddings", "eos_token_id"):
                assert getattr(config, name) == getattr(theirs(**changes), name)
        defaults = mine()
        assert all(getattr(defaults, name) == getattr(theirs(), name) for name in ("vocab_size", "hidden_size"))
