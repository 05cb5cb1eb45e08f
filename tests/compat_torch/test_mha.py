"""compat_torch.layers: attention against torch's, its cache, the gated MLP and the block."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch.layers import MHA, Block, GatedMLP
from compat_torch.layers.block import layer_norm, rms_norm
from compat_torch.models.lti import LRU

OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "num_heads_kv": 2, "head_dim": 3, "softmax_scale": 0.7},
    {"causal": True, "mlp_dim": 10, "d_conv": 3},
    {"causal": True, "num_heads_kv": 1, "qkv_proj_bias": False, "out_proj_bias": False, "d_conv": 1},
]


def make(embed_dim=8, num_heads=4, **kwargs):
    return MHA(embed_dim, num_heads, **kwargs, rngs=nnx.Rngs(0))


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def by_torch(layer, x):
    """The same attention from torch's parts."""
    w = {name: torch.from_numpy(np.array(value)) for name, value in layer.state_dict().items()}
    x = torch.from_numpy(np.array(x))
    B, L, _ = x.shape
    G, H, E = layer.num_heads_kv, layer.num_heads, layer.head_dim
    qkv = torch.nn.functional.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
    qkv, gated = qkv[..., : E * (H + 2 * G)], qkv[..., E * (H + 2 * G) :]
    if layer.d_conv:
        padded = torch.nn.functional.pad(qkv.transpose(1, 2), (layer.d_conv - 1, 0))
        qkv = torch.nn.functional.conv1d(padded, w["conv1d.weight"], w["conv1d.bias"], groups=qkv.shape[-1]).transpose(
            1, 2
        )
    q, k, v = qkv.split([H * E, G * E, G * E], -1)
    q, k, v = (t.reshape(B, L, -1, E).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=layer.causal, scale=layer.softmax_scale)
    y = y.transpose(1, 2).reshape(B, L, -1)
    if layer.mlp_dim:
        up, gate = gated.chunk(2, -1)
        y = torch.cat([y, up * torch.nn.functional.silu(gate)], -1)
    return torch.nn.functional.linear(y, w["out_proj.weight"], w.get("out_proj.bias")).numpy()


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_torchs_attention(options):
    layer, x = make(**options), noise(2, 7, 8)
    np.testing.assert_allclose(layer(x), by_torch(layer, x), atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS[2:4])
def test_pieces_and_steps_are_the_whole(options):
    layer, x = make(**options, rotary_emb_dim=2), noise(2, 7, 8)
    whole = layer(x)
    cache, parts = layer.allocate_inference_cache(2, 9), []
    for piece in (slice(0, 3), slice(3, 3), slice(3, 6), slice(6, 7)):
        y, cache = layer(x[:, piece], inference_cache=cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-6)
    np.testing.assert_array_equal(cache["seqlen_offset"], [7, 7])
    y, cache = layer.step(x[:, :1], cache)
    np.testing.assert_allclose(y, layer(jnp.concatenate([x, x[:, :1]], 1))[:, -1:], atol=2e-6)


@pytest.mark.parametrize("options", [OPTIONS[4], *(pytest.param(o, marks=pytest.mark.full) for o in OPTIONS[:4])])
def test_padding_reaches_nothing(options):
    layer, x, lengths = make(**options), noise(3, 5, 8), jnp.array([5, 2, 0])
    padded = jnp.where(jnp.arange(5)[:, None] < lengths[:, None, None], x, jnp.nan)
    y = layer(padded, lengths)
    np.testing.assert_allclose(y[1, :2], layer(x[1:2, :2])[0], atol=2e-6)
    np.testing.assert_array_equal(y[1, 2:], 0)
    np.testing.assert_array_equal(y[2], 0)
    grads = nnx.grad(lambda m, v: jnp.sum(m(v, lengths) ** 2), argnums=(0, 1))(layer, padded)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.full
def test_a_padded_prompt_continues_where_it_ended():
    layer, x = make(causal=True, d_conv=2), noise(2, 5, 8)
    y, cache = layer(x, jnp.array([5, 2]), layer.allocate_inference_cache(2, 8))
    y, cache = layer(x[:, :1], inference_cache=cache)
    np.testing.assert_array_equal(cache["seqlen_offset"], [6, 3])
    alone = layer(jnp.concatenate([x[1:, :2], x[1:, :1]], 1))
    np.testing.assert_allclose(y[1, 0], alone[0, -1], atol=2e-6)


def test_a_full_cache_gives_nan_not_a_wrong_answer():
    layer, x = make(causal=True), noise(1, 3, 8)
    _, cache = layer(x, inference_cache=layer.allocate_inference_cache(1, 4))
    y, _ = layer(x[:, :2], inference_cache=cache)
    assert np.isfinite(y[:, 0]).all()
    assert np.isnan(y[:, 1]).all()
    with pytest.raises(ValueError, match="room for 4 steps, got 5"):
        layer(noise(1, 5, 8), inference_cache=layer.allocate_inference_cache(1, 4))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_depends_on_the_distance_alone(interleaved):
    layer = make(rotary_emb_dim=2, rotary_emb_interleaved=interleaved, num_heads=2)
    q, k = noise(1, 1, 2, 4), noise(1, 1, 2, 4, seed=1)

    def product(at_q, at_k):
        return jnp.sum(layer._rotate(q, jnp.full((1, 1), at_q)) * layer._rotate(k, jnp.full((1, 1), at_k)))

    np.testing.assert_allclose(product(5, 3), product(105, 103), rtol=1e-4)
    assert abs(float(product(5, 3) - product(5, 4))) > 1e-3
    angle = 3.0
    turned = layer._rotate(q, jnp.full((1, 1), 3))[0, 0, 0]
    a, b = q[0, 0, 0, 0], q[0, 0, 0, 1]
    np.testing.assert_allclose(turned[0], a * np.cos(angle) - b * np.sin(angle), rtol=1e-5)
    np.testing.assert_array_equal(turned[2:], q[0, 0, 0, 2:])


def test_what_it_cannot_do_raises():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
        make(num_heads=3)
    with pytest.raises(ValueError, match="num_heads_kv must divide num_heads"):
        make(num_heads_kv=3)
    with pytest.raises(ValueError, match="rotary_emb_dim must be even"):
        make(rotary_emb_dim=1)
    with pytest.raises(ValueError, match="causal=False sees the whole sequence"):
        make().allocate_inference_cache(1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp_dim": -3}, "mlp_dim must be an integer, at least 0, got -3"),
        ({"d_conv": -1}, "d_conv must be an integer, at least 0, got -1"),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"head_dim": 1.5}, "head_dim must be a positive integer, got 1.5"),
        ({"rotary_emb_dim": 2.0}, "rotary_emb_dim must be an integer, at least 0, got 2.0"),
        ({"rotary_emb_base": 0}, "rotary_emb_base must be positive, got 0"),
        ({"num_heads": np.int64(4)}, r"num_heads must be a positive integer, got .*4.*; pass int\(num_heads\)"),
    ],
)
def test_sizes_of_attention_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_caches_of_attention_that_do_not_fit():
    layer, x = make(causal=True, d_conv=2), noise(2, 1, 8)
    cache = layer.allocate_inference_cache(2, 4)
    for name, shape in (("kv_cache", "2, 4, 2, 4, 2"), ("conv_state", "2, 24, 2"), ("seqlen_offset", "2,")):
        for wrong in (None, np.zeros((1,)), layer.allocate_inference_cache(3, 4)[name]):
            with pytest.raises(ValueError, match=rf"{name} must have shape \({shape}\) for this input|kv_cache must"):
                layer.step(x, {**cache, name: wrong})
        with pytest.raises(TypeError, match=f"{name} must be"):
            layer.step(x, {**cache, name: cache[name].astype(jnp.int32 if name != "seqlen_offset" else jnp.float32)})
        with pytest.raises(ValueError, match=r"must have the keys .*'conv_state', 'kv_cache', 'seqlen_offset'"):
            layer(x, inference_cache={other: leaf for other, leaf in cache.items() if other != name})
    with pytest.raises(ValueError, match=r"must have the keys .* got NoneType"):
        layer.step(x, None)
    with pytest.raises(ValueError, match=r"step takes one step, \(B, 1, H\), got shape \(2, 2, 8\)"):
        layer.step(noise(2, 2, 8), cache)


def test_the_gated_mlp_is_torchs():
    layer, x = GatedMLP(3, 5, 4, bias=True, multiple_of=4, rngs=nnx.Rngs(0)), noise(2, 3)
    w = {name: torch.from_numpy(np.array(v)) for name, v in {
        "fc1.weight": layer.fc1.kernel[...].T, "fc1.bias": layer.fc1.bias[...],
        "fc2.weight": layer.fc2.kernel[...].T, "fc2.bias": layer.fc2.bias[...]}.items()}  # fmt: skip
    assert w["fc1.weight"].shape == (16, 3)
    a, b = torch.nn.functional.linear(torch.from_numpy(np.array(x)), w["fc1.weight"], w["fc1.bias"]).chunk(2, -1)
    expected = torch.nn.functional.linear(a * torch.nn.functional.silu(b), w["fc2.weight"], w["fc2.bias"])
    np.testing.assert_allclose(layer(x), expected, atol=2e-6)
    assert GatedMLP(6, rngs=nnx.Rngs(0)).fc1.out_features == 256


def test_a_gated_mlp_can_be_copied_and_pickled():
    layer, x = GatedMLP(3, 5, multiple_of=4, rngs=nnx.Rngs(0)), noise(2, 3)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be a positive integer, got 0"),
        ({"hidden_features": -5}, ValueError, "hidden_features must be a positive integer, got -5"),
        ({"out_features": 0}, ValueError, "out_features must be a positive integer, got 0"),
        ({"multiple_of": 0}, ValueError, "multiple_of must be a positive integer, got 0"),
        ({"activation": "silu"}, TypeError, "activation must be a function, such as jax.nn.silu, got 'silu'"),
        ({"dtype": jnp.int32}, TypeError, "GatedMLP: dtype must be a real floating point dtype"),
        ({"param_dtype": torch.float32}, TypeError, r"param_dtype must be a real .* got torch\.float32"),
    ],
)
def test_arguments_of_the_gated_mlp_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        GatedMLP(**{"in_features": 4, **arguments})


def test_inputs_of_the_gated_mlp_that_do_not_fit():
    layer = GatedMLP(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expects input \(\.\.\., 3\), got shape \(2, 4\)"):
        layer(noise(2, 4))
    with pytest.raises(TypeError, match="expects real floating point input, got int32"):
        layer(jnp.ones((2, 3), jnp.int32))


def test_torch_tensors_come_back_as_torch_tensors():
    x = np.array(noise(2, 5, 4))
    attention, mlp = make(4, 2, causal=True), GatedMLP(4, 8, rngs=nnx.Rngs(1))
    block = Block(4, lambda dim: LRU(dim, 3, rngs=nnx.Rngs(0)))
    for layer in (attention, mlp, block):
        y = layer(torch.from_numpy(x))
        assert all(isinstance(leaf, torch.Tensor) for leaf in jax.tree.leaves(y))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), y, layer(x))
    y, _ = attention.step(torch.from_numpy(x[:, :1]), attention.allocate_inference_cache(2, 3))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_allclose(y, attention(x[:, :1]), atol=1e-6)
    hidden, _, _ = block.step(torch.from_numpy(x[:, :1]), None, block.mixer.allocate_inference_cache(2))
    assert isinstance(hidden, torch.Tensor)


@pytest.mark.parametrize(("norm", "theirs"), [(layer_norm, torch.nn.LayerNorm), (rms_norm, torch.nn.RMSNorm)])
def test_norms_are_torchs(norm, theirs):
    x = 100 + noise(5, 6)  # E[x^2] - E[x]^2 would be off by 1e-3 here; the rounding of x alone is 8e-6
    np.testing.assert_allclose(norm(6, 1e-5)(x), theirs(6, 1e-5)(torch.from_numpy(np.array(x))).detach(), atol=3e-5)


def test_the_residual_runs_beside_the_block():
    block = Block(4, lambda dim: LRU(dim, 3, rngs=nnx.Rngs(0)), lambda dim: GatedMLP(dim, 8, rngs=nnx.Rngs(1)))
    x, residual = noise(2, 5, 4), noise(2, 5, 4, seed=1)
    stream = x + residual
    mixed = block.mixer(block.norm(stream))
    hidden, after = block(x, residual)
    np.testing.assert_allclose(after, stream + mixed, atol=1e-6)
    np.testing.assert_allclose(hidden, block.mlp(block.norm2(stream + mixed)), atol=1e-6)
