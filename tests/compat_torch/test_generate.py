"""compat_torch.generate: tokens, padding, ends, sampling, resuming, streaming, compilations, errors, the command."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import typer
from flax import nnx
from oracles.transformers_models import reference
from transformers.generation import logits_process
from typer.testing import CliRunner

from compat_torch import _cli_generate, generation
from compat_torch._sampling import Sampling, filtered, penalised, sample
from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.generation import GenerationCache, generate
from compat_torch.nn import from_torch

VOCABULARY = 13


def language_model(*mixers, seed=0):
    attention = {"attn": {"num_heads": 2, "causal": True, "rotary_emb_dim": 2}} if "attn" in mixers else None
    rngs = nnx.Rngs(seed)
    model = LRNNLMHeadModel(8, 4, len(mixers), VOCABULARY, mixers, mixer_kwargs=attention, rngs=rngs)
    embedding = model.backbone.embedding.embedding
    embedding.set_value(jax.random.normal(rngs.params(), embedding.shape))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return language_model("Mamba", "attn")


def prompt(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def continued(model, row, new, ends=(), penalty=1.0):
    """One row, the whole sequence computed again for each token."""
    ids = list(map(int, row))
    for _ in range(new):
        padded = np.array([ids + [0] * (48 - len(ids))])
        logits = np.array(whole(model, padded, np.array([len(ids)]))[0, len(ids) - 1, :VOCABULARY])
        for token in set(ids):
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        ids.append(int(np.argmax(logits)))
        if ids[-1] in ends:
            break
    return ids


@nnx.jit
def whole(model, ids, lengths):
    return model(ids, lengths=lengths).logits


@pytest.mark.parametrize("mixers", [("Mamba", "attn"), pytest.param(("LRU", "S7", "RGLRU"), marks=pytest.mark.full)])
@pytest.mark.parametrize("L", [1, 2, 17, 29])
def test_greedy_is_the_largest_logit_of_the_whole_sequence(mixers, L):
    model, ids = language_model(*mixers), prompt(2, L)
    out = generate(model, ids, 7)
    np.testing.assert_array_equal(out, [continued(model, row, 7) for row in ids])


@pytest.mark.parametrize("padding", [0, 1, 2], ids=["left", "right", "between"])
def test_padded_rows_give_what_they_give_alone(model, padding):
    ids, mask = prompt(2, 9, seed=padding), np.ones((2, 9), int)
    mask[0, [slice(0, 5), slice(6, 9), [0, 3, 4, 8]][padding]] = 0
    out = generate(model, ids, 6, attention_mask=mask)
    np.testing.assert_array_equal(out[:, :9], ids)
    for row, kept, given in zip(out, mask, ids, strict=True):
        alone = given[kept == 1]
        assert row[9:].tolist() == continued(model, alone, 6)[len(alone) :]


@pytest.mark.parametrize("kind", ["int", "list", "array"])
def test_rows_end_and_are_filled(model, kind):
    ids = prompt(2, 5)
    free = [continued(model, row, 12)[5:] for row in ids]
    ends = [free[0][1]] if kind == "int" else [free[0][1], free[1][3]]
    given = ends[0] if kind == "int" else np.array(ends) if kind == "array" else ends
    expected = [continued(model, row, 12, ends)[5:] for row in ids]
    longest = max(map(len, expected))
    filled = [row + [11] * (longest - len(row)) for row in expected]
    out = generate(model, ids, 12, eos_token_id=given, pad_token_id=11)
    np.testing.assert_array_equal(out[:, 5:], filled)
    by_default = generate(model, ids, 12, eos_token_id=given)
    np.testing.assert_array_equal(by_default[:, 5:], [row + [ends[0]] * (longest - len(row)) for row in expected])


def test_stops_when_all_rows_have_ended(model):
    ids = prompt(2, 5)
    free = [continued(model, row, 12)[5:] for row in ids]
    ends = [row[2] for row in free]
    out = generate(model, ids, 40, eos_token_id=ends, pad_token_id=0)
    assert out.shape[1] == 5 + max(min(row.index(end) for end in ends if end in row) + 1 for row in free)


def test_resumes(model):
    ids, more = prompt(2, 5), prompt(2, 4, seed=2)
    first, cache = generate(model, ids, 4, return_cache=True)
    kept = jax.tree.map(np.array, cache)
    rest = generate(model, np.zeros((2, 0), int), 6, cache=cache)
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), generate(model, ids, 10))
    answer = generate(model, more, 3, cache=cache)
    np.testing.assert_array_equal(
        np.concatenate([first, answer], 1), generate(model, np.concatenate([first, more], 1), 3)
    )
    jax.tree.map(np.testing.assert_array_equal, kept, cache)


def test_resumed_rows_that_have_ended_need_new_tokens(model):
    ids = prompt(2, 5)
    free = [continued(model, row, 12)[5:] for row in ids]
    eos = next(token for token in free[0][:4] if token not in free[1][:4])
    until = free[0].index(eos) + 1
    first, cache = generate(model, ids, 4, eos_token_id=eos, pad_token_id=0, return_cache=True)
    assert np.asarray(cache.finished).tolist() == [True, False]
    more, mask = np.array([[3, 4], [5, 6]]), np.array([[0, 0], [1, 0]])
    out = generate(model, more, 2, cache=cache, attention_mask=mask, eos_token_id=eos, pad_token_id=12)
    assert out[0].tolist() == [3, 4, 12, 12]
    alone = np.array([*ids[0], *free[0][:until], 3, 4])
    out = generate(model, more, 2, cache=cache)
    assert out[0, 2:].tolist() == continued(model, alone, 2)[-2:]
    assert first[0, 5:].tolist() == free[0][:until] + [0] * (4 - until)


def test_a_cache_of_the_model(model):
    ids, cache = prompt(2, 20), model.allocate_inference_cache(2, 33)
    _, after = nnx.jit(lambda model, ids, cache: model.prefill(ids, cache))(model, ids[:, :9], cache)
    expected = [continued(model, row, 5)[20:] for row in ids]
    np.testing.assert_array_equal(generate(model, ids[:, 9:], 5, cache=after)[:, 11:], expected)
    with pytest.raises(ValueError, match=r"after 32 new tokens are NaN.* has no room"):
        generate(model, ids[:, :2], 40, cache=cache)


@pytest.mark.parametrize("new", [0, 1, 9, 70])
def test_streams_every_token_in_order(model, new):
    ids, heard = prompt(2, 5), []
    out = generate(model, ids, new, on_token=heard.append)
    np.testing.assert_array_equal(out, generate(model, ids, new))
    assert len(heard) == new
    np.testing.assert_array_equal(np.array(heard).reshape(new, 2).T, out[:, 5:])


def test_a_callback_ends_the_generation(model):
    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(2, 3), 9, on_token=stop)


def test_gives_back_the_kind_it_got(model):
    ids = prompt(2, 5)
    out = generate(model, ids, 3)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.int64
    from_jax = generate(model, jnp.asarray(ids, jnp.int16), 3)
    assert isinstance(from_jax, jax.Array)
    assert from_jax.dtype == jnp.int16
    from_torch = generate(model, torch.from_numpy(ids), 3, attention_mask=torch.ones(2, 5))
    assert from_torch.dtype == torch.int64
    for other in (from_jax, from_torch.numpy(), generate(model, ids.tolist(), 3)):
        np.testing.assert_array_equal(other, out)


def test_another_setting_or_length_is_no_other_program(model):
    def run(L, new, **settings):
        generate(model, prompt(2, L), new, rngs=nnx.Rngs(0), **settings)

    run(20, 3)
    before = generation._advance._cache_size(), generation._prefill._cache_size()
    run(31, 60, temperature=0.7)
    run(18, 5, temperature=1.3, top_k=3, repetition_penalty=1.2)
    run(33, 1, temperature=2, top_p=0.5)
    assert (generation._advance._cache_size(), generation._prefill._cache_size()) == before


@pytest.mark.parametrize("penalty", [None, 1.7, 0.6])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, 5, None), (1.6, None, 0.8), (0.9, 11, 0.6), (3.0, 1, None), (1.0, 500, 1e-6)],
)
def test_distribution_is_that_of_transformers(temperature, top_k, top_p, penalty):
    rng = np.random.default_rng(3)
    logits, ids = rng.normal(size=(4, 61)).astype(np.float32) * 3, rng.integers(0, 61, (4, 9))
    expected = torch.from_numpy(logits.copy())
    if penalty is not None:
        expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), expected)
    expected = logits_process.TemperatureLogitsWarper(temperature)(None, expected)
    if top_k is not None:
        expected = logits_process.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = logits_process.TopPLogitsWarper(top_p)(None, expected)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, 1)
    settings = Sampling.of(temperature, top_k, top_p, penalty, 61)
    ours = jax.jit(lambda logits, seen, s: filtered(penalised(logits, seen, s), s))(logits, seen, settings)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected.numpy()))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_samples_have_their_probabilities():
    logits = np.array([0.5, -1.0, 2.0, 1.5, -3.0, 0.0], np.float32)
    settings = Sampling.of(0.8, 4, None, None, 6)
    rows = 20000
    tokens = sample(jax.random.key(5), np.tile(logits, (rows, 1)), np.zeros((rows, 6), bool), settings)
    kept = np.where(logits >= 0, np.exp(logits / 0.8), 0)
    p = kept / kept.sum()
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert (np.abs(counts - rows * p) <= 5 * np.sqrt(rows * p * (1 - p))).all()


def test_sampling_follows_its_rngs(model):
    ids = prompt(2, 4)

    def run(seed):
        return generate(model, ids, 20, temperature=1.5, rngs=nnx.Rngs(seed))

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()
    np.testing.assert_array_equal(
        generate(model, ids, 5, temperature=0.7, top_k=1, rngs=nnx.Rngs(0)), generate(model, ids, 5)
    )


def test_penalty_counts_prompt_and_new_tokens_but_no_padding(model):
    ids = prompt(2, 6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    expected = [continued(model, row[kept == 1], 8, penalty=2.5)[-8:] for row, kept in zip(ids, mask, strict=True)]
    np.testing.assert_array_equal(generate(model, ids, 8, repetition_penalty=2.5, attention_mask=mask)[:, 6:], expected)
    assert expected != [continued(model, row[kept == 1], 8)[-8:] for row, kept in zip(ids, mask, strict=True)]
    _, cache = generate(model, ids, 3, repetition_penalty=2.5, attention_mask=mask, return_cache=True)
    rest = generate(model, np.zeros((2, 0), int), 5, repetition_penalty=2.5, cache=cache)
    np.testing.assert_array_equal(rest, [row[3:] for row in expected])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be an integer, at least 0, got -1"),
        ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, ValueError, "temperature"),
        ({"temperature": 1, "top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"temperature": 1, "top_p": 1.5}, ValueError, "top_p must be in"),
        ({"top_k": 3}, ValueError, "need a temperature"),
        ({"top_p": 0.5, "temperature": 0}, ValueError, "need a temperature"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"eos_token_id": 13}, ValueError, "eos_token_id must be below the vocabulary of 13, got 13"),
        ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id"),
        ({"pad_token_id": 0}, ValueError, "needs eos_token_id"),
        ({"pad_token_id": -1, "eos_token_id": 1}, ValueError, "pad_token_id"),
        ({"on_token": 3}, TypeError, "on_token must be callable"),
        ({"input_ids": np.zeros(3, int)}, ValueError, r"\(B, L\)"),
        ({"input_ids": np.zeros((2, 3))}, TypeError, "integer token ids"),
        ({"input_ids": np.zeros((0, 3), int)}, ValueError, "B at least 1"),
        ({"input_ids": np.zeros((2, 0), int)}, ValueError, r"rows \[0, 1\] have no token"),
        ({"input_ids": np.full((1, 3), 13)}, ValueError, r"token ids must be in \[0, 13\)"),
        ({"input_ids": np.full((1, 3), -1)}, ValueError, "got -1 to -1"),
        ({"attention_mask": np.ones((2, 4))}, ValueError, r"\(2, 3\), got \(2, 4\)"),
        ({"attention_mask": np.full((2, 3), 2)}, ValueError, "0 for padding"),
        ({"attention_mask": np.array([[1, 1, 1], [0, 0, 0]])}, ValueError, r"rows \[1\] have no token"),
        ({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, TypeError, "language model of compat_torch, got Linear"),
    ],
)
def test_errors(model, change, error, says):
    arguments = {"model": model, "input_ids": np.zeros((2, 3), int), "max_new_tokens": 2, **change}
    with pytest.raises(error, match=says):
        generate(**arguments)


def test_a_cache_of_another_batch(model):
    _, cache = generate(model, prompt(2, 3), 1, return_cache=True)
    assert isinstance(cache, GenerationCache)
    with pytest.raises(ValueError, match=r"\(2, 13\), got \(1, 13\)"):
        generate(model, prompt(1, 3), 1, cache=cache)


OF_TRANSFORMERS = {
    "Mamba2": {"num_heads": 4, "head_dim": 6, "n_groups": 2, "chunk_size": 8},
    "FalconMamba": {"time_step_rank": 2},
}


@pytest.fixture(scope="module", params=OF_TRANSFORMERS)
def pair(request):
    sizes = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4}
    theirs = reference(request.param, **sizes, **OF_TRANSFORMERS[request.param])
    return theirs, from_torch(theirs)


def by_transformers(theirs, ids, new, **settings):
    """Greedy: the new tokens of each row."""
    out = theirs.generate(
        torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_greedy_tokens_are_those_of_transformers(pair, penalty):
    theirs, model = pair
    ids = np.random.default_rng(1).integers(0, 23, (3, 9))
    settings = {} if penalty is None else {"repetition_penalty": penalty}
    expected = by_transformers(theirs, ids, 8, **settings)
    assert len({tuple(row) for row in expected}) == 3
    np.testing.assert_array_equal(generate(model, ids, 8, **settings)[:, 9:], expected)


def test_rows_of_a_ragged_batch_are_those_of_transformers_alone(pair):
    theirs, model = pair
    ids, mask = np.random.default_rng(2).integers(0, 23, (3, 9)), np.ones((3, 9), int)
    mask[0, :8] = mask[1, 4:] = 0
    expected = [by_transformers(theirs, row[kept == 1][None], 8)[0] for row, kept in zip(ids, mask, strict=True)]
    np.testing.assert_array_equal(generate(model, ids, 8, attention_mask=mask)[:, 9:], expected)


def test_samples_are_among_the_largest_logits_of_transformers(pair):
    theirs, model = pair
    ids = np.random.default_rng(3).integers(0, 23, (3, 9))
    out, again, other = (generate(model, ids, 8, temperature=1.5, top_k=4, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(out, again)
    assert (out != other).any()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(out), use_cache=False).logits[:, 8:-1]
    ranks = (logits > logits.gather(2, torch.from_numpy(out[:, 9:, None]))).sum(-1)
    assert ranks.max() <= 3
    assert ranks.max() > 0


def test_weights_that_are_not_numbers():
    model = language_model("LRU")
    model.backbone.norm_f.scale.set_value(jnp.full(8, jnp.nan))
    with pytest.raises(ValueError, match="after 0 new tokens are NaN"):
        generate(model, prompt(2, 3), 4)


def test_command(tmp_path):
    folder = Path(__file__).parents[2] / "parity" / "golden" / "hf_mamba_trained" / "hf"
    app = typer.Typer()
    app.command()(_cli_generate.generate)

    def run(*arguments, at=folder):
        return CliRunner().invoke(app, [str(at), *arguments])

    text = run("--prompt", "The licensee shall", "--tokenizer", "bytes", "--max-new-tokens", "20")
    assert (text.exit_code, text.stdout) == (0, " be a string the sec\n")
    ids = run("--prompt-ids", ",".join(map(str, b"The licensee shall")), "--max-new-tokens", "20")
    assert bytes(map(int, ids.stdout.split())).decode() + "\n" == text.stdout
    sampled = ("--prompt-ids", "84,104", "--temperature", "2", "--top-k", "9", "--max-new-tokens", "20", "--seed")
    assert run(*sampled, "1").stdout == run(*sampled, "1").stdout != run(*sampled, "2").stdout
    for arguments, says in [
        ([], "either --prompt or --prompt-ids"),
        (["--prompt", "a"], "has no tokenizer"),
        (["--prompt-ids", "1,b"], "must be integers"),
        (["--prompt-ids", "256"], "must be in [0, 256)"),
        (["--prompt-ids", "1", "--top-p", "0.3"], "need a temperature"),
    ]:
        failed = run(*arguments)
        assert failed.exit_code == 1
        assert says in failed.output
    vocabulary = {"[UNK]": 0, **{f"w{n}": n for n in range(1, 256)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    own = run("--prompt", "w84 w104 w101", "--tokenizer", str(tmp_path), "--max-new-tokens", "6")
    expected = run("--prompt-ids", "84,104,101", "--max-new-tokens", "6").stdout.split()
    assert own.stdout.split() == [f"w{n}" for n in expected]


def test_printer_waits_for_whole_characters(capsys):
    show = _cli_generate._Printer(_cli_generate._from_bytes)
    heard = []
    for token in "aé€".encode() + b"\xff":
        show(token)
        heard.append(capsys.readouterr().out)
    show.end()
    assert heard == ["a", "", "é", "", "", "€", ""]
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"
