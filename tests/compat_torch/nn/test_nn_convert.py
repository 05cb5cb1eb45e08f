"""From torch modules to JAX modules and back."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import torch_models
from oracles.torch_modules import stand_in, with_tensors
from oracles.transformers_models import outputs_of, reference

from compat_torch.core.discretization import DISCRETIZE_FNS
from compat_torch.models import lti as jax_lti
from compat_torch.models import ltv as jax_ltv
from compat_torch.nn import from_torch, lti, ltv, to_torch
from parity.case import GOLDEN, read_case


@pytest.mark.parametrize(
    "make",
    [
        lambda: jax_lti.S5(3, 4, "zoh"),
        lambda: jax_lti.S4D(3, d_state=4, transposed=False, lr={"dt": 0.0}),
        lambda: jax_lti.CentaurusNeck(3, 4, 2),
        lambda: jax_ltv.Mamba(3, d_state=2, d_conv=2, param_dtype=jnp.bfloat16),
    ],
    ids=["S5", "S4D", "Centaurus", "Mamba"],
)
def test_round_trips_keep_every_bit(make):
    module = make()
    twin = to_torch(module)
    back = from_torch(twin)
    assert type(back) is type(module)
    assert nnx.graphdef(back) == nnx.graphdef(module)
    before, after = module.state_dict(), back.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        np.testing.assert_array_equal(value, after[name])
    again = to_torch(back)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1)
    np.testing.assert_array_equal(next(iter(back.state_dict().values())), next(iter(before.values())))


def test_a_live_torch_layer():
    theirs = stand_in("lrnnx.models.lti.lru:LRU", torch_models.LRU)(3, 4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    module = from_torch(theirs.eval())
    assert type(module) is jax_lti.LRU
    x = torch.randn(2, 7, 3)
    expected = torch.stack([theirs(row) for row in x]).detach().numpy()
    np.testing.assert_allclose(module(jnp.asarray(x.numpy())), expected, atol=1e-5, rtol=1e-4)
    before = np.asarray(module.D[...]).copy()
    with torch.no_grad():
        theirs.D.zero_()
    np.testing.assert_array_equal(module.D[...], before)


CASES = {
    "lrnnx_s5lti_dirac_a": lambda kwargs: {"discretize_fn": DISCRETIZE_FNS["dirac"], "conj_sym": False},
    "lrnnx_mamba_zoh_b": lambda kwargs: {"discretization": "zoh"},
    "lrnnx_s5ltv_bilinear_conj": lambda kwargs: {
        "discretization": "bilinear", "conj_sym": True, "step_rescale": kwargs.get("step_rescale", 1.0)
    },
    "lrnnx_centaurus_neck_a": lambda kwargs: {"discretization": "zoh"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_read_off_the_module(name):
    case = read_case(GOLDEN / name)
    live = with_tensors(case.cls, case.weights, CASES[name](case.kwargs))
    module = from_torch(live.eval())
    run = case.runs[0]
    y = module(jnp.asarray(run.x), **{key: jnp.asarray(value) for key, value in run.inputs.items()})
    limit = 1e-5 * max(1, np.abs(run.y64).max()) + 2 * np.abs(run.y - run.y64).max()
    np.testing.assert_allclose(y, run.y, rtol=0, atol=limit)


def test_what_cannot_be_told_is_asked_for():
    case = read_case(GOLDEN / "lrnnx_mamba_zoh_b")
    live = with_tensors(case.cls, case.weights)
    with pytest.raises(ValueError, match=r"does not keep discretization: pass from_torch\(module, discretization=..."):
        from_torch(live)
    assert from_torch(live, discretization="zoh").discretization == "zoh"


def test_unknown_modules_are_named_with_what_is_known():
    with pytest.raises(TypeError, match=r"does not know torch.nn.modules.linear:Linear.*lrnnx.models.ltv.mamba:Mamba"):
        from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nu_log"):
        from_torch(with_tensors("lrnnx.models.lti.lru:LRU", {"D": np.ones(3, np.float32)}))
    with pytest.raises(TypeError, match="no further arguments"):
        from_torch(lti.LRU(3, 4), r_min=0.5)


def test_mode_is_kept():
    layer = lti.S4D(3, d_state=4, dropout=0.5)
    assert from_torch(layer).drop.deterministic is False
    assert from_torch(layer.eval()).drop.deterministic is True
    assert to_torch(from_torch(layer)).training is False


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=2, conv_kernel=3, time_step_rank=2
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    module = from_torch(theirs)
    ids = torch.randint(11, (2, 7))
    with torch.no_grad():
        expected = theirs(ids).logits
        np.testing.assert_allclose(module(jnp.asarray(ids.numpy())).logits, expected.numpy(), atol=1e-5, rtol=1e-4)
        twin = to_torch(module)
        torch.testing.assert_close(twin(ids).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (
            "Mamba2",
            {"state_size": 4, "conv_kernel": 3, "num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4},
        ),
        ("FalconMamba", {"state_size": 4, "conv_kernel": 3, "time_step_rank": 2}),
        (
            "RecurrentGemma",
            {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 3, "lru_width": 12,
             "intermediate_size": 20, "w_init_variance_scale": 0.5, "attn_implementation": "eager"},
        ),
    ],
)  # fmt: skip
def test_other_models_of_transformers(architecture, config):
    layers = 3 if architecture == "RecurrentGemma" else 2
    theirs = reference(architecture, vocab_size=11, hidden_size=8, num_hidden_layers=layers, **config)
    module = from_torch(theirs)
    assert module.config.to_dict().items() >= {"vocab_size": 11, "num_hidden_layers": layers}.items()
    ids = np.random.default_rng().integers(0, 11, (2, 7))
    expected, _ = outputs_of(theirs, ids)
    logits = nnx.jit(lambda module, ids: module(ids).logits)(module, jnp.asarray(ids))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)
    twin = to_torch(module)
    weights = dict(theirs.state_dict())
    if architecture == "Mamba2":
        weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    back = twin.state_dict()
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    again = from_torch(twin)
    assert type(again) is type(module)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value, back[name])


def test_without_torch():
    """`import compat_torch` works, `compat_torch.nn` says what to install."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import compat_torch\n"
        "try:\n import compat_torch.nn\n"
        "except ImportError as error:\n assert 'pip install' in str(error), error\n"
        "else:\n raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_mirrors_have_what_the_jax_modules_have():
    assert {"LRU", "S4", "S4D", "S5", "Centaurus"} <= set(dir(lti))
    assert issubclass(ltv.Mamba, ltv.LTV_LRNN)
    assert ltv.Mamba is ltv.Mamba
    with pytest.raises(AttributeError):
        lti.Nothing  # noqa: B018
