"""compat_torch.models.lti.Centaurus: four modes, both arithmetics, caches, masks, dtypes, initial values, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import layers
from oracles.centaurus import centaurus as oracle
from oracles.layers import QUICK, WIDE, call, close, noise, same_cache

from compat_torch import decode
from compat_torch.models.lti import Centaurus, CentaurusDWS, CentaurusFull, CentaurusNeck, CentaurusPWNeck

MODES = {"neck": CentaurusNeck, "pointwise": CentaurusPWNeck, "dws": CentaurusDWS, "full": CentaurusFull}
each_mode = pytest.mark.parametrize("mode", MODES)
some_modes = pytest.mark.parametrize(
    "mode", ["neck", "pointwise", *(pytest.param(mode, marks=pytest.mark.full) for mode in ("dws", "full"))]
)


def make(mode="neck", d_model=3, d_state=5, sub_state_dim=4, seed=0, **kwargs):
    """A layer with every parameter moved: the modes of a fresh one are the same in all state channels."""
    d_state = {"dws": d_model, "full": d_model**2}.get(mode, d_state)
    layer = MODES[mode](d_model, d_state, sub_state_dim, **kwargs, rngs=nnx.Rngs(seed))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    moved = [v + 0.2 * noise(*v.shape, seed=10 * seed + i, dtype=v.dtype) for i, v in enumerate(leaves)]
    nnx.update(layer, jax.tree.unflatten(tree, moved))
    layer.log_delta.set_value(layer.log_delta[...] + 2)
    return layer


def by_definition(layer, x):
    return oracle(layer.state_dict(), x, layer.mode, None if layer.reference == "lrnnx" else layer.discretization)


@each_mode
@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "dirac"])
def test_the_papers_arithmetic_honours_the_discretization(mode, discretization):
    layer, x = make(mode, discretization=discretization, reference="paper"), noise(2, 17, 3)
    close(call(layer, x), by_definition(layer, x), 5e-6)
    close(decode(layer, x, layer.allocate_inference_cache(2))[0], by_definition(layer, x), 5e-6)


@each_mode
def test_lrnnx_ignores_the_discretization(mode):
    x = noise(2, 17, 3)
    expected = call(make(mode), x)
    close(expected, by_definition(make(mode), x))
    for discretization in ("bilinear", "dirac", "async"):
        close(call(make(mode, discretization=discretization), x), expected, 0)
    assert float(jnp.abs(call(make(mode, reference="paper"), x) - expected).max()) > 1e-3


@st.composite
def configurations(draw):
    options = {
        "mode": draw(st.sampled_from(sorted(MODES))),
        "discretization": draw(st.sampled_from(["zoh", "bilinear", "dirac"])),
        "reference": draw(st.sampled_from(["lrnnx", "paper"])),
    }
    sizes = [draw(st.integers(1, n)) for n in (3, 8, 4, 5, 3)]
    return options, sizes, draw(st.integers(0, 8)), draw(st.integers(0, 99))


def check(configuration):
    options, (B, L, H, N, M), cut, seed = configuration
    layer, x = make(d_model=H, d_state=N, sub_state_dim=M, seed=seed, **options), noise(B, L, H, seed=seed)
    layers.check_equivalence(layer, x, by_definition(layer, x), cut)


@QUICK
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check(configuration)


@pytest.mark.parametrize("block", [1, 30])
def test_blocks_of_channels_of_any_size(block, monkeypatch):
    from compat_torch.models.lti import centaurus as module

    layer, x = make(), noise(2, 7, 3)
    values = lambda: jax.jit(jax.value_and_grad(lambda v: jnp.sum(layer(v) ** 2)))(x)  # noqa: E731
    value, gradient = values()
    monkeypatch.setattr(module, "_BLOCK", block)
    blocked, blocked_gradient = values()
    close(blocked, value)
    close(blocked_gradient, gradient)


def test_long_sequences_are_as_accurate_as_short_ones():
    layer, x = make("dws"), noise(1, 3000, 3)
    layer.log_delta.set_value(layer.log_delta[...] - 3)
    close(layer(x), by_definition(layer, x), 2e-6)


def test_a_cache_is_a_snapshot_of_the_system():
    layer, x = make(), noise(2, 5, 3)
    cache, before = layer.allocate_inference_cache(2), layer(x)
    layer.log_delta.set_value(layer.log_delta[...] + 1)
    close(layer(x, inference_cache=cache)[0], before)
    close(decode(layer, x, cache)[0], before)


@some_modes
def test_padding_reaches_no_gradient(mode):
    layers.check_padding_gradients(make(mode), noise(3, 6, 3))


def test_rows_are_independent_and_a_cached_prompt_is_causal():
    layer, x = make(), noise(3, 9, 3)
    bad = x.at[1, 4:].set(jnp.nan)
    close(layer(bad)[::2], layer(x)[::2])
    broken, _ = layer(bad, inference_cache=layer.allocate_inference_cache(3))
    np.testing.assert_array_equal(np.isnan(broken).any(-1), np.arange(9) >= 4 * np.array([[99], [1], [99]]))


@pytest.mark.parametrize("reference", ["lrnnx", "paper"])
@some_modes
def test_x64_jit_vmap_and_finite_differences(mode, reference):
    def build(**kwargs):
        return make(mode, reference=reference, **kwargs)

    disc = None if reference == "lrnnx" else "zoh"
    layers.check_x64(build, lambda weights, x: oracle(weights, x, mode, disc), noise(2, 5, 3))


@some_modes
def test_bfloat16(mode):
    layer = MODES[mode](4, {"dws": 4, "full": 16}.get(mode, 5), 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.A[...].dtype == jnp.bfloat16
    assert layer.state_dict()["A"].dtype == jnp.complex64
    layers.check_bfloat16(layer, lambda weights, x: oracle(weights, x, mode), noise(2, 17, 4))


@some_modes
def test_torch_tensors_in_and_out(mode):
    layers.check_torch(make(mode), noise(2, 5, 3))


@some_modes
def test_steps_keep_the_dtypes_of_the_cache(mode):
    layers.check_scanned_steps(lambda **kwargs: make(mode, **kwargs), noise(3, 2, 3))


@some_modes
def test_round_trip_and_sequences_without_steps(mode):
    layers.check_round_trip(make(mode, seed=1), lambda: make(mode, seed=2))
    layer = make(mode)
    cache = layer.allocate_inference_cache(2)
    y, after = layer(noise(2, 0, 3), inference_cache=cache)
    assert y.shape == layer(noise(2, 0, 3)).shape == (2, 0, 3)
    same_cache(after, cache)


@each_mode
def test_discretize_is_the_system_of_the_cache(mode):
    layer = make(mode)
    A_bar, gamma, C = layer.discretize()
    cache = layer.allocate_inference_cache(1)
    flat = "_flat" if mode == "pointwise" else ""
    close(cache[f"A_bar{flat}"], A_bar.reshape(-1) if flat else A_bar, 0)
    close(cache[f"C{flat}"], C, 0)
    close(gamma[:, 0], jnp.exp(layer.log_delta[...]), 0)


def test_centaurus_is_the_class_of_its_mode():
    for mode, cls in {**MODES, "pw": CentaurusPWNeck, "s5": CentaurusPWNeck}.items():
        layer = Centaurus(2, {"dws": 2}.get(mode, 4), 3, mode=mode, reference="paper", rngs=nnx.Rngs(0))
        assert type(layer) is cls
        assert layer.mode == cls.mode
        assert layer.reference == "paper"
    assert type(Centaurus(2, 3, 4)) is CentaurusNeck
    with pytest.raises(ValueError, match="mode must be one of"):
        Centaurus(2, 3, 4, mode="wide")


def fresh(mode, H, N, M):
    return {name: np.asarray(v) for name, v in MODES[mode](H, N, M, rngs=nnx.Rngs(0)).state_dict().items()}


def test_names_shapes_and_initial_values_are_the_references():
    p = fresh("neck", 40, 50, 6)
    shapes = {"A": (50, 6), "E": (50, 6), "log_delta": (50,), "B": (50, 40), "C": (40, 50)}
    assert {name: value.shape for name, value in p.items()} == shapes
    assert p["A"].dtype == np.complex64
    np.testing.assert_allclose(p["A"], np.broadcast_to(-0.5 + 1j * np.pi * np.arange(6) / 6, (50, 6)), rtol=1e-6)
    np.testing.assert_allclose(p["log_delta"], np.linspace(np.log(1e-3), np.log(0.1), 50), rtol=1e-5)
    np.testing.assert_allclose(np.std(p["E"]), 2**0.5, rtol=0.1)
    for name, fan_in in (("B", 40), ("C", 50)):
        assert 0.95 * fan_in**-0.5 < np.abs(p[name]).max() <= fan_in**-0.5
    p = fresh("pointwise", 40, 50, 6)
    assert {name: value.shape for name, value in p.items()} == {
        "A": (50, 6), "log_delta": (50,), "B": (300, 40), "C": (40, 300)
    }  # fmt: skip
    np.testing.assert_allclose(p["B"], 40**-0.5, rtol=1e-6)
    np.testing.assert_allclose(np.std(p["C"]), (2 / 300) ** 0.5, rtol=0.05)
    p = fresh("dws", 4, 4, 2)
    np.testing.assert_array_equal(p["B"], np.ones(4))
    np.testing.assert_array_equal(p["C"], np.ones(4))
    p = fresh("full", 20, 400, 2)
    np.testing.assert_allclose([np.std(p["B"]), np.std(p["C"])], [(2 / 20) ** 0.5, (2 / 400) ** 0.5], rtol=0.15)
    assert (p["B"].shape, p["C"].shape) == ((400,), (400,))
    assert not np.array_equal(Centaurus(4, 2, 1).B[...], Centaurus(4, 2, 1).B[...])


def test_caches_have_the_references_names_and_shapes():
    cache = make("full").allocate_inference_cache(2)
    assert {name: leaf.shape for name, leaf in cache.items()} == {
        "lrnn_state": (2, 9, 4), "A_bar": (9, 4), "B_bar": (9, 3), "E": (9, 4), "C": (3, 9)
    }  # fmt: skip
    cache = make("pointwise").allocate_inference_cache(2)
    assert {name: leaf.shape for name, leaf in cache.items()} == {
        "lrnn_state": (2, 20), "A_bar_flat": (20,), "B_bar_flat": (20, 3), "C_flat": (3, 20)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "sizes", "kwargs", "message"),
    [
        ("neck", (3, 4, 2), {"discretization": "euler"}, "discretization must be one of"),
        ("neck", (3, 4, 2), {"discretization": "async", "reference": "paper"}, "async.*compat_torch.models.ltv"),
        ("neck", (3, 4, 2), {"reference": "torch"}, "reference must be one of"),
        ("neck", (3, 4, 0), {}, "sub_state_dim must be a positive integer"),
        ("dws", (3, 4, 2), {}, "d_state must be d_model = 3, got 4"),
        ("full", (3, 4, 2), {}, r"d_state must be d_model\^2 = 9, got 4"),
    ],
)
def test_arguments_it_cannot_honour_raise(mode, sizes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MODES[mode](*sizes, **kwargs)


@pytest.mark.parametrize("mode", ["neck", "pointwise"])
def test_inputs_that_do_not_fit_raise(mode):
    layer, x = make(mode), noise(2, 4, 3)
    cache = layer.allocate_inference_cache(2)
    with pytest.raises(ValueError, match="time-invariant and cannot use integration_timesteps"):
        layer(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
    with pytest.raises(TypeError, match="real floating point"):
        layer(jnp.ones((2, 4, 3), int), inference_cache=cache)
    with pytest.raises(ValueError, match="lengths must have shape"):
        layer(x, lengths=jnp.ones((3,), int))
    for use in (lambda c: layer(x, inference_cache=c), lambda c: layer.step(x[:, 0], c)):
        with pytest.raises(ValueError, match="inference_cache must have the keys"):
            use({"lrnn_state": cache["lrnn_state"]})
        with pytest.raises(ValueError, match=r"lrnn_state must have shape \(2, "):
            use(layer.allocate_inference_cache(1))
