"""The live cases of whole models: what they cover, and that our side takes what they feed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from compat_torch.architectures.language_model import LRNNLMHeadModel
from parity.case import GOLDEN, read_case
from parity.compare import check
from parity.live_models import CLASSIFIER, LANGUAGE_MODEL, UNET, models
from parity.subjects import subjects_of

MODELS = models()


def kwargs_of(cls):
    return [model.kwargs for model in MODELS if model.cls == cls]


def test_names_are_unique_and_have_an_answer():
    assert len({model.name for model in MODELS}) == len(MODELS)
    assert all(subjects_of(model.cls) for model in MODELS)
    assert {model.cls for model in MODELS} == {LANGUAGE_MODEL, CLASSIFIER, UNET}


def test_language_models_cover_mixers_ties_norms_prompts_and_lengths():
    language = [model for model in MODELS if model.cls == LANGUAGE_MODEL]
    mixers = {mixer for model in language for mixer in model.kwargs["mixer_types"]}
    assert mixers == {"attn", "Centaurus", "LRU", "Mamba", "RGLRU", "S4", "S4D", "S5", "S7"}
    for name, default in (("tie_embeddings", True), ("rms_norm", True), ("residual_in_fp32", False)):
        assert {model.kwargs.get(name, default) for model in language} == {True, False}
    assert {bool(model.kwargs.get("d_intermediate")) for model in language} == {True, False}
    for name in ("event", "lengths", "prompt"):
        assert {bool(getattr(model, name)) for model in language} == {True, False}


def test_classifiers_cover_every_pooling_and_the_layers_that_the_reference_can_hold():
    found = kwargs_of(CLASSIFIER)
    assert {kwargs.get("pooling", "last") for kwargs in found} == {"last", "mean", "max"}
    windows = [kwargs.get("intermediate_pooling", "none") for kwargs in found]
    assert {kind for each in windows for kind in ([each] if isinstance(each, str) else each)} == {
        "none", "stride", "mean", "max",
    }  # fmt: skip
    layers = [kwargs["lrnn_cls"] for kwargs in found]
    names = {pair[0] for each in layers for pair in ([each] if isinstance(each[0], str) else each)}
    assert {name.split(".")[-1] for name in names} == {
        "lru:LRU", "s5:S5", "centaurus:CentaurusNeck", "mamba:Mamba", "rglru:RGLRU", "s7:S7",
    }  # fmt: skip
    assert {name.split(".")[2] for name in names if name.endswith("S5")} == {"lti", "ltv"}


def test_unets_double_their_channels_as_the_reference_does():
    for kwargs in kwargs_of(UNET):
        width = kwargs.get("in_channels", 1)
        for channels in kwargs["channels"]:
            assert channels == 2 * width
            width = channels


@pytest.mark.parametrize("prompt", [0, 9])
def test_a_prompt_goes_before_the_steps(prompt, monkeypatch):
    case = read_case(GOLDEN / "lrnnx_lm_lru_mamba_s5")
    case = dataclasses.replace(case, kwargs={**case.kwargs, "prompt": prompt})
    seen, (subject,) = [], subjects_of(case.cls)
    prefill = LRNNLMHeadModel.prefill

    def watched(self, input_ids, **kwargs):
        seen.append(input_ids.shape[1])
        return prefill(self, input_ids, **kwargs)

    monkeypatch.setattr(LRNNLMHeadModel, "prefill", watched)
    (run, *_) = case.runs
    params = {name: jnp.asarray(value) for name, value in case.weights.items()}
    logits = subject.steps(case.kwargs, params, jnp.asarray(run.x[:, :11]))
    assert seen == [prompt]
    assert run.step is not None
    np.testing.assert_allclose(logits, run.step[:, :11], atol=3e-5)


def test_steps_with_timesteps_are_compared():
    """A step that drops its integration_timesteps is seen."""
    case = read_case(GOLDEN / "lrnnx_lm_mamba_s7_mlp")
    (run, *_) = case.runs
    (subject,) = subjects_of(case.cls)
    run = dataclasses.replace(run, x=run.x[:1, :5])
    inputs = {"integration_timesteps": np.full(run.x.shape, 0.5, np.float32)}
    params = {name: jnp.asarray(value) for name, value in case.weights.items()}
    y = np.asarray(subject.forward(case.kwargs, params, jnp.asarray(run.x), **inputs))
    event = dataclasses.replace(run, y=y, y64=y.astype(np.float64), w=None, grads={}, step=y, inputs=inputs)
    assert check(dataclasses.replace(case, runs=(event,)), subject).verdict == "identical"
    without = dataclasses.replace(event, inputs={})
    assert "step" in check(dataclasses.replace(case, runs=(without,)), subject).note
