"""from_torch on every class that it knows: modules with the class paths, names and attributes of the other projects.

The weights are those of stored reference cases, whose outputs must come out; for mamba_ssm, transformers' modules give
weights and outputs. The installed projects themselves: `python -m parity.live_from_torch`.
"""

import dataclasses
import fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles.torch_modules import ACTIVATIONS, with_tensors
from oracles.transformers_models import outputs_of, reference, state_spaces_name, weights_of

from compat_torch import from_torch
from compat_torch.core.discretization import DISCRETIZE_FNS
from compat_torch.core.variables import Buffer
from compat_torch.errors import CheckpointError
from compat_torch.nn.convert import KNOWN
from parity.case import GOLDEN, case_class, read_case
from parity.compare import Scores, check_forward

pytestmark = pytest.mark.filterwarnings("ignore::compat_torch.errors.ReferenceDefectWarning")


def dropout(rate):
    return torch.nn.Dropout(rate) if rate else torch.nn.Identity()


def s4_block(kwargs):
    """What state-spaces/s4's S4Block, its FFTConv and its kernels keep."""
    root = {"transposed": True, "gate": None, "bottleneck": None}
    conv = {"l_max": None, "bidirectional": False, "swap_channels": False}
    kernel = {
        "disc": "zoh", "dt_fast": False, "dt_transform": "exp", "real_transform": "exp", "imag_transform": "none",
        "bandlimit": None,
    }  # fmt: skip
    final = kwargs.get("final_act", "glu")
    return {
        **{name: kwargs.get(name, default) for name, default in root.items()},
        **{f"layer.{name}": kwargs.get(name, default) for name, default in conv.items()},
        **{f"layer.kernel.{name}": kwargs.get(name, default) for name, default in kernel.items()},
        "layer.transposed": False,
        "layer.activation": ACTIVATIONS[kwargs.get("activation", "gelu")](),
        "layer.drop_kernel": torch.nn.Identity(),
        "mult_activation": ACTIVATIONS[kwargs.get("mult_act")](),
        "drop": dropout(kwargs.get("dropout", 0)),
        **({} if final is None else {"output_linear.1": ACTIVATIONS[final]()}),
    }


def sequence_block(kwargs):
    """The S4Block of the repository's package `src`: an activation of its own, after that of the convolution."""
    found = s4_block({**kwargs, "mult_act": None})
    return {**found, "activation": ACTIVATIONS[kwargs.get("mult_act")]()}


def s4d(kwargs):
    return {"transposed": kwargs.get("transposed", True), "dropout": dropout(kwargs.get("dropout", 0))}


def s5_pytorch(prefix):
    defaults = {"liquid": False, "degree": 1}
    return lambda kwargs: {f"{prefix}.{name}": kwargs.get(name, value) for name, value in defaults.items()}


def lrnnx(**defaults):
    return lambda kwargs: {**defaults, **kwargs}


def lrnnx_s4(kwargs):
    defaults = {
        "transposed": True, "l_max": None, "dt_transform": "exp", "dt_fast": False, "real_transform": "exp",
        "imag_transform": "none", "disc": "zoh",
    }  # fmt: skip
    found = {name: kwargs.get(name, default) for name, default in defaults.items()}
    found |= {"layer.swap_channels": kwargs.get("swap_channels", False), "drop": torch.nn.Identity()}
    return {**found, "layer.kernel.P": None} if "disc" in kwargs else found  # lrnnx's S4D has it, and it is None


def lti_s5(kwargs):
    return {"discretize_fn": DISCRETIZE_FNS[kwargs["discretization"]], "conj_sym": kwargs.get("conj_sym", False)}


def language_model(kwargs):
    defaults = {"norm_epsilon": 1e-5, "residual_in_fp32": False, "pad_vocab_size_multiple": 8}
    return {
        **{name: kwargs.get(name, default) for name, default in defaults.items()},
        **{name: kwargs[name] for name in ("d_state", "vocab_size", "mixer_types")},
        "backbone.layers.1.mixer.discretization": "mamba",
        "backbone.layers.2.mixer.discretize_fn": DISCRETIZE_FNS["zoh"],
        "backbone.layers.2.mixer.conj_sym": False,
    }


def classifier(kwargs):
    found = {"pooling": kwargs["pooling"]}
    for block in ("blocks.0", "final_block"):
        found |= {
            f"{block}.intermediate_pooling": "none",
            f"{block}.pooling_factor": 2,
            f"{block}.dropout": torch.nn.Dropout(0.1),
        }
    return found


# Class path, what is kept, stored cases: the first is for every run, the others are the wide matrix.
CASES = {
    "models.s4.s4:S4Block": (
        s4_block,
        ["s4repo_block_diag_act", "s4repo_block_dplr_default", "s4repo_block_diag_bidir", "s4repo_block_*"],
    ),
    "src.models.s4.s4:S4Block": (s4_block, ["s4repo_block_dplr_finalnone_bneck1"]),
    "src.models.sequence.modules.s4block:S4Block": (sequence_block, ["s4repo_block_diag_act", "s4repo_block_dplr_act"]),
    "models.s4.s4d:S4D": (s4d, ["s4repo_s4d_nt", "s4repo_s4d_*"]),
    "s5.s5_model:S5": (s5_pytorch("seq"), ["s5pytorch_liquid", "s5pytorch_degree2", "s5pytorch_*"]),
    "s5.s5_model:S5Block": (s5_pytorch("s5.seq"), ["s5pytorch_block"]),
    "lrnnx.models.lti.s5:S5": (lti_s5, ["lrnnx_s5lti_dirac_a", "lrnnx_s5lti_*"]),
    "lrnnx.models.lti.lru:LRU": (lrnnx(), ["lrnnx_lru_a"]),
    "lrnnx.models.lti.s4:S4": (lrnnx_s4, ["lrnnx_s4_ch2"]),
    "lrnnx.models.lti.s4d:S4D": (lrnnx_s4, ["lrnnx_s4d_swap_channels", "lrnnx_s4d_bilinear_t", "lrnnx_s4d_bilinear_*"]),
    "lrnnx.models.lti.centaurus:CentaurusNeck": (lrnnx(discretization="zoh"), ["lrnnx_centaurus_neck_a"]),
    "lrnnx.models.lti.centaurus:CentaurusPWNeck": (lrnnx(discretization="zoh"), ["lrnnx_centaurus_pointwise_a"]),
    "lrnnx.models.lti.centaurus:CentaurusDWS": (lrnnx(discretization="zoh"), ["lrnnx_centaurus_dws_a"]),
    "lrnnx.models.lti.centaurus:CentaurusFull": (lrnnx(discretization="zoh"), ["lrnnx_centaurus_full_a"]),
    "lrnnx.models.ltv.mamba:Mamba": (lrnnx(discretization="mamba"), ["lrnnx_mamba_zoh_b", "lrnnx_mamba_*"]),
    "lrnnx.models.ltv.s5:S5": (lrnnx(conj_sym=False, step_rescale=1.0), ["lrnnx_s5ltv_bilinear_conj", "lrnnx_s5ltv_*"]),
    "lrnnx.models.ltv.rglru:RGLRU": (lrnnx(c=8.0), ["lrnnx_rglru_b"]),
    "lrnnx.models.ltv.s7:S7": (lrnnx(), ["lrnnx_s7_a"]),
    "lrnnx.architectures.language_model:LRNNLMHeadModel": (language_model, ["lrnnx_lm_lru_mamba_s5"]),
    "lrnnx.architectures.classifier:Classifier": (classifier, ["lrnnx_clf_lru_last"]),
}
CLASSES = {
    "lrnnx_lm_lru_mamba_s5": {
        "backbone.layers.0.mixer": "lrnnx.models.lti.lru:LRU",
        "backbone.layers.1.mixer": "lrnnx.models.ltv.mamba:Mamba",
        "backbone.layers.2.mixer": "lrnnx.models.lti.s5:S5",
    },
    "lrnnx_clf_lru_last": dict.fromkeys(("blocks.0.lrnn", "final_block.lrnn"), "lrnnx.models.lti.lru:LRU"),
}
LIVE = {  # tested with the library itself in test_nn_convert.py
    f"transformers.models.{name}.modeling_{name}:{cls}ForCausalLM"
    for name, cls in (
        ("mamba", "Mamba"),
        ("mamba2", "Mamba2"),
        ("falcon_mamba", "FalconMamba"),
        ("recurrent_gemma", "RecurrentGemma"),
    )
}
MAMBA_LAYER = "mamba_ssm.modules.mamba_simple:Mamba"
MAMBA_MODEL = "mamba_ssm.models.mixer_seq_simple:MambaLMHeadModel"


def chosen():
    """A parameter for each class path and stored case of it."""
    found = []
    for path, (_, patterns) in CASES.items():
        for pattern in patterns:
            wide = "*" in pattern
            names = sorted(folder.name for folder in GOLDEN.glob(pattern)) if wide else [pattern]
            for name in names:
                if not wide or (name not in patterns and case_class(GOLDEN / name) == path):
                    marks = pytest.mark.full if wide else ()
                    found.append(pytest.param(path, name, marks=marks, id=f"{path}-{name}"))
    return found


@pytest.mark.parametrize(("path", "name"), chosen())
def test_stored_outputs_come_out(path, name):
    case = read_case(GOLDEN / name)
    kwargs = {key: value for key, value in case.kwargs.items() if key != "step_mode"}
    live = with_tensors(path, case.weights, CASES[path][0](kwargs), classes=CLASSES.get(name))
    module = from_torch(live.eval())
    run, scores = case.runs[0], Scores()
    x = run.x if run.visible is None else run.x * run.visible.astype(run.x.dtype)
    x = x.astype(np.int32) if x.dtype == np.int64 else x
    result = nnx.jit(lambda module, x, inputs: module(x, **inputs))(module, x, run.inputs)
    y = result[0] if isinstance(result, tuple) else result
    check_forward(np.asarray(y, np.float64), run, "float32", scores)
    assert not scores.notes


def test_every_class_that_is_known_is_tested():
    tested = {*CASES, *LIVE, MAMBA_LAYER, MAMBA_MODEL}
    assert not [pattern for pattern in KNOWN if not fnmatch.filter(tested, pattern)]
    assert not [path for path in tested if not any(fnmatch.fnmatchcase(path, pattern) for pattern in KNOWN)]


SMALL = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3}


@dataclasses.dataclass
class MambaConfig:
    """As mamba_ssm's: the same fields, the same defaults."""

    d_model: int = 8
    d_intermediate: int = 0
    n_layer: int = 2
    vocab_size: int = 16
    ssm_cfg: dict = dataclasses.field(default_factory=dict)
    attn_layer_idx: list = dataclasses.field(default_factory=list)
    attn_cfg: dict = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def test_a_layer_of_mamba_ssm():
    theirs = reference("Mamba", time_step_rank=2, **SMALL).backbone.layers[1].mixer
    module = from_torch(with_tensors(MAMBA_LAYER, weights_of(theirs)).eval())
    x = torch.randn(2, 11, 8)
    with torch.no_grad():
        expected = theirs(x).numpy()
    np.testing.assert_allclose(module(jnp.asarray(x.numpy())), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("architecture", "options", "ssm"),
    [
        ("Mamba", {"time_step_rank": 2}, {"d_state": 4, "d_conv": 3, "dt_rank": 2}),
        (
            "Mamba2",
            {"num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4, "tie_word_embeddings": True},
            {"layer": "Mamba2", "d_state": 4, "d_conv": 3, "headdim": 4, "ngroups": 2, "chunk_size": 4},
        ),
    ],
)
def test_a_model_of_mamba_ssm(architecture, options, ssm):
    theirs = reference(architecture, **SMALL, **options)
    live = with_tensors(MAMBA_MODEL, weights_of(theirs, state_spaces_name), {"config": MambaConfig(ssm_cfg=ssm)})
    module = from_torch(live.eval())
    ids = np.random.default_rng().integers(0, 16, (2, 7))
    expected, _ = outputs_of(theirs, ids)
    logits = nnx.jit(lambda module, ids: module(ids).logits)(module, jnp.asarray(ids))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [1]}, "attention layers is not supported"),
        ({"rms_norm": False}, "LayerNorm is not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
    ],
)
def test_models_of_mamba_ssm_that_are_not_supported(change, message):
    theirs = reference("Mamba", time_step_rank=1, **SMALL)
    live = with_tensors(MAMBA_MODEL, weights_of(theirs, state_spaces_name), {"config": MambaConfig(**change)})
    with pytest.raises(CheckpointError, match=message):
        from_torch(live)


def test_dropout_rates_are_read_off():
    case = read_case(GOLDEN / "s4repo_s4d_nt")
    live = with_tensors("models.s4.s4d:S4D", case.weights, s4d({"dropout": 0.25, "transposed": False}))
    assert from_torch(live).drop.rate == 0.25
    assert from_torch(live, dropout=0.5).drop.rate == 0.5
    case = read_case(GOLDEN / "s4repo_block_dplr_default")
    tied = type("DropoutNd", (torch.nn.Dropout,), {})
    kept = {**s4_block(case.kwargs), "drop": tied(0.25), "layer.drop_kernel": torch.nn.Dropout(0.125)}
    block = from_torch(with_tensors("models.s4.s4:S4Block", case.weights, kept))
    assert (block.drop.rate, block.drop_kernel.rate) == (0.25, 0.125)
    assert (
        block.drop.broadcast_dims
        != from_torch(
            with_tensors("models.s4.s4:S4Block", case.weights, {**kept, "drop": torch.nn.Dropout(0.25)})
        ).drop.broadcast_dims
    )
    case = read_case(GOLDEN / "s5pytorch_block")
    kept = {**s5_pytorch("s5.seq")(case.kwargs), "attn_dropout": torch.nn.Dropout(0.25), "ff_dropout": dropout(0)}
    block = from_torch(with_tensors("s5.s5_model:S5Block", case.weights, kept))
    assert (block.attn_dropout.rate, block.ff_dropout.rate) == (0.25, 0.0)


def test_buffers_and_rates_of_single_tensors_are_kept():
    case = read_case(GOLDEN / "s4repo_s4d_lr0_buffers")
    frozen = ("kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")
    live = with_tensors("models.s4.s4d:S4D", case.weights, s4d(case.kwargs), buffers=frozen)
    live.kernel.C._optim = {"lr": 0.001, "weight_decay": 0.0}
    module = from_torch(live.eval())
    assert all(isinstance(getattr(module.kernel, name.split(".")[1]), Buffer) for name in frozen)
    assert isinstance(module.D, nnx.Param)
    assert dict(module.kernel.C.get_metadata()["optim"]) == {"lr": 0.001, "weight_decay": 0.0}
    assert list(module.state_dict()) == list(from_torch(live, lr=0.0).state_dict())
    np.testing.assert_array_equal(module.kernel.log_dt[...], case.weights["kernel.log_dt"])
    case = read_case(GOLDEN / "lrnnx_s4d_swap_channels")
    names = ("inv_dt", "layer.kernel.inv_dt")
    module = from_torch(with_tensors("lrnnx.models.lti.s4d:S4D", case.weights, lrnnx_s4(case.kwargs), buffers=names))
    assert isinstance(module.inv_dt, Buffer)
    assert module.layer.kernel.inv_dt is module.inv_dt


def test_two_activations_that_ours_has_not():
    case = read_case(GOLDEN / "s4repo_block_diag_act")
    kept = {**sequence_block(case.kwargs), "mult_activation": torch.nn.Tanh()}
    with pytest.raises(ValueError, match=r"activation.*mult_activation.*one after the other"):
        from_torch(with_tensors("src.models.sequence.modules.s4block:S4Block", case.weights, kept))
    kept = {**s4_block(case.kwargs), "layer.activation": torch.nn.Hardswish()}
    with pytest.raises(ValueError, match=r"does not keep activation"):
        from_torch(with_tensors("models.s4.s4:S4Block", case.weights, kept))
