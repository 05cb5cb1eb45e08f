"""compat_torch.models.ltv.Mamba: its definition, event mode, caches, masks, dtypes, hints, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.mamba import mamba as by_definition

from compat_torch import decode
from compat_torch.core.variables import hint
from compat_torch.errors import StateDictMismatchError
from compat_torch.models.ltv import Mamba

DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "dirac")
QUICK = settings(max_examples=2, deadline=None, derandomize=True)
WIDE = settings(max_examples=25, deadline=None)


def make(d_model=3, d_state=2, seed=0, **kwargs):
    return Mamba(d_model, d_state, **kwargs, rngs=nnx.Rngs(seed))


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def intervals(*shape, seed=9):
    return jax.random.uniform(jax.random.key(seed), shape, minval=0.1, maxval=3.0)


def close(actual, expected, tolerance=3e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


def same_cache(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        close(actual[name], expected[name])


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_it_is_its_definition(discretization, event):
    layer, x = make(discretization=discretization), noise(2, 17, 3)
    timesteps = intervals(2, 17) if event else None
    expected = by_definition(layer.state_dict(), x, discretization=discretization, timesteps=timesteps)
    close(layer(x, timesteps), expected)
    if event:
        close(layer(x, timesteps[..., None]), expected)


@st.composite
def configurations(draw):
    kwargs = {
        "d_model": draw(st.integers(1, 5)),
        "d_state": draw(st.integers(1, 4)),
        "d_conv": draw(st.integers(1, 5)),
        "expand": draw(st.sampled_from([1, 2, 1.5])),
        "dt_rank": draw(st.sampled_from(["auto", 1, 3])),
        "dt_init": draw(st.sampled_from(["random", "constant"])),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "discretization": draw(st.sampled_from(DISCRETIZATIONS)),
    }
    if int(kwargs["expand"] * kwargs["d_model"]) < 1:
        kwargs["expand"] = 2
    sizes = (draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    return kwargs, sizes, draw(st.booleans()), draw(st.integers(0, 8)), draw(st.integers(0, 99))


def check_equivalence(configuration):
    """Whole == prompt in pieces == steps, and == its definition; padding changes nothing."""
    kwargs, (B, L), event, cut, seed = configuration
    layer, x = Mamba(**kwargs, rngs=nnx.Rngs(seed)), noise(B, L, kwargs["d_model"], seed=seed)
    timesteps = intervals(B, L, seed=seed + 1) if event else None
    start = layer.allocate_inference_cache(B)
    y, end = layer(x, timesteps, inference_cache=start)
    close(y, by_definition(layer.state_dict(), x, discretization=kwargs["discretization"], timesteps=timesteps))
    np.testing.assert_array_equal(end["seqlen_offset"], np.full(B, L))
    assert end["seqlen_offset"].dtype == jnp.int32

    cut = min(cut, L)
    pieces, cache = [], start
    for part in (slice(0, cut), slice(cut, L)):
        out, cache = layer(x[:, part], None if timesteps is None else timesteps[:, part], inference_cache=cache)
        pieces.append(out)
    close(jnp.concatenate(pieces, 1), y)
    same_cache(cache, end)

    out, cache = decode(layer, x, start, timesteps)
    close(out, y)
    same_cache(cache, end)

    lengths = np.array([L - b % (L + 1) for b in range(B)])
    padded = jnp.where(np.arange(L)[:, None] < lengths[:, None, None], x, jnp.nan)
    out, cache = layer(padded, timesteps, lengths, start)
    for b, n in enumerate(lengths):
        close(out[b, :n], y[b, :n])
        np.testing.assert_array_equal(out[b, n:], 0)
        part = None if timesteps is None else timesteps[b : b + 1, :n]
        _, alone = layer(x[b : b + 1, :n], part, inference_cache=layer.allocate_inference_cache(1))
        same_cache({name: leaf[b : b + 1] for name, leaf in cache.items()}, alone)


@QUICK
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check_equivalence(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check_equivalence(configuration)


def test_steps_leave_the_cache_alone():
    layer, x = make(), noise(2, 1, 3)
    cache = layer.allocate_inference_cache(2)
    before = jax.tree.map(np.array, cache)
    _, after = layer.step(x, cache)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    assert float(jnp.abs(after["lrnn_state"]).max()) > 0


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_unit_events_with_equal_steps_are_the_plain_mode(discretization):
    layer, x = make(discretization=discretization), noise(2, 7, 3)
    layer.dt_proj.kernel.set_value(jnp.zeros_like(layer.dt_proj.kernel[...]))
    layer.dtA_proj.bias.set_value(layer.dt_proj.bias[...])
    close(layer(x, jnp.ones((2, 7))), layer(x))
    close(decode(layer, x, layer.allocate_inference_cache(2), jnp.ones((2, 7)))[0], layer(x))


def test_padding_reaches_no_gradient():
    layer, x, lengths = make(bias=True), noise(2, 6, 3), jnp.array([6, 2])
    padded = x.at[1, 2:].set(jnp.nan)

    def loss(layer, x):
        return jnp.sum(layer(x, lengths=lengths) ** 2)

    (g, gx), (g0, gx0) = (nnx.grad(loss, argnums=(0, 1))(layer, v) for v in (padded, x))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((g, gx)))
    jax.tree.map(close, jax.tree.leaves(g), jax.tree.leaves(g0))
    close(gx, gx0)


def test_rows_are_independent_and_causal():
    layer, x = make(), noise(3, 9, 3)
    y = layer(x)
    broken = layer(x.at[1, 4:].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(broken).any(-1), np.arange(9) >= 4 * np.array([[99], [1], [99]]))
    close(broken[jnp.array([0, 2])], y[jnp.array([0, 2])])


def test_jit_vmap_and_grad_against_finite_differences():
    with jax.enable_x64(True):
        layer, x = make(param_dtype=jnp.float64), noise(2, 5, 3, dtype=jnp.float64)
        y = layer(x)
        assert y.dtype == jnp.float64
        close(y, by_definition(layer.state_dict(), x), 1e-13)
        close(nnx.jit(lambda m, v: m(v))(layer, x), y, 1e-13)
        close(nnx.vmap(lambda m, v: m(v[None])[0], in_axes=(None, 0))(layer, x), y, 1e-13)
        direction = noise(2, 5, 3, seed=1, dtype=jnp.float64)
        loss = lambda v: jnp.sum(layer(v) ** 3)  # noqa: E731
        slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
        close(jnp.vdot(jax.grad(loss)(x), direction), slope, 1e-7)


def test_bfloat16():
    layer, x = make(dtype=jnp.bfloat16), noise(2, 17, 3)
    assert layer.in_proj.kernel[...].dtype == jnp.bfloat16
    assert layer.A_log[...].dtype == layer.D[...].dtype == jnp.float32
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), by_definition(layer.state_dict(), x), 1e-2)
    cache = layer.allocate_inference_cache(2)
    assert cache["conv_state"].dtype == jnp.bfloat16
    assert cache["lrnn_state"].dtype == jnp.float32
    out, after = decode(layer, x, cache)
    close(out.astype(jnp.float32), y.astype(jnp.float32), 1e-2)
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in cache.items()}


def test_torch_tensors_in_and_out():
    layer, x = make(), noise(2, 5, 3)
    tensor = torch.from_numpy(np.array(x))
    y, cache = layer(tensor, inference_cache=layer.allocate_inference_cache(2))
    assert isinstance(y, torch.Tensor)
    assert isinstance(cache["lrnn_state"], torch.Tensor)
    close(y.numpy(), layer(x))
    out, _ = decode(layer, tensor, layer.allocate_inference_cache(2))
    close(out.numpy(), layer(x))


def test_names_shapes_and_initial_values_are_the_references():
    layer = make(8, 4, bias=True)
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (32, 8), "in_proj.bias": (32,), "conv1d.weight": (16, 1, 4), "conv1d.bias": (16,),
        "x_proj.weight": (9, 16), "dt_proj.weight": (16, 1), "dt_proj.bias": (16,), "dtA_proj.weight": (16, 1),
        "dtA_proj.bias": (16,), "A_log": (16, 4), "D": (16,), "out_proj.weight": (8, 16), "out_proj.bias": (8,),
    }  # fmt: skip
    wide = make(64, 16, dt_min=0.01, dt_max=0.2, dt_scale=0.5)
    dt = jax.nn.softplus(wide.dt_proj.bias[...])
    assert 0.01 <= float(dt.min()) < 0.02
    assert 0.1 < float(dt.max()) <= 0.2001
    weight = wide.dt_proj.kernel[...]
    assert 0.2 < float(jnp.abs(weight).max()) <= 0.25
    np.testing.assert_allclose(make(64, dt_init="constant").dt_proj.kernel[...], 0.5)
    np.testing.assert_allclose(jnp.exp(wide.A_log[3]), np.arange(1, 17), rtol=1e-6)
    for linear in (wide.in_proj, wide.x_proj, wide.out_proj):
        bound = linear.in_features**-0.5
        assert 0.95 * bound < float(jnp.abs(linear.kernel[...]).max()) <= bound
    assert 0.45 < float(jnp.abs(wide.conv1d.kernel[...]).max()) <= 0.5
    first, second = Mamba(4), Mamba(4)
    assert not np.array_equal(first.in_proj.kernel[...], second.in_proj.kernel[...])


def test_hints_are_the_references():
    layer = make()
    for name in ("A_log", "D"):
        assert getattr(layer, name).get_metadata()["no_weight_decay"]
    assert layer.dt_proj.bias.get_metadata()["no_reinit"]
    assert dict(hint(nnx.Param(jnp.ones(1)), lr=0.1).get_metadata()["optim"]) == {"lr": 0.1}


def test_a_checkpoint_of_the_original_mamba_is_complete():
    source, target = make(seed=1), nnx.eval_shape(lambda: make(seed=2))
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith("dtA_proj")}
    target.load_state_dict(weights)
    x = noise(2, 5, 3)
    close(target(x), source(x))
    np.testing.assert_array_equal(target.dtA_proj.bias[...], weights["dt_proj.bias"])
    with pytest.raises(StateDictMismatchError, match=r"dtA_proj\.weight"):
        make().load_state_dict({**weights, "dtA_proj.bias": weights["dt_proj.bias"]})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"discretization": "async"}, "discretization must be one of"),
        ({"dt_init": "zeros"}, "dt_init must be one of"),
        ({"device": "cuda"}, "device must be None or 'cpu'"),
        ({"reference": "torch"}, "reference must be one of"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"d_conv": 0}, "d_conv must be a positive integer"),
        ({"dt_rank": 1.5}, "dt_rank must be a positive integer"),
        ({"expand": 0}, "d_inner must be a positive integer"),
    ],
)
def test_arguments_it_cannot_honour_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_inputs_that_do_not_fit_raise():
    layer, x = make(), noise(2, 4, 3)
    cache = layer.allocate_inference_cache(2)
    with pytest.raises(ValueError, match=r"expects input \(B, L, H\) with H = 3, got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
    with pytest.raises(TypeError, match="real floating point"):
        layer(jnp.ones((2, 4, 3), int))
    with pytest.raises(ValueError, match=r"integration_timesteps must have shape \(B, L\)"):
        layer(x, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="step takes one step"):
        layer.step(x, cache)
    with pytest.raises(ValueError, match="inference_cache must have the keys"):
        layer(x, inference_cache={"lrnn_state": cache["lrnn_state"]})
    with pytest.raises(ValueError, match=r"conv_state must have shape \(2, 6, 4\)"):
        layer(x, inference_cache=layer.allocate_inference_cache(1))
    with pytest.raises(ValueError, match="lengths"):
        layer(x, lengths=jnp.ones((3,), int))


def test_sequences_without_steps():
    layer = make()
    cache = layer.allocate_inference_cache(2)
    y, after = layer(noise(2, 0, 3), inference_cache=cache)
    assert y.shape == (2, 0, 3)
    same_cache(after, cache)
