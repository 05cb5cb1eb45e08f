"""compat_torch.models.ltv.S7: its definition, memory, caches, masks, dtypes, initial values, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import layers
from oracles.layers import QUICK, WIDE, close, noise, same_cache
from oracles.time_varying import s7

from compat_torch.models.ltv import S7


def make(d_model=3, d_state=4, seed=0, **kwargs):
    """A layer whose weights matter: at first they are so small that B_t and C_t hardly do."""
    layer = S7(d_model, d_state, **kwargs, rngs=nnx.Rngs(seed))
    layer.x_proj.kernel.set_value(30 * layer.x_proj.kernel[...])
    return layer


def by_definition(weights, x):
    return s7(weights, x, d_state=weights["base_params"].shape[0])


@pytest.mark.parametrize("reference", ["lrnnx", "paper"])
def test_it_is_its_definition(reference):
    layer, x = make(reference=reference), noise(2, 67, 3)
    close(layer(x), by_definition(layer.state_dict(), x))


@st.composite
def configurations(draw):
    sizes = [draw(st.integers(1, n)) for n in (3, 8, 5, 6)]
    return sizes, draw(st.integers(0, 8)), draw(st.integers(0, 99))


def check(configuration):
    (B, L, H, N), cut, seed = configuration
    layer, x = make(H, N, seed), noise(B, L, H, seed=seed)
    layers.check_equivalence(layer, x, by_definition(layer.state_dict(), x), cut)


@QUICK
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check(configuration)


@pytest.mark.parametrize("block", [1, 48, 80])
def test_blocks_of_steps_of_any_size(block, monkeypatch):
    from compat_torch.models.ltv import s7 as module

    layer, x = make(), noise(2, 7, 3)
    values = lambda: jax.jit(jax.value_and_grad(lambda v: jnp.sum(layer(v) ** 2)))(x)  # noqa: E731
    value, gradient = values()
    monkeypatch.setattr(module, "_BLOCK", block)
    blocked, blocked_gradient = values()
    close(blocked, value)
    close(blocked_gradient, gradient)


def test_no_array_has_a_matrix_for_every_step():
    B, L, H, N = 1, 8192, 64, 64
    graph, params = nnx.split(nnx.eval_shape(lambda: S7(H, N)))

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x) ** 2)

    x = jax.ShapeDtypeStruct((B, L, H), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * L * H * N


def test_padding_reaches_no_gradient():
    layers.check_padding_gradients(make(), noise(3, 6, 3))


def test_rows_are_independent_and_causal():
    layer, x = make(), noise(3, 9, 3)
    broken = layer(x.at[1, 4:].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(broken).any(-1), np.arange(9) >= 4 * np.array([[99], [1], [99]]))
    close(broken[::2], layer(x)[::2])


def test_x64_jit_vmap_and_finite_differences():
    layers.check_x64(make, by_definition, noise(2, 5, 3))


def test_bfloat16():
    layer = S7(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert (layer.x_proj.kernel[...].dtype, layer.base_params[...].dtype) == (jnp.bfloat16, jnp.float32)
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
    layer = S7(20, 6, J=3, rngs=nnx.Rngs(0))
    rows = 2 * 6 + 2 * 20 * 6 + 20
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        "base_params": (6,), "in_proj.weight": (20, 20), "x_proj.weight": (rows, 20), "gate_proj.weight": (20, 20)
    }  # fmt: skip
    np.testing.assert_array_equal(layer.base_params[...], -0.5)
    np.testing.assert_allclose(np.std(layer.x_proj.kernel[...]), 0.02, rtol=0.05)
    for projection in (layer.in_proj, layer.gate_proj):
        assert 0.95 * 20**-0.5 < float(jnp.abs(projection.kernel[...]).max()) <= 20**-0.5
    assert {name: value.shape for name, value in layer.allocate_inference_cache(5).items()} == {
        "lrnn_state": (5, 6), "seqlen_offset": (5,)
    }  # fmt: skip
    assert not np.array_equal(S7(4, 2).in_proj.kernel[...], S7(4, 2).in_proj.kernel[...])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": "cuda"}, "device must be None or 'cpu'"),
        ({"reference": "torch"}, "reference must be one of"),
        ({"d_state": 0}, "d_state must be a positive integer"),
        ({"J": 3}, "J must divide d_state = 4, got 3"),
        ({"J": 0}, "J must be a positive integer"),
    ],
)
def test_arguments_it_cannot_honour_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_inputs_that_do_not_fit_raise():
    layer, x = make(), noise(2, 4, 3)
    with pytest.raises(ValueError, match="S7 has no step size that integration_timesteps could scale"):
        layer(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="inference_cache must have the keys"):
        layer(x, inference_cache={})
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
