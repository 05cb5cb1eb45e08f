"""What language models share: configurations, arguments, masks, torch tensors, files."""

import copy
import json
import math
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch import generate
from compat_torch.architectures import language_model
from compat_torch.architectures.causal_lm import CausalLMConfig, CausalLMOutput, TiedHead, compact
from compat_torch.architectures.language_model import LRNNLMHeadModel
from compat_torch.architectures.mamba2_lm import Mamba2Config, Mamba2LMHeadModel
from compat_torch.architectures.mamba_lm import FalconMambaConfig, MambaConfig, MambaLMHeadModel
from compat_torch.architectures.recurrent_gemma import RecurrentGemma, RecurrentGemmaConfig

SIZES = {"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 1, "state_size": 2}


@pytest.fixture(scope="module")
def model():
    make = nnx.jit(lambda rngs: MambaLMHeadModel(MambaConfig.from_dict(SIZES), rngs=rngs))
    return make(nnx.Rngs(0))


call = nnx.jit(lambda model, ids: model(ids).logits)


@pytest.mark.parametrize("config_class", [MambaConfig, FalconMambaConfig, Mamba2Config])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": -5}, "vocab_size must be an integer from 1 to 16777216, got -5"),
        ({"hidden_size": 10**30}, "hidden_size must be an integer from 1 to 1048576, got 10000"),
        ({"hidden_size": 10**5000}, "hidden_size must be .* got int of too many digits"),
        ({"hidden_size": "768"}, "hidden_size must be .* got '768'"),
        ({"hidden_size": 768.0}, "hidden_size must be .* got 768.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be .* got True"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be .* got None"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to 1024"),
        ({"state_size": [16]}, r"state_size must be .* got \[16\]"),
        ({"expand": 10**4000}, "expand must be a number from"),
        ({"expand": math.nan}, "expand must be a number from .* got nan"),
        ({"expand": 1e-3}, r"expand \* hidden_size must be at least 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be a number from 0 to 1, got -1e-05"),
        ({"hidden_act": "gelu"}, r"hidden_act must be one of \('silu', 'swish'\), got 'gelu'"),
        ({"hidden_act": {"a": 1}}, "hidden_act must be one of"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id .* got '</s>'"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id must be"),
        ({"time_step_max": 1e-5}, "time_step_max must be at least time_step_min = 0.001, got 1e-05"),
        ({"conv_kernel": 0}, "conv_kernel must be an integer from 1 to 1024, got 0"),
        ({"model_type": "llama"}, "model_type must be .* got 'llama'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"conv_kernel": "x" * 10**6, "state_size": 0}, r"state_size must be .*; conv_kernel must be .* got 'x+\.\.\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hostile_configurations_are_one_error_at_once(config_class, changes, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        config_class.from_dict({**SIZES, **changes})
    assert time.process_time() - start < 0.5
    assert str(caught.value).startswith(config_class.__name__)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_configuration_without_its_sizes_is_refused(name):
    with pytest.raises(ValueError, match=f"MambaConfig: {name} is missing"):
        MambaConfig.from_dict({key: value for key, value in SIZES.items() if key != name})
    with pytest.raises(ValueError, match="must be made from a mapping, got list"):
        MambaConfig.from_dict([1])


def test_a_time_step_rank_is_auto_or_an_integer():
    assert MambaConfig(hidden_size=33).time_step_rank == 3
    assert MambaConfig(hidden_size=33, time_step_rank=5).time_step_rank == 5
    for wrong in ("automatic", 0, None, 2.0):
        with pytest.raises(ValueError, match="time_step_rank must be 'auto' or an integer"):
            MambaConfig(time_step_rank=wrong)


def test_unknown_entries_are_kept_and_written_again():
    content = {
        **SIZES, "model_type": "mamba", "architectures": ["MambaForCausalLM"], "eos_token_id": [3, 4],
        "extra": {"a": [1, {"__float__": "Infinity"}]}, "dtype": "bfloat16", "pad_token_id": None,
    }  # fmt: skip
    before = copy.deepcopy(content)
    config = MambaConfig.from_dict(content)
    assert config.eos_token_id == (3, 4)
    assert config.extra["dtype"] == "bfloat16"
    written = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert written.items() >= before.items()
    assert MambaConfig.from_dict(written) == config
    config.to_dict()["extra"]["a"].clear()
    assert config.to_dict()["extra"] == before["extra"]
    assert content == before


def test_configurations_are_values():
    one, same = (MambaConfig.from_dict({**SIZES, "note": ["a", {}]}) for _ in range(2))
    assert (one, hash(one)) == (same, hash(same))
    assert one != MambaConfig.from_dict(SIZES)
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    with pytest.raises(AttributeError, match="cannot assign"):
        one.hidden_size = 3


def test_infinities_are_written_as_transformers_does():
    sizes = {**SIZES, "num_heads": 2, "head_dim": 6, "n_groups": 1}
    encoded = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    config = Mamba2Config.from_dict({**sizes, **encoded})
    assert config.time_step_limit == (0.0, math.inf)
    assert config.to_dict()["time_step_limit"] == encoded["time_step_limit"]
    assert Mamba2Config.from_dict({**sizes, "time_step_limit": [0.0, math.inf]}) == config


def test_language_models_share_their_output_and_head():
    assert language_model.CausalLMOutput is CausalLMOutput
    assert language_model.TiedHead is TiedHead
    assert CausalLMOutput(1) == (1, None)


def test_a_model_takes_its_own_configuration():
    with pytest.raises(TypeError, match=r"MambaLMHeadModel takes a MambaConfig .* got dict"):
        MambaLMHeadModel(SIZES)
    with pytest.raises(TypeError, match="got CausalLMConfig"):
        MambaLMHeadModel(CausalLMConfig())


def test_big_models_are_described_without_being_made():
    config = MambaConfig(hidden_size=2**14, num_hidden_layers=2, vocab_size=2**17)
    assert nnx.eval_shape(lambda: MambaLMHeadModel(config)).lm_head.weight.shape == (2**17, 2**14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": np.zeros(3, int)}, ValueError, r"expects token ids \(B, L\), got shape \(3,\)"),
        ({"input_ids": np.zeros((1, 3))}, TypeError, "expects integer token ids .* got float"),
        ({"input_ids": [[0, 11]]}, ValueError, "token ids must be from 0 to 10, got 11"),
        ({"input_ids": [[-1, 2]]}, ValueError, "token ids must be from 0 to 10, got -1"),
        ({"attention_mask": [[1, 1]]}, ValueError, r"attention_mask must have the shape of input_ids, \(1, 3\)"),
        ({"attention_mask": [[1.0, 1.0, 0.0]]}, TypeError, "attention_mask must be integer or bool, got float32"),
        ({"attention_mask": [[1, 1, 1]], "lengths": [3]}, ValueError, "give attention_mask or lengths, not both"),
        ({"lengths": [1, 2]}, ValueError, "lengths"),
        ({"lengths": [1.5]}, TypeError, "lengths"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**{"input_ids": np.zeros((1, 3), int), **arguments})


def test_wrong_caches_and_steps_are_refused(model):
    cache = model.allocate_inference_cache(2, 4)
    with pytest.raises(ValueError, match=r"step takes one token a row, \(B, 1\), got \(2, 3\)"):
        model.step(np.zeros((2, 3), int), cache)
    with pytest.raises(ValueError, match="prefill needs a cache; make one with allocate_inference_cache"):
        model.prefill(np.zeros((2, 3), int), None)
    with pytest.raises(ValueError, match="must have one entry for each of the 1 layers"):
        model.step(np.zeros((2, 1), int), {})
    with pytest.raises(ValueError, match="must have one entry for each"):
        model.prefill(np.zeros((2, 1), int), None or [])
    with pytest.raises(ValueError, match="must have shape"):
        model.step(np.zeros((3, 1), int), cache)


def test_ids_past_the_end_of_a_row_may_be_anything(model):
    ids = np.array([[1, 2, -100], [3, 99, 99]])
    masked = nnx.jit(lambda m, i, a: m(i, a).logits)
    by_mask = masked(model, ids, np.array([[True, True, False], [True, False, False]]))
    by_length = nnx.jit(lambda m, i, n: m(i, lengths=n).logits)(model, ids, np.array([2, 1]))
    np.testing.assert_array_equal(by_mask, by_length)
    np.testing.assert_allclose(by_mask[0, :2], call(model, ids[:1, :2])[0], atol=1e-6)
    assert not by_mask[0, 2].any()
    assert not by_mask[1, 1:].any()
    np.testing.assert_array_equal(model(ids, lengths=[2, 1]).logits.shape, (2, 3, 11))


def test_ids_may_be_constants_of_a_compiled_function(model):
    ids = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(nnx.jit(lambda m: m(ids).logits)(model), call(model, ids))


@pytest.mark.parametrize("shape", [(2, 0), (1, 1)])
def test_the_shortest_inputs(model, shape):
    assert call(model, np.zeros(shape, int)).shape == (*shape, 11)


def test_compact_keeps_order_and_says_where_tokens_were():
    ids, mask = jnp.array([[5, 6, 7, 8], [1, 2, 3, 4]]), jnp.array([[0, 1, 0, 1], [2, 1, 1, 0]])
    packed, lengths, order = compact(ids, mask)
    assert lengths.tolist() == [2, 3]
    assert packed[0, :2].tolist() == [6, 8]
    assert packed[1, :3].tolist() == [1, 2, 3]
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_a_row_without_tokens_is_zeros(model):
    out = call_masked(model, np.array([[1, 2], [3, 4]]), np.array([[0, 0], [0, 1]]))
    assert not out[0].any()
    np.testing.assert_allclose(out[1, 1], call(model, np.array([[4]]))[0, 0], atol=1e-6)


call_masked = nnx.jit(lambda model, ids, mask: model(ids, mask).logits)


def test_torch_tensors_go_in_and_come_out(model):
    ids = torch.tensor([[1, 2, 3]])
    out = model(ids, torch.ones_like(ids), output_hidden_states=True)
    assert isinstance(out.logits, torch.Tensor)
    assert all(isinstance(state, torch.Tensor) for state in out.hidden_states)
    np.testing.assert_allclose(out.logits.numpy(), call(model, ids.numpy()), atol=1e-6)
    after, cache = model.step(ids[:, :1], model.allocate_inference_cache(1, 1))
    assert isinstance(after.logits, torch.Tensor)
    assert isinstance(cache[0]["lrnn_state"], torch.Tensor)


def test_forward_is_the_call_and_hidden_states_are_on_request(model):
    ids = np.array([[1, 2, 3]])
    assert model.forward(ids).hidden_states is None
    np.testing.assert_array_equal(model.forward(ids).logits, model(ids).logits)


def test_training_and_evaluation_modes_compute_the_same(model):
    ids = np.array([[1, 2, 3]])
    before = call(model, ids)
    model.train()
    np.testing.assert_array_equal(call(model, ids), before)
    model.eval()


def test_a_folder_keeps_the_model_and_what_lies_beside_it(model, tmp_path):
    model.save_pretrained(tmp_path / "first", format="hf")
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "second", source=tmp_path / "first")
    assert (tmp_path / "second" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "second" / "provenance.json").exists()
    again = MambaLMHeadModel.from_pretrained(tmp_path / "second")
    kept = again.config.to_dict()
    assert {**kept, **model.config.to_dict()} == kept
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "second")
    with pytest.raises(TypeError, match="holds a MambaLMHeadModel, not a Mamba2LMHeadModel"):
        Mamba2LMHeadModel.from_pretrained(tmp_path / "second")


def test_a_model_is_a_pytree_under_jit_grad_and_vmap(model):
    graph, parameters = nnx.split(model)
    ids = jnp.array([[[1, 2]], [[3, 4]]])
    logits = jax.jit(jax.vmap(lambda ids: nnx.merge(graph, parameters)(ids).logits))(ids)
    np.testing.assert_allclose(logits[:, 0], call(model, ids[:, 0]), atol=1e-6)


SMALL = {"vocab_size": 300, "hidden_size": 4, "num_hidden_layers": 1}
OF_BYTES = {
    "Mamba": lambda: MambaLMHeadModel(MambaConfig(**SMALL, state_size=2)),
    "RecurrentGemma": lambda: RecurrentGemma(
        RecurrentGemmaConfig(**SMALL, num_attention_heads=1, intermediate_size=4, pad_token_id=None)
    ),
    "LRNN": lambda: LRNNLMHeadModel(4, 2, 1, 300, ["LRU"]),
}


@pytest.mark.parametrize("name", OF_BYTES)
def test_ids_of_one_byte_and_outside_of_the_vocabulary(name):
    model = OF_BYTES[name]()
    model.eval()
    ids = np.array([[1, 100, 7]])
    expected = model(ids).logits
    for dtype in (np.uint8, np.int8, np.uint32):
        np.testing.assert_array_equal(model(ids.astype(dtype)).logits, expected)
    compiled = nnx.jit(lambda model, ids: model(ids).logits)
    for dtype, outside in ((np.int8, -1), (np.int32, -300), (np.int32, 2**20)):
        logits = np.asarray(compiled(model, np.array([[1, 2, outside]], dtype)))
        assert np.isnan(logits).all(-1).tolist() == [[False, False, True]]


def test_new_tokens_fit_the_dtype_of_the_prompt():
    with pytest.raises(ValueError, match="uint8 ids cannot hold all 300 tokens of the model: pass int32"):
        generate(OF_BYTES["Mamba"](), np.array([[1, 2]], np.uint8), 2)
