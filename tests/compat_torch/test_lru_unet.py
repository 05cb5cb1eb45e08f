"""compat_torch.architectures.lru_unet: its definition in torch, lengths, causality, dtypes, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import torch_models

import compat_torch
from compat_torch.architectures.lru_unet import DownPool1D, LRUUnet, UpPool1D
from compat_torch.errors import ReferenceDefectWarning


def make(seed=0, **kwargs):
    kwargs = {"in_channels": 2, "out_channels": 1, "channels": [4, 6], "resample_factors": [3, 2], **kwargs}
    return LRUUnet(**kwargs, rngs=nnx.Rngs(seed))


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


call = nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize(
    ("kwargs", "delays", "T"),
    [
        pytest.param({"reference": "paper"}, (1, 2), 13, marks=pytest.mark.full),
        ({"causal": False, "out_channels": 2, "resample_factors": [2], "channels": [3]}, (0,), 12),
        ({"resample_factors": [2, 2], "channels": [4, 8]}, (1, 1), 7),
    ],
)
def test_outputs_and_gradients_are_those_of_the_definition(kwargs, delays, T):
    model, x = make(**kwargs), noise(2, 2, T)
    w = noise(2, model.out_channels, T, seed=1)
    layout = (2, model.out_channels, model.channels[1:], model.resample_factors, delays)
    oracle = torch_models.load(torch_models.Unet(*layout), model.state_dict())
    expected = oracle(torch.tensor(np.asarray(x)).double())
    close(call(model, x), expected.detach())

    @nnx.jit
    def gradients(model):
        return compat_torch.state_dict(nnx.grad(lambda m: jnp.sum(m(x) * w))(model))

    theirs = torch_models.gradients(oracle, (expected * torch.tensor(np.asarray(w))).sum())
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        close(ours[name], theirs[name], 3e-5)
        assert jnp.isfinite(ours[name]).all()


def test_lrnnx_delays_by_one_step():
    with pytest.warns(
        ReferenceDefectWarning, match=r"resample_factors=\[3, 2\] output t depends on inputs up to t \+ 1"
    ):
        model = make()
    x = noise(1, 2, 9)
    layout = (2, 1, model.channels[1:], model.resample_factors, (1, 1))
    oracle = torch_models.load(torch_models.Unet(*layout), model.state_dict())
    close(call(model, x), oracle(torch.tensor(np.asarray(x)).double()).detach())


@pytest.mark.parametrize("T", [0, 1, 5, 6, 17])
def test_any_length(T):
    model = make(reference="paper")
    y = call(model, noise(2, 2, T))
    assert y.shape == (2, 1, T)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize(
    ("kwargs", "lookahead"),
    [
        ({"reference": "paper"}, 0),
        ({"reference": "paper", "resample_factors": [4], "channels": [3]}, 0),
        ({"resample_factors": [2, 2]}, 0),
        ({"resample_factors": [2, 2], "causal": False}, 3),
    ],
)
def test_causality(kwargs, lookahead):
    """Output t depends on the inputs up to t + lookahead, and on that one somewhere."""
    model, T = make(**kwargs), 13
    x = noise(2, T, seed=2)
    reach = nnx.jit(lambda m: jnp.abs(jax.jacobian(lambda x: m(x[None])[0])(x)).sum((0, 2)))(model)
    latest = [int(np.flatnonzero(row)[-1]) - t for t, row in enumerate(np.asarray(reach))]
    assert max(latest) == lookahead
    assert all(reach[t, t] > 0 for t in range(T))


@pytest.mark.parametrize(("factors", "later"), [([4, 2], 2), ([2, 3], 2), ([1, 4], 1)])
def test_the_warning_says_how_many_later_inputs_reach_an_output(factors, later):
    assert UpPool1D(4, 2, rngs=nnx.Rngs(0))(noise(1, 3, 4)).shape == (1, 6, 2)
    with pytest.warns(ReferenceDefectWarning, match=rf"inputs up to t \+ {later}\."):
        model = make(resample_factors=factors, channels=[2, 3])
    x = noise(2, 17, seed=2)
    reach = nnx.jit(lambda m: jnp.abs(jax.jacobian(lambda x: m(x[None])[0])(x)).sum((0, 2)))(model)
    assert max(int(np.flatnonzero(row)[-1]) - t for t, row in enumerate(np.asarray(reach))) == later


def test_the_default_arguments_warn_under_lrnnx_only():
    with pytest.warns(ReferenceDefectWarning, match=r"resample_factors=\[4, 2\] .* t \+ 2\."):
        LRUUnet(rngs=nnx.Rngs(0))
    LRUUnet(reference="paper", rngs=nnx.Rngs(0))
    LRUUnet(causal=False, rngs=nnx.Rngs(0))


def test_names_and_widths():
    shapes = {name: value.shape for name, value in make(reference="paper").state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if "lru_layer" not in name and "norm" not in name} == {
        "down_ssms.0.1.conv.weight": (4, 2, 3), "down_ssms.0.1.conv.bias": (4,),
        "down_ssms.1.1.conv.weight": (6, 4, 2), "down_ssms.1.1.conv.bias": (6,),
        "up_ssms.0.0.deconv.weight": (6, 4, 2), "up_ssms.0.0.deconv.bias": (4,),
        "up_ssms.1.0.deconv.weight": (4, 2, 3), "up_ssms.1.0.deconv.bias": (2,),
        "final_proj.weight": (1, 2, 1),
    }  # fmt: skip
    assert shapes["hid_ssms.1.0.lru_layer.B_re"] == (6, 6)
    assert "last_ssms.0.1.norm.weight" in shapes
    assert "last_ssms.1.1.norm.weight" not in shapes
    alone = make(in_channels=1, reference="paper").state_dict()
    assert not any(name.startswith("final_proj") or "down_ssms.0.0.1" in name for name in alone)
    bound = 1 / math.sqrt(2 * 3)
    assert 0.5 * bound < jnp.abs(make(reference="paper").down_ssms[0][1].conv.kernel[...]).max() <= bound


@pytest.mark.full
def test_dtypes_and_torch():
    model, x = make(reference="paper"), noise(2, 2, 7)
    y = call(model, x)
    low = call(model, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    close(low.astype(jnp.float32), y, 3e-2)
    assert call(make(reference="paper", dtype=jnp.bfloat16), x).dtype == jnp.bfloat16
    shallow = make(causal=False, channels=[2], resample_factors=[2])
    with torch.no_grad():
        close(shallow(torch.tensor(np.asarray(x))), call(shallow, x))
    abstract = nnx.eval_shape(lambda: make(reference="paper"))
    with jax.enable_x64(True):
        abstract.load_state_dict(model.state_dict(), dtype=jnp.float64)
        y64 = call(abstract, x.astype(jnp.float64))
        assert y64.dtype == jnp.float64
        close(y, y64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": [4]}, r"same length, at least 1, got \[4\] and \[3, 2\]"),
        ({"channels": [], "resample_factors": []}, "same length, at least 1"),
        ({"channels": [4, 0]}, r"channels\[1\] must be a positive integer, got 0"),
        ({"resample_factors": [2.0, 2]}, r"resample_factors\[0\] must be a positive integer, got 2.0"),
        ({"pre_conv": True}, "pre_conv=True is not supported"),
        ({"out_channels": 0}, "out_channels must be a positive integer"),
        ({"reference": "none"}, "reference must be one of"),
    ],
)
def test_what_the_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 8}, "channels must be a list of integers, one for each level, got 8"),
        ({"resample_factors": 4}, "resample_factors must be a list of integers"),
        ({"param_dtype": jnp.int32}, "param_dtype must be a real floating point dtype"),
    ],
)
def test_arguments_of_other_types(kwargs, message):
    with pytest.raises(TypeError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("part", "kwargs", "message"),
    [
        (DownPool1D, {"in_channels": 0}, "in_channels must be a positive integer"),
        (DownPool1D, {"in_channels": 2, "downsample_factor": 0}, "downsample_factor must be a positive integer"),
        (DownPool1D, {"in_channels": 2, "out_channels": 0}, "out_channels must be a positive integer, got 0"),
        (UpPool1D, {"in_channels": 1}, "out_channels must be a positive integer, got 0"),
        (UpPool1D, {"in_channels": 2, "upsample_factor": -1}, "upsample_factor must be a positive integer"),
        (UpPool1D, {"in_channels": 2, "shift": -1}, "shift must be an integer, at least 0, got -1"),
    ],
)
def test_sizes_of_the_parts(part, kwargs, message):
    with pytest.raises(ValueError, match=message):
        part(**kwargs)


def test_what_a_call_refuses():
    model = make(reference="paper")
    with pytest.raises(ValueError, match=r"expects input \(B, C, T\) with C = in_channels = 2, got shape \(1, 7, 2\)"):
        model(noise(1, 7, 2))
    with pytest.raises(TypeError, match=r"real floating point input .*, got int32"):
        model(jnp.ones((1, 2, 7), jnp.int32))
    with pytest.raises(ValueError, match="DownPool1D: the length must be a multiple of 3, got 8"):
        DownPool1D(2, 3, rngs=nnx.Rngs(0))(noise(1, 8, 2))
