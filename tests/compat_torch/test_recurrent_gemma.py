"""RecurrentGemma against transformers with fresh weights; pieces, steps, padding, window, precision, configurations."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

from compat_torch import state_dict
from compat_torch.architectures.recurrent_gemma import RecurrentGemma, RecurrentGemmaConfig
from compat_torch.generation import generate

GOLDEN = Path(__file__).parents[2] / "parity" / "golden" / "hf_recurrent_gemma_tiny"
SIZES = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 40, "num_attention_heads": 2,
    "num_key_value_heads": 1, "attention_window_size": 5, "lru_width": 24, "w_init_variance_scale": 0.5,
}  # fmt: skip


def reference(seed=0, **changes):
    """transformers' model with every parameter away from its initial value."""
    torch.manual_seed(seed)
    config = transformers.RecurrentGemmaConfig(**{**SIZES, **changes}, attn_implementation="eager")
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if "embed" in name:
                parameter.mul_(0.5)
    return model


def ours(theirs, **options):
    config = RecurrentGemmaConfig.from_dict(theirs.config.to_dict())
    model = nnx.eval_shape(lambda: RecurrentGemma(config, **options))
    model.load_state_dict(theirs.state_dict(), dtype=options.get("param_dtype"))
    model.eval()
    return model


@nnx.jit
def run(model, ids, lengths=None, mask=None):
    return model(ids, mask, lengths=lengths, output_hidden_states=True)


def assert_close(actual, expected, limit, what=""):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= limit * max(1, np.abs(expected).max(initial=0)), what


@pytest.fixture(scope="module")
def pair():
    theirs = reference()
    return theirs, ours(theirs)


def tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


@pytest.mark.parametrize(("B", "L"), [(2, 13), (1, 1), (1, 5)])
def test_is_transformers(pair, B, L):
    theirs, model = pair
    ids = tokens(B, L)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), use_cache=False, output_hidden_states=True)
    out = run(model, ids)
    assert_close(out.logits, expected.logits, 1e-5)
    assert len(out.hidden_states) == len(expected.hidden_states) == 4
    for x, y in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(x, y, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "attention_bias": True, "hidden_activation": "gelu"},
        {"lru_width": None, "block_types": ["attention", "recurrent"], "num_hidden_layers": 5, "conv1d_width": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        {"attention_window_size": 1, "logits_soft_cap": 2.0, "rms_norm_eps": 1e-2},
    ],
)
def test_is_transformers_with_other_settings(changes):
    theirs = reference(**changes)
    ids = tokens(2, 11)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), use_cache=False).logits
    assert_close(run(ours(theirs), ids).logits, expected, 1e-5)


def test_gradients_are_those_of_transformers(pair):
    theirs, model = pair
    ids = tokens(2, 7)
    w = np.random.default_rng(2).normal(size=(2, 7, SIZES["vocab_size"])).astype(np.float32)
    theirs.zero_grad()
    (theirs(torch.from_numpy(ids), use_cache=False).logits * torch.from_numpy(w)).sum().backward()
    gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m(ids).logits * w)))(model)
    for name, value in state_dict(gradient).items():
        expected = theirs.get_parameter(name).grad
        assert_close(value, expected, 5e-5, name)


def test_float64_is_transformers_with_all_of_it_in_float64(pair, monkeypatch):
    theirs, ids = reference(), tokens(2, 9)
    theirs.double()
    monkeypatch.setattr(modeling_recurrent_gemma.RecurrentGemmaRglru._rnn_scan, "__defaults__", (torch.float64,))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in theirs.modules():
        if isinstance(module, modeling_recurrent_gemma.RecurrentGemmaRotaryEmbedding):
            module.inv_freq = 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), use_cache=False).logits.numpy()
    monkeypatch.undo()
    with jax.enable_x64(True):
        assert_close(run(ours(theirs), ids).logits, expected, 1e-12)


@nnx.jit
def prefill(model, ids, cache, lengths=None):
    out, cache = model.prefill(ids, cache, lengths=lengths)
    return out.logits, cache


@nnx.jit
def step(model, ids, cache):
    out, cache = model.step(ids, cache)
    return out.logits, cache


@pytest.mark.parametrize("pieces", [[4, 4, 1, 4, 1, 1], [19, 1]])
def test_pieces_and_steps_are_the_whole(pair, pieces):
    _, model = pair
    ids = tokens(2, sum(pieces))
    cache, parts, at = model.allocate_inference_cache(2, 40), [], 0
    for size in pieces:
        logits, cache = (step if size == 1 else prefill)(model, ids[:, at : at + size], cache)
        parts.append(logits)
        at += size
    assert_close(np.concatenate(parts, 1), run(model, ids).logits, 1e-5)
    assert {leaf["seqlen_offset"].tolist()[0] for leaf in cache.values()} == {sum(pieces)}


def test_padded_rows_are_what_they_are_alone(pair):
    _, model = pair
    ids = tokens(3, 12)
    lengths = np.array([12, 7, 0])
    whole = run(model, ids, lengths).logits
    first, cache = prefill(model, ids[:, :6], model.allocate_inference_cache(3, 40), np.minimum(lengths, 6))
    second, cache = prefill(model, ids[:, 6:], cache, np.maximum(lengths - 6, 0))
    after, _ = step(model, tokens(3, 1, seed=5), cache)
    for row, length in enumerate(lengths):
        given = np.concatenate([ids[row, :length], tokens(3, 1, seed=5)[row], np.zeros(12 - length, int)])[None]
        alone = run(model, given, np.array([length + 1])).logits
        assert_close(whole[row, :length], alone[0, :length], 1e-5)
        parts = np.concatenate([first[row], second[row]])
        assert_close(parts[:length], alone[0, :length], 1e-5)
        assert_close(after[row, 0], alone[0, length], 1e-5)
    masked = run(model, ids[:1], mask=np.array([[0, 1, 1, 0] + [1] * 8])).logits
    assert_close(masked[0, -1], run(model, np.delete(ids[:1], [0, 3], 1)).logits[0, -1], 1e-5)


def test_a_cache_without_room_gives_nan(pair):
    _, model = pair
    cache = model.allocate_inference_cache(1, 3)
    assert cache[2]["k"].shape == (1, 3, 1, 8)
    for n in range(4):
        logits, cache = step(model, tokens(1, 1, seed=n), cache)
        assert np.isnan(logits).all() == (n == 3)


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_greedy_tokens_are_those_of_transformers(pair, penalty):
    theirs, model = pair
    ids = tokens(1, 9, seed=8)
    options = {} if penalty is None else {"repetition_penalty": penalty}
    expected = theirs.generate(
        torch.from_numpy(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    np.testing.assert_array_equal(generate(model, ids, 12, **options), expected)


def test_bfloat16(pair):
    theirs, _ = pair
    narrow = ours(theirs, param_dtype=jnp.bfloat16)
    rounded = nnx.clone(narrow)
    nnx.update(rounded, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(rounded, nnx.Param)))
    ids = tokens(2, 9)
    out = run(narrow, ids)
    assert out.hidden_states[-1].dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    assert narrow.allocate_inference_cache(1, 4, jnp.bfloat16)[0]["lrnn_state"].dtype == jnp.float32
    assert_close(out.logits, run(rounded, ids).logits, 0.05)


def test_configuration_of_the_reference_case():
    config = json.loads((GOLDEN / "hf" / "config.json").read_text())
    made = RecurrentGemmaConfig.from_dict(config)
    assert made.to_dict() == {**config, "pad_vocab_size_multiple": 1}
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": 500.0, "partial_rotary_factor": 0.25}
    assert RecurrentGemmaConfig.from_dict(older).rope_theta == 500
    assert RecurrentGemmaConfig.from_dict(older).to_dict()["rope_parameters"]["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 15}, "hidden_size must be a multiple of num_attention_heads, got 15 and 2"),
        ({"lru_width": 23}, "lru_width must be a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"partial_rotary_factor": 0.2}, "even part of a head, got 1 of 8"),
        ({"block_types": ["recurrent", "moe"]}, "block_types must be"),
        ({"block_types": []}, "block_types must be"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'default'"),
        ({"rope_parameters": "x" * 500}, "rope_type 'default'"),
        ({"head_dim": 9}, "head_dim must be 8, got 9"),
        ({"logits_soft_cap": 0}, "logits_soft_cap"),
        ({"attention_window_size": -4}, "attention_window_size"),
    ],
)
def test_configurations_that_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        RecurrentGemmaConfig.from_dict({**SIZES, **changes})


def test_caches_that_do_not_fit(pair):
    _, model = pair
    with pytest.raises(ValueError, match="must come from allocate_inference_cache"):
        model.step(tokens(1, 1), {0: {}})
    with pytest.raises(ValueError, match="must have 2 rows"):
        model.prefill(tokens(2, 3), model.allocate_inference_cache(1, 8))
    with pytest.raises(ValueError, match="max_seqlen must be a positive integer, got 0"):
        model.allocate_inference_cache(1, 0)
