"""state_dict and load_state_dict: names, all or nothing, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch import state_dict
from compat_torch.errors import CheckpointError, StateDictMismatchError
from compat_torch.models.lti import LRU, S5

S5_SHAPES = {"A": (6, 2), "B": (6, 3), "log_dt": (6,), "C": (3, 6, 2), "D": (3, 3)}


def s5(seed=0):
    return S5(3, 6, "zoh", rngs=nnx.Rngs(seed))


def test_names_and_shapes_are_the_references():
    assert {name: value.shape for name, value in s5().state_dict().items()} == S5_SHAPES
    assert list(LRU(3, 4).state_dict()) == ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]


def test_it_names_a_gradient_tree():
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 4, 3)))))(s5())
    assert {name: value.shape for name, value in state_dict(grads).items()} == S5_SHAPES


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, lambda v: torch.from_numpy(np.array(v))])
def test_round_trip(convert):
    source, target = s5(1), s5(2)
    result = target.load_state_dict({name: convert(value) for name, value in source.state_dict().items()})
    assert result == ([], [])
    for name, value in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name], value)


def test_parameters_that_require_grad_load_too():
    weights = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in S5_SHAPES.items()}
    layer = s5()
    layer.load_state_dict(weights)
    np.testing.assert_array_equal(layer.D[...], 1)


def test_loaded_arrays_are_copies():
    weights = {name: np.ones(shape, np.float32) for name, shape in S5_SHAPES.items()}
    layer = s5()
    layer.load_state_dict(weights)
    weights["D"][:] = 7
    np.testing.assert_array_equal(layer.D[...], 1)


def test_everything_wrong_is_listed_and_nothing_is_loaded():
    layer = s5()
    before = {name: np.array(value) for name, value in layer.state_dict().items()}
    weights = {name: np.zeros(shape, np.float32) for name, shape in S5_SHAPES.items()}
    weights["log_dts"] = weights.pop("log_dt")
    weights["B"] = weights["B"].T
    weights["C"] = weights["C"].astype(np.int32)
    with pytest.raises(StateDictMismatchError) as caught:
        layer.load_state_dict(weights)
    assert caught.value.missing == ["log_dt"]
    assert caught.value.unexpected == ["log_dts"]
    text = str(caught.value)
    assert "unexpected: log_dts (did you mean 'log_dt'?)" in text
    assert "B: expected float32[6, 3], got float32[3, 6]" in text
    assert "C: expected float32[3, 6, 2], got int32[3, 6, 2]" in text
    for name, value in before.items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)


def test_not_strict_reports_what_it_left_out():
    layer = s5()
    result = layer.load_state_dict({"D": np.ones((3, 3), np.float32), "E": np.ones(1)[:0].astype("f")}, strict=False)
    assert result.missing_keys == ["A", "B", "log_dt", "C"]
    assert result.unexpected_keys == ["E"]
    np.testing.assert_array_equal(layer.D[...], 1)
    with pytest.raises(StateDictMismatchError, match="D: expected"):
        layer.load_state_dict({"D": np.ones(3, np.float32)}, strict=False)


def test_dtype_is_the_sources_unless_asked():
    weights = {name: np.ones(shape, jnp.bfloat16) for name, shape in S5_SHAPES.items()}
    layer = s5()
    layer.load_state_dict(weights)
    assert layer.D[...].dtype == jnp.bfloat16
    layer.load_state_dict(weights, dtype=jnp.float32)
    assert layer.D[...].dtype == jnp.float32


def test_float64_is_never_rounded_silently():
    weights = {name: np.full(shape, 1 + 1e-12) for name, shape in S5_SHAPES.items()}
    layer = s5()
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        layer.load_state_dict(weights)
    layer.load_state_dict(weights, dtype=jnp.float32)
    assert layer.D[...].dtype == jnp.float32
    with jax.enable_x64(True):
        layer.load_state_dict(weights)
        assert layer.D[...].dtype == jnp.float64
        assert float(layer.D[0, 0]) == 1 + 1e-12
