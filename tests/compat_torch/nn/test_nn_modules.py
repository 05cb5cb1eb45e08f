"""Torch modules computed by JAX: names, state dicts, copies, modes, methods, caches."""

import copy
import inspect
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import compat_torch
from compat_torch import models, nn
from compat_torch.architectures.language_model import CausalLMOutput
from compat_torch.nn import ltv
from compat_torch.nn.architectures.classifier import Classifier
from compat_torch.nn.architectures.language_model import LRNNLMHeadModel
from compat_torch.nn.lti import LRU, S4, S4D, S5, Centaurus, CentaurusNeck
from compat_torch.nn.ltv import LTV_LRNN, RGLRU, S7, Mamba

LAYERS = {
    "lti.S5": lambda: S5(3, 4, "zoh"),
    "lti.LRU": lambda: LRU(3, 4),
    "lti.S4": lambda: S4(3, d_state=4, transposed=False, l_max=7),
    "lti.S4D": lambda: S4D(3, d_state=4, transposed=False, gate=2),
    "lti.Centaurus": lambda: Centaurus(3, 4, 2),
    "ltv.Mamba": lambda: Mamba(3, d_state=2, d_conv=2),
    "ltv.S5": lambda: ltv.S5(3, 4),
    "ltv.RGLRU": lambda: RGLRU(3, d_conv=2),
    "ltv.S7": lambda: S7(3, 4),
}


QUICK = ("lti.S5", "lti.S4D", "lti.Centaurus", "ltv.Mamba")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in LAYERS]
)
def layer(request):
    torch.manual_seed(3)
    model = LAYERS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def out(result):
    return result[0] if isinstance(result, tuple) else result


def same_bits(state, other):
    assert list(state) == list(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def test_names_values_and_outputs_are_those_of_the_jax_class(layer):
    module = layer.to_jax()
    expected = module.state_dict()
    assert set(layer.state_dict()) == set(expected)
    for name, value in layer.state_dict().items():
        assert str(value.dtype).removeprefix("torch.") == str(expected[name].dtype)
        np.testing.assert_array_equal(value.numpy(), expected[name])
    x = torch.randn(2, 7, 3)
    with torch.no_grad():
        y = out(layer(x))
        np.testing.assert_allclose(y.numpy(), out(jax.jit(lambda x: out(module(x)))(x.numpy())), atol=1e-6, rtol=1e-6)
        assert y.dtype == torch.float32


def test_forward_with_a_cache_and_steps_update_it_in_place(layer):
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        y = out(layer(x))
        cache = layer.allocate_inference_cache(2)
        leaves = dict(cache)
        first, returned = layer(x[:, :2], inference_cache=cache)
        assert returned is cache
        ys = [first]
        for t in range(2, 5):
            x_t = x[:, t : t + 1] if isinstance(layer, LTV_LRNN) else x[:, t]
            y_t, returned = layer.step(x_t, cache)
            assert returned is cache
            ys.append(y_t.reshape(2, 1, 3))
    assert all(cache[name] is leaf for name, leaf in leaves.items())
    torch.testing.assert_close(torch.cat(ys, 1), y, atol=1e-5, rtol=1e-5)


def test_deepcopy_pickle_and_torch_save(layer):
    x = torch.randn(1, 3, 3)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        y = out(layer(x))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):
            assert type(other) is type(layer)
            same_bits(other.state_dict(), layer.state_dict())
            assert [vars(p) for p in other.parameters()] == [vars(p) for p in layer.parameters()]
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}
            assert torch.equal(out(other(x)), y)


def test_state_dicts_load_strictly_with_tied_names():
    torch.manual_seed(0)
    model, other = S4D(3, d_state=4), S4D(3, d_state=4)
    state = model.state_dict()
    assert model.layer.kernel.C is model.C
    assert len(list(model.parameters())) == len({p.data_ptr() for p in state.values()}) < len(state)
    one_name = {name: value for name, value in state.items() if not name.startswith("layer.")}
    assert not any(other.load_state_dict(one_name))
    same_bits(other.state_dict(), state)
    with pytest.raises(RuntimeError, match=r"C and layer.kernel.C are one tensor, but their values differ"):
        other.load_state_dict({**state, "layer.kernel.C": state["C"] + 1})
    with pytest.raises(RuntimeError, match=r"Missing key.*\"D\""):
        other.load_state_dict({name: value for name, value in state.items() if name != "D"})
    with pytest.raises(RuntimeError, match=r"size mismatch for D"):
        other.load_state_dict({**state, "D": state["D"][:, :1]})
    other.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert other.layer.kernel.C is other.C
    with torch.no_grad():
        assert torch.equal(out(other(torch.ones(1, 3, 2))), out(model(torch.ones(1, 3, 2))))


def test_a_checkpoint_that_the_jax_class_completes_loads():
    model = Mamba(3, d_state=2, d_conv=2)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("dtA_proj")}
    holder = torch.nn.Sequential(Mamba(3, d_state=2, d_conv=2))
    holder.load_state_dict({f"0.{name}": value for name, value in state.items()})
    same_bits(holder[0].dtA_proj.state_dict(), model.dt_proj.state_dict())


def test_in_place_edits_and_new_parameters_are_seen():
    layer, x = S5(3, 4, "zoh"), torch.randn(1, 5, 3)
    with torch.no_grad():
        y = layer(x)
        layer.D.mul_(2).sub_(1)
        edited = layer(x)
        layer.D.copy_(torch.zeros(3, 3))
        without = layer(x)
    torch.testing.assert_close(edited, y + x @ (layer.D * 0) + (edited - y))
    assert not torch.equal(edited, y)
    layer.D = torch.nn.Parameter(torch.eye(3))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), without + x)
    layer.D = torch.nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"D must have shape \(3, 3\).*got \(2, 3\)"):
        layer(x)


def test_what_would_have_no_effect_raises():
    x = torch.randn(1, 3, 3)
    layer = Mamba(3, d_state=2, d_conv=2)
    handle = layer.in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="in_proj has hooks"):
        layer(x)
    handle.remove()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    assert seen
    layer.in_proj = torch.nn.Linear(3, 12, bias=False)
    with pytest.raises(TypeError, match="in_proj was replaced by Linear"):
        layer(x)
    s4d = S4D(3, d_state=4)
    s4d.C = torch.nn.Parameter(s4d.C.detach().clone())
    with pytest.raises(ValueError, match=r"C and layer.kernel.C are one tensor"):
        s4d(torch.ones(1, 3, 2))
    with pytest.raises(TypeError, match="rngs cannot be passed"):
        S4D(3, d_state=4)(torch.ones(1, 3, 2), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        LRU(3, 4)(x, speed=1)
    with pytest.raises(ValueError, match=r"got shape \(4, 3\)"):
        LRU(3, 4)(torch.ones(4, 3))


def test_hints_of_the_reference_are_attributes_of_the_tensors():
    layer = S4D(3, d_state=4, lr={"dt": 0.0, "A": 0.001}, wd=0.0)
    assert "inv_dt" in dict(layer.named_buffers())
    assert layer.A_real._optim == {"lr": 0.001, "weight_decay": 0.0}
    twin = copy.deepcopy(layer)
    assert twin.A_real._optim == layer.A_real._optim
    assert twin.A_real._optim is not layer.A_real._optim
    mamba = Mamba(3, d_state=2, d_conv=2)
    assert mamba.A_log._no_weight_decay
    assert mamba.dt_proj.bias._no_reinit
    layer.double()
    assert layer.layer.kernel.inv_dt is layer.inv_dt


def test_complex_parameters():
    layer = CentaurusNeck(3, 4, 2)
    assert layer.A.dtype == torch.complex64
    assert layer.A.shape == (4, 2)
    assert layer.E.dtype == torch.float32


def test_methods_attributes_and_types_follow_the_jax_class():
    layer = S5(3, 4, "no_discretization", reference="paper")
    assert (layer.d_model, layer.discretization) == (3, "no_discretization")
    with torch.no_grad():
        A_bar, gamma, C = layer.discretize()
        assert A_bar.dtype == torch.complex64
        assert gamma == 1.0
        power, B_bar = layer.compute_kernel(5, A_bar, gamma)
    assert (power.shape, B_bar.shape, C.shape) == ((4, 5), (4, 3), (3, 4))
    torch.testing.assert_close(power, A_bar[:, None] ** torch.arange(5))
    assert isinstance(Mamba(3), LTV_LRNN)
    assert not isinstance(layer, LTV_LRNN)
    assert isinstance(Centaurus(3, 4, 2), CentaurusNeck)
    assert "compute_kernel" in dir(layer)
    with pytest.raises(AttributeError):
        layer.nothing  # noqa: B018
    assert "computed by compat_torch.models.lti.s5.S5" in repr(layer)


def test_constructors_take_torch_dtypes_devices_and_the_torch_seed():
    torch.manual_seed(5)
    one = Mamba(3, d_state=2, dtype=torch.bfloat16, device="cpu")
    torch.manual_seed(5)
    two = Mamba(3, d_state=2, dtype=torch.bfloat16)
    same_bits(one.state_dict(), two.state_dict())
    assert one.in_proj.weight.dtype == torch.bfloat16
    assert one.A_log.dtype == torch.float32
    assert not torch.equal(two.in_proj.weight, Mamba(3, d_state=2, dtype=torch.bfloat16).in_proj.weight)
    assert inspect.signature(Mamba).parameters["d_state"].default == 16
    assert Mamba(3, device="meta").in_proj.weight.is_meta


def test_dtypes_of_the_module_change_as_torch_users_expect():
    layer, x = Mamba(3, d_state=2, d_conv=2), torch.randn(1, 4, 3)
    with torch.no_grad():
        y = layer(x)
        rounded = layer.to(torch.bfloat16)(x.bfloat16())
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), y, atol=5e-2, rtol=5e-2)
        with pytest.raises(ValueError, match=r"torch.float64.*jax_enable_x64"):
            layer.double()(x.double())
        with jax.enable_x64(True):
            wide = layer(x.double())
            assert wide.dtype == torch.float64
            assert layer.allocate_inference_cache(1, dtype=torch.float64)["lrnn_state"].dtype == torch.float64


def test_train_and_eval_of_a_part():
    model = Classifier(3, 2, d_model=4, d_state=2, n_layers=2, dropout=0.5)
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.blocks[0].dropout.eval()
        model.final_block.dropout.eval()
        assert model.training
        assert torch.equal(model(x), model(x))
        model.train()
        model.eval()
        y = model(x)
        assert torch.equal(model(x), y)
        assert not copy.deepcopy(model).training
        assert torch.equal(copy.deepcopy(model)(x), y)


def test_dropout_follows_the_torch_generator():
    layer, x = S4D(3, d_state=4, dropout=0.5), torch.randn(1, 3, 9)
    with torch.no_grad():
        torch.manual_seed(1)
        first = layer(x)[0]
        state = torch.get_rng_state()
        second = layer(x)[0]
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(layer(x)[0], first)
        torch.set_rng_state(state)
        assert torch.equal(layer(x)[0], second)
        layer.eval()
        state = torch.get_rng_state()
        layer(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_language_model(tmp_path):
    torch.manual_seed(0)
    kwargs = {"Mamba": {"d_conv": 2}, "S5": {"discretization": "zoh"}}
    model = LRNNLMHeadModel(4, 2, 2, 9, ["Mamba", "S5"], mixer_kwargs=kwargs, d_intermediate=4)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert isinstance(model.backbone.layers, torch.nn.ModuleList)
    assert isinstance(model.backbone.layers[0].mixer, Mamba)
    ids = torch.randint(9, (2, 5))
    with torch.no_grad():
        result = model(ids)
        assert isinstance(result, CausalLMOutput)
        torch.testing.assert_close(model(ids, num_last_tokens=2).logits, result.logits[:, -2:])
        caches = model.allocate_inference_cache(2, 5)
        prefix, same = model.prefill(ids[:, :3], caches)
        assert same is caches
        steps = [model.step(ids[:, t : t + 1], caches)[0].logits for t in (3, 4)]
        torch.testing.assert_close(torch.cat([prefix.logits, *steps], 1), result.logits, atol=1e-5, rtol=1e-5)
        assert caches[0]["seqlen_offset"].tolist() == [5, 5]
        hidden = model.backbone.layers[0].mixer(torch.ones(1, 2, 4))
        assert hidden.shape == (1, 2, 4)
        model.save_pretrained(tmp_path)
        loaded = LRNNLMHeadModel.from_pretrained(tmp_path)
        assert isinstance(loaded, LRNNLMHeadModel)
        assert not loaded.training
        assert torch.equal(loaded(ids).logits, result.logits)
    with pytest.raises(TypeError, match="tie_weights changes the variables"):
        LRNNLMHeadModel(4, 2, 1, 9, ["LRU"], tie_embeddings=False).tie_weights()


def test_layers_of_nn_inside_whole_models():
    model = Classifier(3, 2, d_model=4, n_layers=1, lrnn_cls=Mamba, lrnn_params={"d_state": 2}, dropout=0.0)
    assert isinstance(model.final_block.lrnn, Mamba)
    assert model.jax_class is compat_torch.architectures.classifier.Classifier
    assert isinstance(model.to_jax().final_block.lrnn, models.ltv.Mamba)


class Normalised(nnx.Module):
    """Batch norm, dropout with streams of its own, a list, a dictionary, a bare parameter."""

    calls = 0

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dense = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.named = nnx.Dict(a=nnx.Linear(3, 2, use_bias=False, rngs=rngs))
        self.scale = nnx.Param(jnp.ones(3))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, power: float = 1.0):
        Normalised.calls += 1
        for dense in self.dense:
            x = dense(x)
        return self.named["a"](self.drop(self.norm(x) * self.scale[...] ** power))


def test_wrap_of_ones_own_module():
    module = Normalised(nnx.Rngs(0))
    model = nn.wrap(module)
    assert set(model.state_dict()) == {
        "norm.mean", "norm.var", "norm.weight", "norm.bias", "dense.0.weight", "dense.0.bias", "dense.1.weight",
        "dense.1.bias", "named.a.weight", "scale",
    }  # fmt: skip
    assert dict(model.named_buffers()).keys() == {"norm.mean", "norm.var"}
    x = torch.randn(6, 3, requires_grad=True)
    torch.manual_seed(0)
    model(x).sum().backward()
    assert model.norm.mean.grad is None
    hidden = module.dense[1](module.dense[0](jnp.asarray(x.detach().numpy())))
    np.testing.assert_allclose(model.norm.mean.numpy(), 0.5 * hidden.mean(0), atol=1e-6)
    np.testing.assert_array_equal(module.norm.mean[...], np.zeros(3))
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        mean = model.norm.mean.clone()
        y = model(x)
        assert torch.equal(model.norm.mean, mean)
    back = model.to_jax()
    np.testing.assert_allclose(y.numpy(), back(jnp.asarray(x.detach().numpy())), atol=1e-6)
    pickled = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(pickled(x), y)
    assert nn.wrap(back).training is False


def test_wrap_refuses():
    with pytest.raises(TypeError, match=r"expects an nnx.Module, got Linear"):
        nn.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="shapes but no values"):
        nn.wrap(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))))


def test_compilations_are_bounded():
    model = nn.wrap(Normalised(nnx.Rngs(0)))
    x = torch.randn(5, 3)
    Normalised.calls = 0
    for _ in range(3):
        model(x)
        copy.deepcopy(model)(x)
        with torch.no_grad():
            model.scale.add_(1)
    assert Normalised.calls == 1
    model(x, power=2.0)
    model(x[:4])
    model.eval()
    model(x)
    assert Normalised.calls == 4
    for _ in range(2):
        with torch.no_grad():
            model(x)
    assert Normalised.calls == 5
    model.requires_grad_(False)
    model(x)
    assert Normalised.calls == 5
    model.scale.requires_grad_()
    model(x)
    model(x)
    assert Normalised.calls == 6
