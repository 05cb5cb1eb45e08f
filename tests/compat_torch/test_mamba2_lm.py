"""Mamba-2 against transformers with fresh weights, its mixer against a loop; step size limits, pieces, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles.selective import silu
from oracles.ssd import ssd as by_definition
from oracles.transformers_models import (
    close,
    gradients_of,
    outputs_of,
    reference,
    state_spaces_name,
    twin,
)

from compat_torch.architectures.mamba2_lm import Mamba2Config, Mamba2LMHeadModel
from compat_torch.models.ltv.mamba2 import Mamba2
from compat_torch.state import state_dict

SIZES = {
    "vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4, "num_heads": 4,
    "head_dim": 6, "n_groups": 2, "chunk_size": 8, "layer_norm_epsilon": 1e-4,
}  # fmt: skip
LIMITED = {"time_step_limit": (0.1, 0.7), "tie_word_embeddings": True, "use_bias": True}

run = nnx.jit(lambda model, ids: model(ids, output_hidden_states=True))


def ours(theirs):
    return twin(theirs, Mamba2LMHeadModel, state_spaces_name)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


@pytest.fixture(scope="module")
def pair():
    theirs = reference("Mamba2", **SIZES, **LIMITED)
    return theirs, ours(theirs)


def check_it_is_transformers(theirs, B, L, seed=0):
    model, ids = ours(theirs), tokens(B, L, seed=seed)
    logits, states = outputs_of(theirs, ids)
    out = run(model, ids)
    assert out.logits.dtype == jnp.float32
    close(out.logits, logits)
    for mine, state in zip(out.hidden_states, states, strict=True):
        close(mine, state)


def test_is_transformers():
    check_it_is_transformers(reference("Mamba2", seed=1, **SIZES), 2, 17)


def test_is_transformers_with_limits(pair):
    theirs, model = pair
    ids = tokens(2, 17, seed=1)
    limited = run(model, ids).logits
    close(limited, outputs_of(theirs, ids)[0])
    free = Mamba2Config.from_dict({**model.config.to_dict(), "time_step_limit": [0.0, np.inf]})
    unlimited = nnx.eval_shape(lambda: Mamba2LMHeadModel(free))
    unlimited.load_state_dict(model.state_dict())
    assert np.abs(run(unlimited, ids).logits - limited).max() > 1e-2


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 24, "head_dim": 1, "n_groups": 1},
        {"num_heads": 2, "head_dim": 12, "use_conv_bias": False, "conv_kernel": 2},
        {"n_groups": 4, "residual_in_fp32": False, "chunk_size": 1},
        {"state_size": 1, "chunk_size": 256, "conv_kernel": 1, "num_hidden_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("B", "L"), [(3, 3), (1, 1), (2, 31)])
def test_is_transformers_with_other_settings(changes, B, L):
    check_it_is_transformers(reference("Mamba2", seed=L, **{**SIZES, **changes}), B, L, seed=B)


def test_gradients_are_those_of_transformers(pair):
    theirs, model = pair
    ids, w = tokens(2, 9), np.random.default_rng(1).normal(size=(2, 9, 23)).astype(np.float32)
    expected = gradients_of(theirs, ids, w)
    grads = state_dict(nnx.jit(nnx.grad(lambda model: jnp.sum(model(ids).logits * w)))(model))
    for name, gradient in expected.items():
        close(grads[name.replace("embeddings", "embedding")], gradient, 5e-5)


def test_pieces_and_steps_are_the_whole(pair):
    _, model = pair
    ids = tokens(2, 13)
    whole = run(model, ids).logits

    @nnx.jit
    def in_pieces(model, ids):
        cache, found = model.allocate_inference_cache(2, 13), []
        for piece in (ids[:, :2], ids[:, 2:2], ids[:, 2:11]):
            out, cache = model.prefill(piece, cache)
            found.append(out.logits)
        for t in (11, 12):
            out, cache = model.step(ids[:, t : t + 1], cache)
            found.append(out.logits)
        return jnp.concatenate(found, 1), cache

    found, cache = in_pieces(model, ids)
    close(found, whole)
    assert cache[1]["seqlen_offset"].tolist() == [13, 13]


def test_padded_rows_are_what_they_are_alone(pair):
    _, model = pair
    rows, places = tokens(2, 5), (slice(3, 8), slice(0, 5))
    padded, mask = np.full((2, 8), 22), np.zeros((2, 8), int)
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = rows[row], 1
    logits = nnx.jit(lambda m, i, a: m(i, a).logits)(model, padded, mask)
    alone = run(model, rows).logits
    for row, place in enumerate(places):
        close(logits[row, place], alone[row], 1e-6)
    assert not np.asarray(logits)[mask == 0].any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_that_of_transformers(pair, dtype):
    theirs = type(pair[0])(pair[0].config).eval()
    theirs.load_state_dict(pair[0].state_dict())
    theirs.to(dtype)
    model, ids = ours(theirs), tokens(2, 13)
    with jax.enable_x64(True):
        wide = nnx.eval_shape(lambda: Mamba2LMHeadModel(model.config))
        wide.load_state_dict(model.state_dict(), dtype=jnp.float64)
        exact = np.asarray(run(wide, ids).logits)
    scale = max(1.0, np.abs(exact).max())
    error = np.abs(np.asarray(run(model, ids).logits) - exact).max() / scale
    own = np.abs(outputs_of(theirs, ids)[0] - exact).max() / scale
    assert error <= max(1e-2, 1.5 * own)


def mixer_by_definition(layer, x):
    """(B, L, d_model) -> (B, L, d_model) in float64, from the parameters alone."""
    w = {name: np.asarray(value, np.float64) for name, value in layer.state_dict().items()}
    B, L, _ = x.shape
    H, P, G, N, inner = layer.nheads, layer.headdim, layer.ngroups, layer.d_state, layer.d_inner
    beside, ssm, K = inner - H * P, H * P, w["conv1d.weight"].shape[2]
    rows = np.cumsum([beside, beside, ssm, ssm + 2 * G * N])
    z0, x0, z, xBC, dt = np.split(x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0), rows, -1)
    padded = np.concatenate([np.zeros((B, K - 1, xBC.shape[-1])), xBC], 1)
    xBC = silu(sum(padded[:, k : k + L] * w["conv1d.weight"][:, 0, k] for k in range(K)) + w.get("conv1d.bias", 0))
    u, b, c = np.split(xBC, [ssm, ssm + G * N], -1)
    D = w["D"] if w["D"].size == H else w["D"].reshape(H, P)
    y, _ = by_definition(
        u.swapaxes(0, 1).reshape(L, B, H, P), dt.swapaxes(0, 1), -np.exp(w["A_log"]),
        b.swapaxes(0, 1).reshape(L, B, G, N), c.swapaxes(0, 1).reshape(L, B, G, N), D, None, w["dt_bias"], True,
        dt_limit=layer.dt_limit,
    )  # fmt: skip
    y = y.reshape(L, B, ssm).swapaxes(0, 1) * silu(z)
    groups = y.reshape(B, L, G, -1)
    groups = groups / np.sqrt(np.mean(groups**2, -1, keepdims=True) + layer.norm.eps)
    y = np.concatenate([silu(z0) * x0, groups.reshape(y.shape) * w["norm.weight"]], -1)
    return y @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"d_ssm": 6, "headdim": 3, "D_has_hdim": True, "dt_limit": (0.01, 0.05), "bias": True},
        pytest.param({"headdim": 5, "ngroups": 2, "conv_bias": False, "d_conv": 1}, marks=pytest.mark.full),
        pytest.param({"d_ssm": 4, "headdim": 1, "ngroups": 4, "chunk_size": 2}, marks=pytest.mark.full),
        pytest.param({"d_ssm": 5, "headdim": 5, "D_has_hdim": True, "expand": 1.5}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_mixer_is_its_definition(kwargs):
    layer = nnx.jit(lambda rngs: Mamba2(5, 3, **kwargs, rngs=rngs))(nnx.Rngs(0))
    noise = np.random.default_rng(0)
    spread = {name: value * (1 + 0.3 * noise.normal(size=value.shape)) for name, value in layer.state_dict().items()}
    layer.load_state_dict(spread, dtype=jnp.float32)
    x = noise.normal(size=(2, 7, 5)).astype(np.float32)
    expected = mixer_by_definition(layer, x)
    close(nnx.jit(lambda m, x: m(x))(layer, x), expected)

    @nnx.jit
    def by_steps(layer, x):
        y, cache = layer(x[:, :4], inference_cache=layer.allocate_inference_cache(2))
        found = [y]
        for t in range(4, 7):
            y, cache = layer.step(x[:, t : t + 1], cache)
            found.append(y)
        return jnp.concatenate(found, 1)

    close(by_steps(layer, x), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"headdim": 3}, "d_ssm must be at most d_inner = 10 and made of heads of 3 channels"),
        ({"headdim": 5, "ngroups": 3}, "in 3 equal groups, got d_ssm = 10"),
        ({"headdim": 5, "d_ssm": 15}, "got d_ssm = 15"),
        ({"headdim": 0}, "headdim must be a positive integer, got 0"),
        ({"headdim": 5, "dt_limit": (1.0, 0.5)}, r"dt_limit must be positive and ascending, got \(1.0, 0.5\)"),
        ({"headdim": 5, "A_init_range": (0, 1)}, "A_init_range must be positive"),
        ({"headdim": 5, "dt_min": 0.0}, "Mamba2 needs 0 < dt_min <= dt_max"),
    ],
)
def test_the_mixer_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(5, 3, **kwargs, rngs=nnx.Rngs(0))


def test_it_has_no_event_mode():
    layer = nnx.eval_shape(lambda: Mamba2(4, 2, headdim=4))
    with pytest.raises(ValueError, match="no step size that integration_timesteps could scale"):
        layer(jnp.zeros((1, 2, 4)), jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"num_heads \* head_dim must be expand \* hidden_size = 24, got 5 \* 6"),
        ({"d_ssm": 12}, r"num_heads \* head_dim must be d_ssm = 12"),
        ({"d_ssm": 36, "num_heads": 6}, r"d_ssm must be at most expand \* hidden_size = 24, got 36"),
        ({"n_groups": 3}, "n_groups must divide num_heads = 4, got 3"),
        ({"time_step_limit": [0.5]}, r"time_step_limit must be two ascending numbers.*got \[0.5\]"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit must be"),
        ({"time_step_limit": [False, 1.0]}, "time_step_limit must be"),
        ({"time_step_limit": [0.0, {"__float__": "NaN"}]}, "time_step_limit must be"),
        ({"time_step_limit": "0, 1"}, "time_step_limit must be"),
    ],
)
def test_the_configuration_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config.from_dict({**SIZES, **changes})


def test_configurations_are_those_of_transformers():
    import json

    from transformers import Mamba2Config as Theirs

    for changes in (
        {},
        {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "n_groups": 2, "time_step_limit": (0.01, 0.2)},
    ):
        written = json.loads(Theirs(**changes).to_json_string(use_diff=False))
        config = Mamba2Config.from_dict(written)
        assert config.to_dict().items() >= written.items()
        assert Mamba2Config.from_dict(config.to_dict()) == config
        assert hash(Mamba2Config.from_dict(config.to_dict())) == hash(config)
        for name in ("time_step_limit", "tie_word_embeddings", "eos_token_id", "chunk_size"):
            assert getattr(config, name) == getattr(Theirs(**changes), name)
    theirs, mine = Theirs(), Mamba2Config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "n_groups", "pad_token_id"):
        assert getattr(mine, name) == getattr(theirs, name)
