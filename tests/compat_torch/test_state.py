"""state_dict and load_state_dict: names, all or nothing, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch import load_state_dict, state_dict
from compat_torch.core.layers import depthwise_conv, linear
from compat_torch.core.variables import Buffer
from compat_torch.errors import CheckpointError, StateDictMismatchError
from compat_torch.models.lti import LRU, S5
from compat_torch.state import Entry, entries

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


class Holder(nnx.Module):
    """Every kind of entry: Flax layers, a list, a tied parameter, a complex one, an integer buffer."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        options = {"param_dtype": jnp.float32, "precision": None, "rngs": rngs}
        self.layers = nnx.List([linear(2, 3, **options), linear(3, 2, bias=False, **options)])
        self.conv1d = depthwise_conv(3, 4, **options)
        self.norm = nnx.RMSNorm(3, rngs=rngs)
        self.embed = nnx.Embed(5, 2, rngs=rngs)
        self.tied = nnx.Dict(C=nnx.Param(jnp.arange(4.0)))
        self.C = self.tied["C"]
        self.A = nnx.Param(jax.random.normal(rngs.params(), (2, 2)), is_complex=True)
        self.l_kernel = Buffer(jnp.asarray(7, jnp.int32))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def holder_dict():
    return {name: np.array(value) for name, value in state_dict(Holder(1)).items()}


def test_flax_layers_have_torchs_names_and_layouts():
    module = Holder()
    names = state_dict(module)
    assert {name: value.shape for name, value in names.items()} == {
        "layers.0.weight": (3, 2), "layers.0.bias": (3,), "layers.1.weight": (2, 3), "conv1d.weight": (3, 1, 4),
        "conv1d.bias": (3,), "norm.weight": (3,), "embed.weight": (5, 2), "tied.C": (4,), "C": (4,), "A": (2,),
        "l_kernel": (),
    }  # fmt: skip
    assert names["A"].dtype == jnp.complex64
    np.testing.assert_array_equal(names["A"], module.A[..., 0] + 1j * module.A[..., 1])
    dense = torch.nn.Linear(2, 3)
    load_state_dict(module, {"layers.0.weight": dense.weight, "layers.0.bias": dense.bias}, strict=False)
    x = noise_like((4, 2))
    np.testing.assert_allclose(module.layers[0](x), dense(torch.from_numpy(x)).detach(), atol=1e-6)


def noise_like(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_views_are_the_values_and_share_their_memory():
    for entry in entries(Holder(1)):
        view, value = entry.view(), np.asarray(entry.read())
        assert (view.shape, view.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(view, value)
        if jax.default_backend() == "cpu":
            assert np.shares_memory(view, np.asarray(entry.variable[...])), entry.name


def test_a_complex_parameter_in_bfloat16_is_seen_as_complex64():
    variable = nnx.Param(jnp.ones((3, 2), jnp.bfloat16), is_complex=True)
    entry = Entry.at(("A",), variable)
    assert entry.view().dtype == entry.read().dtype == jnp.complex64
    np.testing.assert_array_equal(entry.view(), np.full(3, 1 + 1j))


def test_every_kind_of_entry_round_trips():
    target, weights = nnx.eval_shape(Holder), holder_dict()
    weights["l_kernel"] = np.int64(9)
    assert load_state_dict(target, weights) == ([], [])
    for name, value in state_dict(target).items():
        np.testing.assert_array_equal(value, weights[name])
    assert target.l_kernel[...].dtype == jnp.int32
    assert target.C is target.tied["C"]


def test_of_a_tied_parameter_one_name_is_enough_and_unequal_copies_raise():
    weights = holder_dict()
    del weights["tied.C"]
    target = Holder()
    load_state_dict(target, {**weights, "C": weights["C"] + 1})
    np.testing.assert_array_equal(target.tied["C"][...], weights["C"] + 1)
    with pytest.raises(StateDictMismatchError, match=r"C and tied\.C are one parameter, but their values differ"):
        load_state_dict(target, {**weights, "tied.C": weights["C"] + 2})
    np.testing.assert_array_equal(target.C[...], weights["C"] + 1)
    del weights["C"]
    with pytest.raises(StateDictMismatchError, match=r"missing: tied\.C\n.*missing: C"):
        load_state_dict(target, weights)


def test_kinds_of_dtype_are_kept():
    weights = holder_dict()
    for name, wrong in (("A", np.ones(2, np.float32)), ("l_kernel", np.float32(3)), ("C", np.ones(4, np.complex64))):
        with pytest.raises(StateDictMismatchError, match=f"mismatched: {name}: expected"):
            load_state_dict(Holder(), {**weights, name: wrong})


def test_a_gradient_tree_has_the_same_layouts():
    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m.layers[0].kernel[...])) + jnp.sum(m.C[...]))(Holder())
    named = state_dict(grads)
    np.testing.assert_allclose(named["layers.0.weight"], jnp.cos(Holder().layers[0].kernel[...]).T, atol=1e-6)
    assert ("C" in named) != ("tied.C" in named)
    assert named["A"].dtype == jnp.complex64
