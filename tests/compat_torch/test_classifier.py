"""compat_torch.architectures.classifier, embedding: definitions, lengths, layers by name, dropout, dtypes, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import torch_models

import compat_torch
from compat_torch.architectures.classifier import Classifier, ClassifierBlock, SequencePooling
from compat_torch.architectures.embedding import PositionEmbedding, TokenEmbedding
from compat_torch.models import lti, ltv

LENGTHS = np.array([13, 7, 1, 4])
CENTAURUS = partial(lti.Centaurus, sub_state_dim=2)
S5 = partial(lti.S5, discretization="zoh")


def make(seed=0, **kwargs):
    kwargs = {"input_dim": 3, "num_classes": 5, "d_model": 4, "d_state": 3, "n_layers": 2, **kwargs}
    model = Classifier(**kwargs, rngs=nnx.Rngs(seed))
    model.eval()
    return model


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(actual, expected, tolerance=5e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


@nnx.jit
def call(model, *args):
    return model(*args)


@partial(nnx.jit, static_argnames="loss")
def gradients(model, loss):
    return compat_torch.state_dict(nnx.grad(loss)(model))


def pad_with_nan(x, lengths):
    valid = np.arange(x.shape[1]) < np.asarray(lengths)[:, None]
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.nan)


# The definition


@pytest.mark.parametrize(
    ("pooling", "windows", "reference", "lengths"),
    [
        ("last", [("none", 2)] * 2, "lrnnx", None),
        ("max", [("mean", 3), ("none", 2)], "lrnnx", LENGTHS),
        ("mean", [("max", 2), ("stride", 3)], "lrnnx", LENGTHS),
        ("last", [("mean", 3), ("max", 2)], "paper", LENGTHS),
        ("max", [("stride", 2), ("mean", 2)], "paper", LENGTHS),
    ],
)
def test_outputs_and_gradients_are_those_of_the_definition(pooling, windows, reference, lengths):
    kinds, factors = zip(*windows, strict=True)
    model = make(
        pooling=pooling, intermediate_pooling=kinds, pooling_factor=factors, reference=reference, lrnn_cls="LRU"
    )
    x, w = noise(4, 13, 3), noise(4, 5, seed=1)
    oracle = torch_models.load(torch_models.Classifier(3, 5, 4, 3, 2), model.state_dict())
    cut = np.full(4, 13) if lengths is None else lengths
    expected = oracle(torch.tensor(np.asarray(x)).double(), cut, pooling, windows, reference)
    close(call(model, x, lengths), expected.detach())
    ours = gradients(model, lambda m: jnp.sum(m(x, lengths) * w))
    theirs = torch_models.gradients(oracle, (expected * torch.tensor(np.asarray(w))).sum())
    assert ours.keys() == theirs.keys()
    for name in theirs:
        close(ours[name], theirs[name], 2e-5)


@pytest.mark.parametrize("seed", range(2))
def test_gradients_of_maxima_are_whole_when_compiled(seed):
    """A compiler that computes a value once more for its gradient must not lose which one was the maximum."""
    model = make(seed, d_model=6, d_state=5, pooling="max", intermediate_pooling="max", lrnn_cls="LRU")
    x, w = noise(2, 13, 3, seed=seed), noise(2, 5, seed=seed + 1)
    oracle = torch_models.load(torch_models.Classifier(3, 5, 6, 5, 2), model.state_dict())
    expected = oracle(torch.tensor(np.asarray(x)).double(), [13, 13], "max", [("max", 2)] * 2, "lrnnx")
    theirs = torch_models.gradients(oracle, (expected * torch.tensor(np.asarray(w))).sum())
    ours = gradients(model, lambda m: jnp.sum(m(x) * w))
    for name in theirs:
        close(ours[name], theirs[name], 2e-5)


def test_token_ids():
    model = make(vocab_size=9, embedding_dim=3, padding_idx=2, num_classes=0, output_dim=2, pooling="mean")
    ids = np.random.default_rng(0).integers(0, 9, (3, 7))
    oracle = torch_models.load(torch_models.Classifier(3, 2, 4, 3, 2, vocab_size=9, padding_idx=2), model.state_dict())
    expected = oracle(torch.tensor(ids), [7, 5, 2], "mean", [("none", 2)] * 2, "lrnnx")
    lengths = jnp.array([7, 5, 2])
    close(call(model, ids, lengths), expected.detach())
    ours = gradients(model, lambda m: jnp.sum(m(ids, lengths) ** 2))
    theirs = torch_models.gradients(oracle, (expected**2).sum())
    for name in theirs:
        close(ours[name], theirs[name], 2e-5)
    assert not ours["embedding.token_embedding.weight"][2].any()
    vectors = model.embedding(jnp.asarray(ids))
    close(model(vectors, lengths), expected.detach())
    outside = np.where(np.arange(7) < np.array([7, 5, 2])[:, None], ids, -77)
    np.testing.assert_array_equal(model(outside, lengths), model(ids, lengths))
    assert jnp.isnan(model(ids.astype(np.int32) * 0 + 9)).all()
    assert jnp.isnan(model(jnp.full((1, 2), -1))).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_pooling_over_windows(data):
    B, L, k = (data.draw(st.integers(1, top)) for top in (3, 9, 4))
    kind = data.draw(st.sampled_from(["stride", "mean", "max"]))
    reference = data.draw(st.sampled_from(["lrnnx", "paper"]))
    k, L = k + 1, max(L, k + 1)
    lengths = np.array(data.draw(st.lists(st.integers(0, L + 2), min_size=B, max_size=B)))
    x, ts = np.array(noise(B, L, 2, seed=L)), 0.1 + np.arange(B * L, dtype=np.float32).reshape(B, L)
    y, ts_after, after = SequencePooling(kind, k, reference=reference)(
        pad_with_nan(x, lengths), lengths, pad_with_nan(ts, lengths)
    )
    for b, n in enumerate(np.minimum(lengths, L)):
        total = L // k if kind != "stride" and reference == "lrnnx" else -(-L // k)
        assert y.shape[1] == ts_after.shape[1] == total
        assert after[b] == min(-(-n // k), total)
        if not n:
            continue
        expected, _ = torch_models.pool(torch.tensor(x[b, :n]), L, kind, k, reference)
        close(y[b, : after[b]], expected.numpy()[: after[b]])
        sums = [ts[b, i : min(i + k, n)] for i in range(0, n, k)][: after[b]]
        kept = kind == "stride" and reference == "lrnnx"
        close(ts_after[b, : after[b]], [part[0] if kept else part.sum() for part in sums])


def test_a_row_without_steps_pools_to_zero():
    x = jnp.full((2, 5, 3), jnp.nan).at[1].set(-4.0)
    for kind in ("last", "mean", "max"):
        pool = SequencePooling(kind)
        np.testing.assert_array_equal(pool(x, jnp.array([0, 5]))[0], [[0] * 3, [-4] * 3])
        np.testing.assert_array_equal(pool(x[:, :0])[0], np.zeros((2, 3)))
        assert make(pooling=kind)(noise(2, 0, 3)).shape == (2, 5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_means_of_many_steps_in_half_precision(dtype):
    x = jnp.full((1, 70001, 1), 1.375, dtype)
    np.testing.assert_array_equal(SequencePooling("mean")(x)[0], [[1.375]])
    np.testing.assert_array_equal(SequencePooling("mean")(x, 257)[0], [[1.375]])
    np.testing.assert_array_equal(SequencePooling("mean", 70001)(x)[0], [[[1.375]]])


# Lengths


def slow(layer):
    return pytest.param(layer, marks=pytest.mark.full)


@pytest.mark.parametrize(
    "layer",
    ["LRU", "S4D", "Mamba", *map(slow, (S5, CENTAURUS, "S4", "RGLRU", "S7", "ltv.S5"))],
    ids=lambda layer: getattr(layer, "func", layer),
)
def test_padding_reaches_nothing(layer):
    model = make(lrnn_cls=layer, intermediate_pooling=["max", "none"], pooling="mean", reference="paper")
    x, lengths = noise(3, 9, 3), jnp.array([9, 5, 2])

    @nnx.jit
    def run(model, x):
        def loss(m, x):
            y = m(x, lengths)
            return jnp.sum(y**2), y

        (_, y), (of_parameters, of_x) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)
        return y, compat_torch.state_dict(of_parameters), of_x

    y, of_parameters, of_x = run(model, pad_with_nan(x, lengths))
    expected, expected_gradients, _ = run(model, x)
    np.testing.assert_array_equal(y, expected)
    for name, value in expected_gradients.items():
        np.testing.assert_array_equal(of_parameters[name], value)
        assert jnp.isfinite(value).all(), name
    padding = np.arange(9) >= np.asarray(lengths)[:, None]
    assert not of_x[padding].any()
    assert jnp.abs(of_x[~padding]).sum(-1).all()
    close(call(model, x[1:2, :5]), y[1:2])


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_masked_loss_is_unpadded_loss(pooling):
    model = make(pooling=pooling, intermediate_pooling="stride", pooling_factor=3)
    x, lengths, labels = noise(3, 13, 3), LENGTHS[:3], jnp.array([1, 0, 4])

    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    alone = sum(loss(call(model, x[i : i + 1, :n]), labels[i : i + 1]) for i, n in enumerate(lengths))
    close(loss(call(model, x, lengths), labels), alone)


def test_lengths_may_be_an_integer():
    model, x = make(), noise(2, 6, 3)
    close(model(x, 4), model(x[:, :4]))
    np.testing.assert_array_equal(model(x, np.array([6, 6], np.uint8)), model(x, 6))
    np.testing.assert_array_equal(model(x, jnp.array([9, -3])), model(x, jnp.array([6, 0])))


def test_timesteps_reach_the_time_varying_layers():
    model = make(lrnn_cls=["ltv.S5", "LRU"], pooling="mean", intermediate_pooling=["mean", "none"])
    x, ts, lengths = noise(2, 8, 3), 0.5 + jnp.abs(noise(2, 8, seed=3)), jnp.array([8, 4])
    y = model(x, lengths, ts)
    np.testing.assert_array_equal(model(x, lengths, pad_with_nan(ts, lengths)[..., None]), y)
    block, h = model.blocks[0], model.input_proj(x)
    h = block.norm(h + block.lrnn(h, ts, lengths)).reshape(2, 4, 2, 4).mean(2)
    final = model.final_block
    h = final.norm(h + final.lrnn(h))
    expected = final.output_proj(jnp.stack([h[0].mean(0), h[1, :2].mean(0)]))
    close(y, expected)
    assert jnp.abs(y - model(x, lengths)).max() > 1e-3


def test_timesteps_pass_by_the_layers_without_an_event_mode():
    model, x, ts = make(lrnn_cls=["RGLRU", "Mamba"]), noise(2, 5, 3), 0.5 + jnp.abs(noise(2, 5, seed=3))
    h = model.blocks[0](model.input_proj(x))[0]
    close(model(x, integration_timesteps=ts), model.final_block(h, ts))
    with pytest.raises(ValueError, match="the layers are RGLRU, S7"):
        make(lrnn_cls=["RGLRU", "S7"])(x, integration_timesteps=ts)


# Layers


@pytest.mark.parametrize(
    ("layer", "cls"),
    [
        ("LRU", lti.LRU),
        ("S4D", lti.S4D),
        ("Mamba", ltv.Mamba),
        ("ltv.S5", ltv.S5),
        ("compat_torch.models.ltv.RGLRU", ltv.RGLRU),
        ("lrnnx.models.ltv.s5:S5", ltv.S5),
        ("lrnnx.models.lti.lru.LRU", lti.LRU),
        (ltv.S7, ltv.S7),
        (partial(ltv.Mamba, expand=1), ltv.Mamba),
        (partial(lti.S4, 4, None), lti.S4),
    ],
    ids=str,
)
def test_a_layer_has_many_names(layer, cls):
    model = make(lrnn_cls=layer)
    for block in (*model.blocks, model.final_block):
        assert type(block.lrnn) is cls
        assert getattr(block.lrnn, "d_state", 3) == 3


def test_arguments_of_the_layers():
    model = make(
        n_layers=3,
        lrnn_cls=["S5", "Centaurus", partial(ltv.Mamba, d_state=2)],
        lrnn_params=[{"discretization": "zoh", "d_state": 7}, {"sub_state_dim": 2, "mode": "dws", "d_state": 4}, {}],
        precision="default",
        param_dtype=jnp.bfloat16,
    )
    s5, centaurus, mamba = (block.lrnn for block in (*model.blocks, model.final_block))
    assert (s5.d_state, type(centaurus), mamba.d_state) == (7, lti.CentaurusDWS, 2)
    assert {layer.precision for layer in (s5, centaurus, mamba)} == {"default"}
    assert {s5.B.dtype, centaurus.B.dtype, mamba.in_proj.kernel.dtype} == {jnp.dtype(jnp.bfloat16)}
    documented = make(lrnn_params={"d_model": 4, "d_state": 6})
    assert documented.final_block.lrnn.d_state == 6
    assert make(lrnn_cls="S4", lrnn_params={"dropout": 0.3}, dropout=0.0).final_block.lrnn.drop.rate == 0.3
    assert not make(lrnn_cls="S4D", lrnn_params={"transposed": False}).final_block.lrnn.transposed


def test_a_layer_of_ones_own():
    class Sum(nnx.Module):
        def __call__(self, x, integration_timesteps, lengths):
            return jnp.cumsum(x, 1) + (0 if integration_timesteps is None else integration_timesteps[..., None])

    model, x = make(lrnn_cls=["LRU", Sum]), noise(2, 5, 3)
    assert jnp.abs(model(x) - model(x, integration_timesteps=jnp.ones((2, 5)))).max() > 0
    block = ClassifierBlock(4, 3, "Mamba", is_final=True, expand=1, rngs=nnx.Rngs(0))
    block.eval()
    assert block.lrnn.d_inner == 4
    assert block(noise(2, 5, 4)).shape == (2, 1)


def test_parameters_have_the_names_of_the_reference():
    names = set(make(vocab_size=6, embedding_dim=3, n_layers=3).state_dict())
    assert {name for name in names if "lrnn" not in name} == {
        "embedding.token_embedding.weight", "embed_proj.weight", "embed_proj.bias", "blocks.0.norm.weight",
        "blocks.0.norm.bias", "blocks.1.norm.weight", "blocks.1.norm.bias", "final_block.norm.weight",
        "final_block.norm.bias", "final_block.output_proj.weight", "final_block.output_proj.bias",
    }  # fmt: skip
    assert {"blocks.1.lrnn.nu_log", "final_block.lrnn.D"} < names
    assert not any(name.startswith("embed_proj") for name in make(vocab_size=6).state_dict())


# Embeddings and dropout


def test_embeddings():
    embedding = TokenEmbedding(50, 20, padding_idx=-1, dropout=0.0, rngs=nnx.Rngs(0))
    weight = embedding.token_embedding.embedding[...]
    assert embedding.padding_idx == 49
    assert not weight[49].any()
    assert 0.9 < weight[:49].std() < 1.1
    ids = jnp.array([[3, 49, 0]])
    np.testing.assert_array_equal(embedding(ids), weight[ids])
    placed = TokenEmbedding(5, 4, max_position_embeddings=6, use_position=True, dropout=0.0, rngs=nnx.Rngs(1))
    assert list(compat_torch.state_dict(placed)) == [
        "token_embedding.weight", "position_embedding.position_embedding.weight"
    ]  # fmt: skip
    token, position = compat_torch.state_dict(placed).values()
    ids = jnp.array([[1, 1, 4], [0, 2, 2]])
    np.testing.assert_array_equal(placed(ids), token[ids] + position[:3])
    assert TokenEmbedding(1, 2, dropout=0.0)(jnp.zeros((2, 3), int)).shape == (2, 3, 2)
    assert jnp.isnan(PositionEmbedding(3, 2)(jnp.array([3, -1]))).all()


def test_positions_belong_to_the_paper():
    options = {"vocab_size": 6, "max_position_embeddings": 5}
    assert not any("position" in name for name in make(**options).state_dict())
    model = make(**options, reference="paper")
    assert "embedding.position_embedding.position_embedding.weight" in model.state_dict()
    ids = jnp.array([[1, 2, 1]])
    first, _, again = model.embedding(ids)[0]
    assert jnp.abs(first - again).min() > 0
    with pytest.raises(ValueError, match=r"positions for 5 steps .* got 6"):
        model(jnp.zeros((1, 6), int))


@pytest.mark.parametrize("layer", ["LRU", partial(lti.S4D, dropout=0.4)])
def test_dropout(layer):
    model, ids = make(vocab_size=6, lrnn_cls=layer, dropout=0.5), jnp.array([[1, 2, 3, 4]])
    y = model(ids)
    np.testing.assert_array_equal(model(ids, rngs=nnx.Rngs(0)), y)
    model.train()
    with pytest.raises(ValueError, match=r"dropout=0\.5 in training mode needs rngs"):
        model(ids)
    a, b, again = (model(ids, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert jnp.abs(a - b).max() > 1e-3
    vectors = TokenEmbedding(50, 40, dropout=0.25, rngs=nnx.Rngs(0))
    ids = jnp.arange(50)[None]
    dropped = vectors(ids, rngs=nnx.Rngs(dropout=2)) / vectors.token_embedding.embedding[...]
    close(dropped, np.where(dropped > 0, 4 / 3, 0))
    assert 0.7 < (dropped > 0).mean() < 0.8


# Machinery


def test_it_learns_from_sequences_with_lengths():
    """Which of three inputs came last, in rows of different lengths."""
    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(2, 9, 12), rng.integers(0, 3, 12)
    x = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (12, 9))]
    x[np.arange(12), lengths - 1] = np.eye(3)[labels]
    x = pad_with_nan(x, lengths)
    model = Classifier(3, 3, d_model=8, d_state=4, n_layers=2, lrnn_cls=["LRU", "Mamba"], dropout=0.1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rngs):
        def loss(m, rngs):
            logits = m(x, lengths, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model, rngs)
        optimizer.update(model, grads)
        return value

    rngs = nnx.Rngs(dropout=0)
    losses = [float(step(model, optimizer, rngs)) for _ in range(120)]
    assert np.mean(losses[-5:]) < losses[0] / 10


def test_transformations():
    model, x, lengths = make(lrnn_cls=["S4D", "LRU"], pooling="max"), noise(3, 7, 3), jnp.array([7, 3, 5])
    y = call(model, x, lengths)
    one = jax.jit(lambda x, n: jax.vmap(lambda x, n: model(x[None], n[None])[0])(x, n))
    close(one(x, lengths), y)
    abstract = nnx.eval_shape(lambda: make(lrnn_cls=["S4D", "LRU"], pooling="max"))
    abstract.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(call(abstract, x, lengths), y)
    small = make(n_layers=1)
    with torch.no_grad():
        from_torch = small.forward(torch.tensor(np.asarray(x)), lengths=torch.tensor(np.asarray(lengths)))
    assert isinstance(from_torch, torch.Tensor)
    close(from_torch, small(x, lengths))


def test_parts_take_torch_tensors():
    x, ids = noise(2, 5, 4), np.array([[1, 2, 0]])
    block = ClassifierBlock(4, 3, "LRU", dropout=0.0, is_final=True, rngs=nnx.Rngs(0))
    tokens = TokenEmbedding(5, 4, dropout=0.0, rngs=nnx.Rngs(0))
    for part, value in (
        (block, x), (SequencePooling("mean"), x), (tokens, ids), (PositionEmbedding(3, 4, rngs=nnx.Rngs(0)), ids)
    ):  # fmt: skip
        found, wanted = jax.tree.leaves((part(torch.tensor(np.array(value))), part(value)))
        assert isinstance(found, torch.Tensor)
        close(found, wanted)


def test_dtypes():
    model, x = make(lrnn_cls=["LRU", "Mamba"]), noise(2, 7, 3)
    y = call(model, x)
    low = call(model, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    close(low.astype(jnp.float32), y, 2e-2)
    half = make(lrnn_cls=["LRU", "Mamba"], dtype=jnp.bfloat16)
    assert half.final_block.norm.scale.dtype == call(half, x).dtype == jnp.bfloat16
    mixed = make(lrnn_cls=["LRU", "Mamba"], dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert mixed.final_block.norm.scale.dtype == jnp.float32
    y_mixed = call(mixed, x)
    assert y_mixed.dtype == jnp.bfloat16
    close(y_mixed.astype(jnp.float32), y, 3e-2)
    tokens = make(vocab_size=5, n_layers=1, param_dtype=jnp.bfloat16)
    assert call(tokens, jnp.zeros((1, 3), int)).dtype == jnp.bfloat16
    wide = nnx.eval_shape(lambda: make(lrnn_cls=["LRU", "Mamba"]))
    with jax.enable_x64(True):
        wide.load_state_dict(model.state_dict(), dtype=jnp.float64)
        y64 = call(wide, x.astype(jnp.float64))
        assert y64.dtype == jnp.float64
        close(y, y64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_layers": 0}, "n_layers must be a positive integer"),
        ({"input_dim": 0}, "input_dim must be a positive integer"),
        ({"num_classes": -1}, "num_classes must be an integer, at least 0"),
        ({"num_classes": 0, "output_dim": 0}, "output_dim must be an integer, at least 1"),
        ({"pooling": "stride"}, r"pooling must be one of \('mean', 'last', 'max'\), got 'stride'"),
        ({"intermediate_pooling": "last"}, "intermediate_pooling must be one of"),
        ({"intermediate_pooling": ["max"]}, "intermediate_pooling must have n_layers = 2 entries, got 1"),
        ({"intermediate_pooling": "max", "pooling_factor": 1}, "needs pooling_factor >= 2, got 1"),
        ({"pooling_factor": 0}, "pooling_factor must be a positive integer"),
        ({"lrnn_cls": ["LRU"] * 3}, "lrnn_cls must have n_layers = 2 entries, got 3"),
        ({"lrnn_params": [{}]}, "lrnn_params must have n_layers = 2 entries, got 1"),
        ({"lrnn_cls": "LSTM"}, "unknown layer 'LSTM'"),
        ({"lrnn_cls": "os.path.join"}, "unknown layer 'os.path.join'"),
        ({"lrnn_cls": "lti.lru.S5"}, "unknown layer"),
        ({"lrnn_cls": "S4", "lrnn_params": {"transposed": True}}, "transposed=True is not supported"),
        ({"lrnn_params": {"d_model": 5}}, "must keep the width d_model = 4, got d_model = 5"),
        ({"lrnn_cls": partial(lti.S4D, final_act=None, channels=2)}, "got d_output = 8"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"dropout": "0.1"}, r"dropout must be in \[0, 1\], got '0.1'"),
        ({"dropout": None}, r"dropout must be in \[0, 1\], got None"),
        ({"vocab_size": 5, "padding_idx": 1.5}, r"padding_idx must be in \[-5, 5\), got 1.5"),
        ({"d_model": np.int64(4)}, r"d_model must be a positive integer, got .*4.*; pass int\(d_model\)"),
        ({"embedding_dim": 4}, "embedding_dim need vocab_size"),
        ({"vocab_size": 5, "padding_idx": 5}, r"padding_idx must be in \[-5, 5\), got 5"),
        ({"reference": "original"}, "reference must be one of"),
    ],
)
def test_what_the_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_what_else_it_refuses():
    with pytest.raises(TypeError, match="discretization"):
        make(lrnn_cls="S5")
    with pytest.raises(TypeError, match="a layer must be a class, a name or"):
        make(lrnn_cls=3)
    with pytest.raises(TypeError, match=r"functools\.partial, got an instance of LRU$"):
        make(lrnn_cls=lti.LRU(4, 3, rngs=nnx.Rngs(0)))
    for dtype in (jnp.int32, jnp.complex64, torch.float32, "bf16"):
        with pytest.raises(TypeError, match="Classifier: param_dtype must be a real floating point dtype"):
            make(param_dtype=dtype)
    for sizes, name in (((0, 4), "vocab_size"), ((5, 0), "embedding_dim"), ((-1, 4), "vocab_size")):
        with pytest.raises(ValueError, match=f"TokenEmbedding: {name} must be a positive integer"):
            TokenEmbedding(*sizes)
    with pytest.raises(ValueError, match="PositionEmbedding: max_position_embeddings must be a positive integer"):
        PositionEmbedding(0, 4)
    with pytest.raises(TypeError, match="PositionEmbedding: param_dtype must be a real floating point dtype"):
        PositionEmbedding(3, 4, param_dtype=jnp.int32)
    with pytest.raises(ValueError, match="use_position=True needs max_position_embeddings"):
        TokenEmbedding(5, 4, use_position=True)
    with pytest.raises(ValueError, match=r"pooling_type must be one of .* with stride=2, got 'last'"):
        SequencePooling("last", 2)
    with pytest.raises(ValueError, match="stride must be a positive integer"):
        SequencePooling("last", 0)


def test_what_a_call_refuses():
    model, tokens, x = make(), make(vocab_size=6, embedding_dim=3), noise(2, 5, 3)
    for wrong in (x[0], x[..., :2]):
        with pytest.raises(ValueError, match=r"expects input \(B, L, 3\), got shape"):
            model(wrong)
    with pytest.raises(TypeError, match=r"real floating point input .*, got int32"):
        model(jnp.ones((2, 5, 3), jnp.int32))
    with pytest.raises(TypeError, match=r"integer token ids \(B, L\), got float32"):
        tokens(x[..., 0])
    with pytest.raises(ValueError, match=r"token ids \(B, L\) or vectors \(B, L, 3\), got shape \(2, 5, 2\)"):
        tokens(x[..., :2])
    with pytest.raises(TypeError, match="lengths must be integers, got float32"):
        model(x, jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"lengths must have shape \(B,\) = \(2,\), or be one integer, got shape \(3,\)"
    ):
        model(x, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"needs a layer with an event mode .*, the layers are LRU"):
        model(x, integration_timesteps=jnp.ones((2, 5)))
    events = make(lrnn_cls="Mamba")
    with pytest.raises(ValueError, match=r"must have shape \(B, L\) = \(2, 5\)"):
        events(x, integration_timesteps=jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="must be floating point, got int32"):
        events(x, integration_timesteps=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="'mean' needs at least stride = 2 steps, got 1"):
        make(intermediate_pooling="mean")(x[:, :1])
    with pytest.raises(ValueError, match=r"SequencePooling expects \(B, L, H\)"):
        SequencePooling("max")(x[0])
