"""compat_torch.models.ltv.RGLRU: its definition, caches, masks, dtypes, initial values, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import layers
from oracles.layers import QUICK, WIDE, close, noise, same_cache
from oracles.time_varying import rglru as by_definition

from compat_torch.models.ltv import RGLRU


def make(d_model=3, seed=0, **kwargs):
    return RGLRU(d_model, **kwargs, rngs=nnx.Rngs(seed))


@st.composite
def configurations(draw):
    options = {
        "d_model": draw(st.integers(1, 5)),
        "d_conv": draw(st.integers(1, 5)),
        "expand": draw(st.sampled_from([1, 2])),
        "c": draw(st.sampled_from([8.0, 0.5])),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "reference": draw(st.sampled_from(["lrnnx", "paper"])),
    }
    return options, draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 8)), draw(st.integers(0, 99))


def check(configuration):
    options, B, L, cut, seed = configuration
    layer, x = make(seed=seed, **options), noise(B, L, options["d_model"], seed=seed)
    layers.check_equivalence(layer, x, by_definition(layer.state_dict(), x, c=options["c"]), cut)


@QUICK
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check(configuration)


@pytest.mark.parametrize("reference", ["lrnnx", "paper"])
def test_it_is_its_definition(reference):
    layer, x = make(reference=reference), noise(2, 67, 3)
    close(layer(x), by_definition(layer.state_dict(), x))


def test_a_prompt_shorter_than_the_convolution():
    layer, x = make(d_conv=5), noise(2, 9, 3)
    y, cache = [], layer.allocate_inference_cache(2)
    for part in (slice(0, 1), slice(1, 3), slice(3, 9)):
        out, cache = layer(x[:, part], inference_cache=cache)
        y.append(out)
    close(jnp.concatenate(y, 1), by_definition(layer.state_dict(), x))
    np.testing.assert_allclose(cache["conv_state"][0].T, layer.in_proj(x[0, 4:]), atol=1e-6)


def test_padding_reaches_no_gradient():
    layers.check_padding_gradients(make(bias=True), noise(3, 6, 3))


def test_closed_gates_have_finite_gradients():
    layer = make()
    layer.recurrent_gate_proj.bias.set_value(jnp.full((3,), -200.0))
    grads = nnx.grad(lambda m: jnp.sum(m(noise(2, 5, 3)) ** 2))(layer)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    close(layer(noise(2, 5, 3)), jnp.zeros((2, 5, 3)))


def test_rows_are_independent_and_causal():
    layer, x = make(), noise(3, 9, 3)
    broken = layer(x.at[1, 4:].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(broken).any(-1), np.arange(9) >= 4 * np.array([[99], [1], [99]]))
    close(broken[::2], layer(x)[::2])


def test_x64_jit_vmap_and_finite_differences():
    layers.check_x64(make, by_definition, noise(2, 5, 3))


def test_bfloat16():
    layer = make(dtype=jnp.bfloat16)
    assert layer.a_log[...].dtype == layer.allocate_inference_cache(1)["conv_state"].dtype == jnp.bfloat16
    layers.check_bfloat16(layer, by_definition, noise(2, 17, 3))


def test_torch_tensors_in_and_out():
    layers.check_torch(make(), noise(2, 5, 3))


def test_steps_keep_the_dtypes_of_the_cache():
    layers.check_scanned_steps(make, noise(3, 2, 1, 3))


def test_round_trip_and_sequences_without_steps():
    layers.check_round_trip(make(seed=1), lambda: make(seed=2))
    layer = make()
    cache = layer.allocate_inference_cache(2)
    y, after = layer(noise(2, 0, 3), inference_cache=cache)
    assert y.shape == (2, 0, 3)
    same_cache(after, cache)


def test_names_shapes_and_initial_values_are_the_references():
    layer = make(4, expand=2, d_conv=3, bias=True)
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        "gate_proj.weight": (8, 4), "gate_proj.bias": (8,), "in_proj.weight": (8, 4), "in_proj.bias": (8,),
        "conv1d.weight": (8, 1, 3), "conv1d.bias": (8,), "recurrent_gate_proj.weight": (8, 8),
        "recurrent_gate_proj.bias": (8,), "input_gate_proj.weight": (8, 8), "input_gate_proj.bias": (8,),
        "a_log": (8, 1), "out_proj.weight": (4, 8), "out_proj.bias": (4,),
    }  # fmt: skip
    cache = layer.allocate_inference_cache(5)
    assert {name: value.shape for name, value in cache.items()} == {
        "conv_state": (5, 8, 3), "lrnn_state": (5, 8, 1), "seqlen_offset": (5,)
    }  # fmt: skip
    assert layer.a_log.get_metadata()["no_weight_decay"]
    assert not np.array_equal(RGLRU(4).in_proj.kernel[...], RGLRU(4).in_proj.kernel[...])


def test_a_starts_in_the_range_of_the_reference():
    lrnnx = jax.nn.sigmoid(make(400, a_init_range=(0.5, 0.9)).a_log[...])
    assert 1 / 3 <= float(lrnnx.min()) < 0.34
    assert 0.47 < float(lrnnx.max()) <= 9 / 19
    paper = jax.nn.sigmoid(make(400, a_init_range=(0.5, 0.9), reference="paper").a_log[...])
    assert 0.5 <= float(paper.min()) < 0.51
    assert 0.89 < float(paper.max()) <= 0.9001
    assert abs(float(paper.mean()) - 0.7) < 0.02


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": "cuda"}, "device must be None or 'cpu'"),
        ({"reference": "torch"}, "reference must be one of"),
        ({"d_conv": 0}, "d_conv must be a positive integer"),
        ({"expand": 0}, "d_inner must be a positive integer"),
        ({"c": 0.0}, "c must be positive"),
        ({"a_init_range": (0.9, 1.0)}, "0 < lo <= hi < 1"),
        ({"a_init_range": (0.9, 0.5)}, "0 < lo <= hi < 1"),
    ],
)
def test_arguments_it_cannot_honour_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_inputs_that_do_not_fit_raise():
    layer, x = make(), noise(2, 4, 3)
    with pytest.raises(ValueError, match="RGLRU has no step size that integration_timesteps could scale"):
        layer(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="RGLRU has no step size"):
        layer.step(x[:, :1], layer.allocate_inference_cache(2), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=r"conv_state must have shape \(2, 3, 4\)"):
        layer(x, inference_cache=layer.allocate_inference_cache(1))
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
