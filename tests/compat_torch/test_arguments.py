"""No constructor argument of lrnnx is accepted and dropped: each changes the module, raises, or is a stated hint."""

import importlib
import json
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compat_torch import optim
from compat_torch.errors import ReferenceDefectWarning
from compat_torch.models import ltv
from parity.live_signatures import ANY, FILE

STORED = json.loads(FILE.read_text())


class Effect(NamedTuple):
    """Another value than in `given`, which changes parameters, their optimiser groups or the outputs."""

    value: Any
    given: dict[str, Any] = {}  # noqa: RUF012


class Hint(NamedTuple):
    """A value that changes nothing, as the documentation says."""

    value: Any
    given: dict[str, Any] = {}  # noqa: RUF012


class Refused(NamedTuple):
    """A value that raises an error which names the argument."""

    value: Any
    given: dict[str, Any] = {}  # noqa: RUF012


SIZES = {"d_model": Effect(2), "d_state": Effect(2)}
PLACES = {"device": Refused("cuda"), "dtype": Effect(jnp.bfloat16)}
LTV = {"use_fast_path": Hint(False), "layer_idx": Hint(3), **PLACES}
DT = {"dt_min": Effect(0.05), "dt_max": Effect(0.5)}
S4 = {
    "d_model": Effect(2), "d_state": Effect(2), "bottleneck": Effect(2), "gate": Effect(2), "final_act": Effect(None),
    "postact": Effect("gelu", {"final_act": None}), "dropout": Effect(0.5),
    "tie_dropout": Effect(True, {"dropout": 0.5}), "transposed": Effect(True), "l_max": Effect(3),
    "channels": Effect(2), **DT, "dt_tie": Effect(False), "dt_transform": Effect("softplus"), "dt_fast": Effect(True),
    "n_ssm": Effect(1),
    "init": Effect("diag-lin"), "deterministic": Effect(True), "real_transform": Effect("relu"),
    "imag_transform": Effect("softplus"), "is_real": Effect(True, {"init": "diag-real"}), "lr": Effect({"dt": 0.5}),
    "wd": Effect(0.5), "verbose": Hint(False),
}  # fmt: skip
NECK = {**SIZES, "sub_state_dim": Effect(3), "discretization": Effect("bilinear", {"reference": "paper"})}
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "models.lti.lru:LRU": (
        {"d_model": 4, "d_state": 4},
        {**SIZES, "r_min": Effect(0.5), "r_max": Effect(0.5), "max_phase": Effect(1.0)},
    ),
    "models.lti.s5:S5": (
        {"d_model": 4, "d_state": 4, "discretization": "zoh"},
        {**SIZES, "discretization": Effect("dirac"), "conj_sym": Effect(True)},
    ),
    "models.lti.s4d:S4D": (
        {"d_model": 4, "d_state": 4, "transposed": False},
        {**S4, "rank": Refused(1, {"init": "legt"}), "disc": Effect("bilinear")},
    ),
    "models.lti.s4:S4": ({"d_model": 4, "d_state": 4, "transposed": False}, {**S4, "rank": Effect(2)}),
    "models.lti.centaurus:Centaurus": (
        {"d_model": 4, "d_state": 4, "sub_state_dim": 2},
        {**NECK, "mode": Effect("pointwise")},
    ),
    "models.ltv.mamba:Mamba": (
        {"d_model": 4, "d_state": 3},
        {
            **SIZES, "d_conv": Effect(2), "expand": Effect(1), "dt_rank": Effect(2), **DT,
            "dt_init": Effect("constant"), "dt_scale": Effect(2.0), "dt_init_floor": Effect(0.09),
            "conv_bias": Effect(False), "bias": Effect(True),
            **LTV, "discretization": Effect("dirac"),
        },
    ),
    "models.ltv.s5:S5": (
        {"d_model": 4, "d_state": 4},
        {
            **SIZES, "discretization": Effect("dirac"), "conj_sym": Effect(True), **DT, "step_rescale": Effect(2.0),
            "use_fast_path": Hint(False), **PLACES,
        },
    ),
    "models.ltv.rglru:RGLRU": (
        {"d_model": 4},
        {
            "d_model": Effect(2), "d_conv": Effect(2), "expand": Effect(2), "c": Effect(4.0),
            "a_init_range": Effect((0.3, 0.5)), "conv_bias": Effect(False), "bias": Effect(True), **LTV,
        },
    ),
    "models.ltv.s7:S7": ({"d_model": 4, "d_state": 4}, {**SIZES, "J": Refused(3), **LTV}),
    "layers.mha:MHA": (
        {"embed_dim": 4, "num_heads": 2},
        {
            "embed_dim": Effect(2), "num_heads": Effect(1), "num_heads_kv": Effect(1), "head_dim": Effect(3),
            "mlp_dim": Effect(8), "qkv_proj_bias": Effect(False), "out_proj_bias": Effect(False),
            "softmax_scale": Effect(3.0), "causal": Effect(True), "layer_idx": Hint(2), "d_conv": Effect(2),
            "rotary_emb_dim": Effect(2), "rotary_emb_base": Effect(10.0, {"rotary_emb_dim": 4, "head_dim": 4}),
            "rotary_emb_interleaved": Effect(True, {"rotary_emb_dim": 4, "head_dim": 4}), **PLACES,
        },
    ),
    "layers.mlp:GatedMLP": (
        {"in_features": 4, "multiple_of": 4},
        {
            "in_features": Effect(2), "hidden_features": Effect(5), "out_features": Effect(3),
            "activation": Effect(jnp.tanh), "bias": Effect(True), "multiple_of": Effect(8), **PLACES,
        },
    ),
    "architectures.embedding:TokenEmbedding": (
        {"vocab_size": 9, "embedding_dim": 4, "dropout": 0.0},
        {
            "vocab_size": Effect(8), "embedding_dim": Effect(2), "padding_idx": Effect(0),
            "max_position_embeddings": Refused(7), "use_position": Refused(True), "dropout": Effect(0.5),
        },
    ),
    "architectures.language_model:LRNNLMHeadModel": (
        {"d_model": 4, "d_state": 4, "n_layer": 1, "vocab_size": 9, "mixer_types": ["LRU"]},
        {
            **SIZES, "n_layer": Refused(2), "vocab_size": Effect(19), "mixer_types": Effect(["Mamba"]),
            "d_intermediate": Effect(4), "mixer_kwargs": Effect({"LRU": {"r_min": 0.5}}),
            "mlp_cls": Effect(lambda dim, **_: nnx.Linear(dim, dim, rngs=nnx.Rngs(0)), {"d_intermediate": 4}),
            "norm_epsilon": Effect(0.1), "rms_norm": Effect(False), "fused_add_norm": Hint(False),
            "residual_in_fp32": Effect(True, {"n_layer": 2, "mixer_types": ["LRU", "LRU"], "dtype": jnp.bfloat16}),
            "tie_embeddings": Effect(False), "pad_vocab_size_multiple": Effect(5),
            "initializer_cfg": Effect({"initializer_range": 1.0}), **PLACES,
        },
    ),
    "architectures.classifier:Classifier": (
        {"input_dim": 4, "d_model": 4, "d_state": 4, "n_layers": 1, "dropout": 0.0},
        {
            **SIZES, "input_dim": Effect(3), "num_classes": Effect(3), "output_dim": Effect(2), "n_layers": Effect(2),
            "lrnn_cls": Effect(ltv.Mamba), "pooling": Effect("mean"), "dropout": Effect(0.5),
            "intermediate_pooling": Effect("mean", {"pooling": "mean"}),
            "pooling_factor": Effect(3, {"intermediate_pooling": "max", "pooling": "mean"}), "vocab_size": Effect(9),
            "embedding_dim": Effect(3, {"vocab_size": 9}), "padding_idx": Effect(1, {"vocab_size": 9}),
            "max_position_embeddings": Effect(9, {"vocab_size": 9, "reference": "paper"}),
            "lrnn_params": Effect({"r_min": 0.5}),
        },
    ),
    "architectures.lru_unet:LRUUnet": (
        {"channels": [2], "resample_factors": [2]},
        {
            "in_channels": Effect(2), "out_channels": Effect(2), "channels": Effect([3]),
            "resample_factors": Effect([1]), "pre_conv": Refused(True), "causal": Effect(False),
            "dtype": Effect(jnp.bfloat16),
        },
    ),
}  # fmt: skip
QUICK = ("models.lti.s4d:S4D", "models.ltv.mamba:Mamba", "architectures.language_model:LRNNLMHeadModel")
CASES = [
    pytest.param(
        cls, name, id=f"{cls.split(':')[0].split('.', 1)[1]}-{name}", marks=[] if cls in QUICK else [pytest.mark.full]
    )
    for cls, (_, effects) in TABLE.items()
    for name in effects
]


def build(cls, kwargs):
    module, name = cls.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceDefectWarning)
        return getattr(importlib.import_module(f"compat_torch.{module}"), name)(**kwargs, rngs=nnx.Rngs(0))


def parameters(module):
    state = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def outputs(cls, module, kwargs):
    """In training mode, on an input that the arguments ask for."""
    L, tokens = 7, "vocab_size" in kwargs
    width = kwargs.get("d_model", kwargs.get("embed_dim", kwargs.get("in_features", 4)))
    if cls.endswith("Classifier"):
        width = kwargs["input_dim"]
    shape = (2, kwargs.get("in_channels", 1), L) if cls.endswith("LRUUnet") else (2, L, width)
    x = jax.random.normal(jax.random.key(0), (2, width, L) if kwargs.get("transposed") else shape)
    if tokens:
        x = jnp.arange(2 * L).reshape(2, L) % 7
    extra = {"rngs": nnx.Rngs(dropout=1)} if kwargs.get("dropout") else {}
    y = module(x, **extra)
    y = y[0] if isinstance(y, tuple) else y
    return np.asarray(y)


def same(cls, kwargs, other):
    """Whether both arguments make the same module."""
    a, b = (build(cls, given) for given in (kwargs, other))
    p, q = parameters(a), parameters(b)
    if {n: (v.shape, v.dtype) for n, v in p.items()} != {n: (v.shape, v.dtype) for n, v in q.items()}:
        return False
    if not all(np.array_equal(p[name], q[name]) for name in p) or optim.groups(a) != optim.groups(b):
        return False
    y, z = outputs(cls, a, kwargs), outputs(cls, b, other)
    return y.shape == z.shape and y.dtype == z.dtype and np.array_equal(y, z)


@pytest.mark.parametrize("cls", TABLE)
def test_every_argument_of_the_reference_has_a_row(cls):
    assert TABLE[cls][1].keys() == {name for name, default in STORED[cls].items() if default != ANY}


@pytest.mark.parametrize(("cls", "name"), CASES)
def test_an_argument_has_an_effect_or_raises(cls, name):
    base, effects = TABLE[cls]
    effect = effects[name]
    kwargs = {**base, **effect.given}
    other = {**kwargs, name: effect.value}
    if isinstance(effect, Refused):
        with pytest.raises(ValueError, match=name):
            build(cls, other)
    else:
        assert same(cls, kwargs, other) == isinstance(effect, Hint)
