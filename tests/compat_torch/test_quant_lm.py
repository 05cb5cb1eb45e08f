"""Language models with rounded weights: bytes, the loss on held-out text, tokens, errors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from compat_torch.architectures.recurrent_gemma import RecurrentGemma, RecurrentGemmaConfig
from compat_torch.checkpoint import from_pretrained
from compat_torch.errors import CheckpointError
from compat_torch.generation import generate
from compat_torch.quantization import mean_loss, quantize_weights
from spyx import quant

TRAINED = Path(__file__).parents[2] / "parity" / "golden" / "hf_mamba_trained"


@pytest.fixture(scope="module")
def model():
    return from_pretrained(TRAINED / "hf")


@pytest.fixture(scope="module")
def io():
    return load_file(TRAINED / "io.safetensors")


@pytest.fixture(scope="module")
def rounded(model, io):
    return quantize_weights(model, io["heldout_ids"])


def test_loss_is_the_reference_s(model, io):
    assert mean_loss(model, io["heldout_ids"]) == pytest.approx(float(io["heldout_token_loss"].mean()), abs=2e-6)


def test_loss_of_rows_is_that_of_their_valid_tokens(model, io):
    ids = io["heldout_ids"][0, :34].reshape(2, 17)
    rows = [mean_loss(model, ids[:1, :9]), mean_loss(model, ids[1:])]
    assert mean_loss(model, ids, np.array([9, 17])) == pytest.approx((8 * rows[0] + 16 * rows[1]) / 24, abs=1e-6)


def test_int8_changes_the_held_out_loss_by_less_than_a_thousandth(rounded):
    _, report = rounded
    assert report.loss_before != report.loss_after
    assert abs(report.loss_after - report.loss_before) < 1e-3


def test_rounded_weights_are_not_left_out_of_what_is_saved(rounded, tmp_path):
    small = rounded[0]
    for save in (small.state_dict, lambda: small.save_pretrained(tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"_proj holds rounded weights \(int8\).*save the float model"):
            save()
    assert not list(tmp_path.iterdir())


def test_int8_weights_take_a_quarter_of_the_bytes(rounded):
    layers = rounded[1].layers
    dense = [row for row in layers.rows if row.layer == "Linear"]
    assert len(dense) == 12
    big = [row for row in dense if not row.path.endswith("dt_proj")]
    assert all(row.bytes_after < 0.27 * row.bytes_before for row in big)
    assert layers.bytes_after < 0.4 * layers.bytes_before
    assert {row.layer for row in layers.rows if row.weight != "int8"} == {"Embed", "MambaMixer", "Conv", "RMSNorm"}
    assert str(rounded[1]).splitlines()[-1].startswith("loss on the text: 1.44")


def test_it_computes_with_the_weights_that_it_stores(model, rounded, io):
    by_hand = nnx.clone(model)
    for layer, stored in zip(by_hand.backbone.layers, rounded[0].backbone.layers, strict=True):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            kernel = getattr(layer.mixer, name).kernel
            leaves = jax.tree.leaves(nnx.state(getattr(stored.mixer, name)))
            codes = next(np.asarray(x, np.float32) for x in leaves if x.dtype == jnp.int8)
            scale = next(np.asarray(x) for x in leaves if x.dtype == jnp.float32 and x.shape == (1, codes.shape[1]))
            before = np.asarray(kernel[...])
            np.testing.assert_allclose(scale[0], np.abs(before).max(0) / 127.5, rtol=1e-6)
            assert (np.abs(codes * scale - before) <= 0.5001 * scale).all()
            kernel.set_value(jnp.asarray(codes * scale))
    ids = io["heldout_ids"][:, :33]
    logits = [nnx.jit(lambda m, x: m(x).logits)(m, ids) for m in (by_hand, rounded[0])]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_generates(model, rounded, io):
    ids = generate(rounded[0], io["prompt_ids"], 24)
    logits = nnx.jit(lambda m, x: m(x).logits)(rounded[0], ids[:, :-1])
    np.testing.assert_array_equal(ids[0, 32:], np.argmax(logits[0, 31:], -1))
    assert model.backbone.layers[0].mixer.in_proj.kernel[...].dtype == jnp.float32


def test_recurrent_gemma():
    config = RecurrentGemmaConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=3, intermediate_size=24, num_attention_heads=2,
        attention_window_size=4, w_init_variance_scale=1.0,
    )  # fmt: skip
    model = RecurrentGemma(config, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    _, report = quantize_weights(model, ids)
    assert sum(row.weight == "int8" for row in report.layers.rows) == 3 * 3 + 2 * 3 + 4
    assert abs(report.loss_after - report.loss_before) < 0.05


def test_errors(model, rounded, io):
    with pytest.raises(ValueError, match="at least 2 valid"):
        mean_loss(model, io["heldout_ids"][:, :1])
    with pytest.raises(ValueError, match="weight_qtype"):
        quantize_weights(model, io["heldout_ids"][:, :9], "int99")
    with pytest.raises(ValueError, match="already holds"):
        quantize_weights(rounded[0], io["heldout_ids"][:, :9])


def test_the_text_and_its_lengths_are_checked(model, io):
    ids = np.concatenate([io["heldout_ids"][:, :9]] * 2)
    for wrong, error, message in (
        (ids.astype(np.float32), TypeError, "integer token ids"),
        (ids[0], ValueError, r"token ids \(B, L\)"),
        (np.where(ids == ids[0, 4], 256, ids), ValueError, "token ids must be from 0 to 255"),
        (np.where(ids == ids[0, 8], -1, ids), ValueError, "token ids must be from 0 to 255"),
    ):
        with pytest.raises(error, match=message):
            mean_loss(model, wrong)
    for lengths, error in ((5, ValueError), ([5], ValueError), ([5, 5, 5], ValueError), ([5.5, 5.0], TypeError)):
        with pytest.raises(error, match="lengths must"):
            mean_loss(model, ids, np.array(lengths))
    with pytest.raises(ValueError, match="lengths must have shape"):
        mean_loss(model, ids[:1], np.array([5, 5]))
    padded = ids.copy()
    padded[1, 4:] = -100
    assert mean_loss(model, padded, np.array([9, 4])) == mean_loss(model, ids, np.array([9, 4]))


def test_saved_and_put_back(model, rounded, io):
    ids = jnp.asarray(io["heldout_ids"][:, :9])
    saved = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(rounded[0]))}
    rules = quant.weights_only_rules(op_names=("dot_general",))
    empty = nnx.eval_shape(lambda: quant.quantize(nnx.clone(model), ids[:, :1], rules=rules, mode="ptq"))
    state = nnx.state(empty)
    for path, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(saved["/".join(map(str, path))]))
    nnx.update(empty, state)
    assert sum(array.nbytes for array in saved.values()) == rounded[1].layers.bytes_after
    np.testing.assert_array_equal(empty(ids).logits, rounded[0](ids).logits)
