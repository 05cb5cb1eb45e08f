"""compat_torch.models.ltv.S5: its definition, event mode, caches of either name, initial values, errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import layers
from oracles.layers import QUICK, WIDE, call, close, intervals, noise, same_cache
from oracles.time_varying import s5 as by_definition

from compat_torch import decode
from compat_torch.models.ltv import S5

DISCRETIZATIONS = ("zoh", "bilinear", "dirac")


def make(d_model=3, d_state=4, seed=0, **kwargs):
    return S5(d_model, d_state, **kwargs, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("conj_sym", [False, True])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_it_is_its_definition(discretization, conj_sym, event):
    options = {"discretization": discretization, "conj_sym": conj_sym, "step_rescale": 1.7}
    layer, x = make(dt_min=0.01, dt_max=1.0, **options), noise(2, 17, 3)
    timesteps = intervals(2, 17) if event else None
    expected = by_definition(layer.state_dict(), x, timesteps=timesteps, **options)
    close(call(layer, x, timesteps), expected)
    if event:
        close(call(layer, x, timesteps[..., None]), expected)


def test_both_references_are_the_same_arithmetic():
    x = noise(2, 9, 3)
    close(make(reference="paper", discretization="bilinear")(x), make(discretization="bilinear")(x), 0)


@st.composite
def configurations(draw):
    options = {
        "discretization": draw(st.sampled_from(DISCRETIZATIONS)),
        "conj_sym": draw(st.booleans()),
        "step_rescale": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }
    sizes = [draw(st.integers(1, n)) for n in (3, 8, 5, 6)]
    return options, sizes, draw(st.booleans()), draw(st.integers(0, 8)), draw(st.integers(0, 99))


def check(configuration):
    options, (B, L, H, P), event, cut, seed = configuration
    layer, x = make(H, P, seed, dt_max=0.5, **options), noise(B, L, H, seed=seed)
    timesteps = intervals(B, L, seed=seed + 1) if event else None
    expected = by_definition(layer.state_dict(), x, timesteps=timesteps, **options)
    layers.check_equivalence(layer, x, expected, cut, timesteps)


@QUICK
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check(configuration)


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_unit_events_are_the_plain_mode(discretization):
    layer, x = make(discretization=discretization), noise(2, 7, 3)
    close(layer(x, jnp.ones((2, 7))), layer(x))
    close(decode(layer, x, layer.allocate_inference_cache(2), jnp.ones((2, 7)))[0], layer(x))


@pytest.mark.parametrize("event", [False, True])
def test_a_cache_may_have_the_references_name(event):
    layer, x = make(), noise(2, 6, 3)
    timesteps = intervals(2, 6) if event else None
    cache = layer.allocate_inference_cache(2)
    theirs = {"ssm_state" if name == "lrnn_state" else name: leaf for name, leaf in cache.items()}
    first = None if timesteps is None else timesteps[:, :4]
    y, ours = layer(x[:, :4], first, inference_cache=cache)
    y2, named = layer(x[:, :4], first, inference_cache=theirs)
    close(y2, y, 0)
    assert named.keys() == theirs.keys()
    last = None if timesteps is None else timesteps[:, 4:]
    y, ours = decode(layer, x[:, 4:], ours, last)
    y2, named = decode(layer, x[:, 4:], named, last)
    close(y2, y, 0)
    same_cache({"lrnn_state": named["ssm_state"]}, {"lrnn_state": ours["lrnn_state"]})
    with pytest.raises(ValueError, match="inference_cache must have the keys"):
        layer(x, inference_cache={**cache, "ssm_state": cache["lrnn_state"]})
    with pytest.raises(ValueError, match=r"lrnn_state must have shape \(2, 4\)"):
        layer(x, inference_cache={**theirs, "ssm_state": theirs["ssm_state"][:1]})


def test_a_cache_is_a_snapshot_of_the_system():
    layer, x = make(), noise(2, 5, 3)
    cache = layer.allocate_inference_cache(2)
    before = layer(x)
    layer.log_dt.set_value(layer.log_dt[...] + 1)
    close(layer(x, inference_cache=cache)[0], before)
    close(decode(layer, x, cache)[0], before)
    assert float(jnp.abs(layer(x) - before).max()) > 1e-3


@pytest.mark.parametrize("event", [False, True])
def test_padding_reaches_no_gradient(event):
    layers.check_padding_gradients(make(), noise(3, 6, 3), *([intervals(3, 6)] if event else []))


@pytest.mark.parametrize("event", [False, True])
def test_rows_are_independent_and_causal(event):
    layer, x = make(), noise(3, 9, 3)
    extra = [intervals(3, 9)] if event else []
    broken = layer(x.at[1, 4:].set(jnp.nan), *extra)
    np.testing.assert_array_equal(np.isnan(broken).any(-1), np.arange(9) >= 4 * np.array([[99], [1], [99]]))
    close(broken[::2], layer(x, *extra)[::2])


def test_x64_jit_vmap_and_finite_differences():
    layers.check_x64(make, by_definition, noise(2, 5, 3))


def test_x64_events():
    import jax

    with jax.enable_x64(True):
        layer, x = make(param_dtype=jnp.float64), noise(2, 5, 3, dtype=jnp.float64)
        timesteps = intervals(2, 5).astype(jnp.float64)
        close(layer(x, timesteps), by_definition(layer.state_dict(), x, timesteps=timesteps), 1e-13)


def test_bfloat16():
    layers.check_bfloat16(make(dtype=jnp.bfloat16), by_definition, noise(2, 17, 3))
    layer, x, timesteps = make(dtype=jnp.bfloat16), noise(2, 9, 3), intervals(2, 9)
    y = layer(x, timesteps)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), by_definition(layer.state_dict(), x, timesteps=timesteps), 1e-2)


def test_torch_tensors_in_and_out():
    layers.check_torch(make(), noise(2, 5, 3))


def test_steps_keep_the_dtypes_of_the_cache():
    layers.check_scanned_steps(make, noise(3, 2, 1, 3))


def test_round_trip_and_sequences_without_steps():
    layers.check_round_trip(make(seed=1), lambda: make(seed=2))
    layer = make()
    cache = layer.allocate_inference_cache(2)
    y, after = layer(noise(2, 0, 3), inference_cache=cache)
    assert y.shape == layer(noise(2, 0, 3), jnp.ones((2, 0))).shape == (2, 0, 3)
    same_cache(after, cache)


@pytest.mark.parametrize("conj_sym", [False, True])
def test_names_shapes_and_initial_values_are_the_references(conj_sym):
    H, P = 300, 16
    layer = make(H, P, conj_sym=conj_sym, dt_min=0.01, dt_max=0.2)
    p = {name: np.asarray(value) for name, value in layer.state_dict().items()}
    shapes = {"A": (P, 2), "B": (P, H, 2), "C": (H, P, 2), "D": (H,), "log_dt": (P,)}
    assert {name: value.shape for name, value in p.items()} == shapes
    size = 2 * P if conj_sym else P
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    hippo = -np.tril(np.outer(root, root), -1) - np.diag(n + 1) + np.outer(root, root) / 2
    eigenvalues = np.linalg.eigvals(hippo)
    eigenvalues = eigenvalues[np.argsort(eigenvalues.imag)][:P]
    np.testing.assert_allclose(p["A"][:, 0], -0.5, rtol=1e-6)
    np.testing.assert_allclose(p["A"][:, 1], eigenvalues.imag, rtol=1e-5, atol=1e-5)
    dt = np.exp(p["log_dt"])
    assert 0.01 <= dt.min() <= dt.max() <= 0.2001
    np.testing.assert_allclose(np.std(p["D"]), 0.1, rtol=0.15)
    np.testing.assert_allclose(np.mean((p["B"] ** 2).sum(-1)), 1 / size, rtol=0.1)
    np.testing.assert_allclose(np.mean((p["C"] ** 2).sum(-1)), 2 / size, rtol=0.1)
    assert not np.array_equal(S5(4, 4).B[...], S5(4, 4).B[...])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"discretization": "async"}, "discretization must be one of"),
        ({"device": "cuda"}, "device must be None or 'cpu'"),
        ({"reference": "torch"}, "reference must be one of"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"step_rescale": 0}, "step_rescale must be positive"),
        ({"d_state": 0}, "d_state must be a positive integer"),
    ],
)
def test_arguments_it_cannot_honour_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_inputs_that_do_not_fit_raise():
    layer, x = make(), noise(2, 4, 3)
    with pytest.raises(ValueError, match=r"expects input \(B, L, H\) with H = 3, got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
    with pytest.raises(ValueError, match=r"integration_timesteps must have shape \(B, L\)"):
        layer(x, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="integration_timesteps must be floating point"):
        layer(x, jnp.ones((2, 4), int))
    with pytest.raises(ValueError, match="inference_cache must have the keys"):
        layer(x, inference_cache={"ssm_state": jnp.zeros((2, 4), jnp.complex64)})
