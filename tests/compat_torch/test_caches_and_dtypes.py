"""Caches and dtypes that do not fit are refused by every layer and model in the same words."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compat_torch.architectures.mamba2_lm import Mamba2LMHeadModel
from compat_torch.architectures.mamba_lm import MambaLMHeadModel
from compat_torch.architectures.original import S4Model
from compat_torch.models import lti, ltv, original

LAYERS = {
    "LRU": lambda **kwargs: lti.LRU(4, 3, **kwargs),
    "S5": lambda **kwargs: lti.S5(4, 3, "zoh", **kwargs),
    "S4D": lambda **kwargs: lti.S4D(4, d_state=4, transposed=False, **kwargs),
    "CentaurusNeck": lambda **kwargs: lti.Centaurus(4, 3, 2, **kwargs),
    "Mamba": lambda **kwargs: ltv.Mamba(4, 3, **kwargs),
    "S7": lambda **kwargs: ltv.S7(4, 3, **kwargs),
}


@pytest.mark.parametrize("name", LAYERS)
def test_leaves_of_a_cache_that_do_not_fit(name):
    layer = LAYERS[name](rngs=nnx.Rngs(0))
    cache, x = layer.allocate_inference_cache(2), jnp.ones((2, 1, 4))
    one = x if isinstance(layer, ltv.Mamba | ltv.S7) else x[:, 0]
    for leaf, value in cache.items():
        for wrong in (None, np.zeros((1,)), value[:1]):
            with pytest.raises(ValueError, match=rf"{name}: {leaf} must have shape .* got .*; make one"):
                layer.step(one, {**cache, leaf: wrong})
            with pytest.raises(ValueError, match=rf"{name}: {leaf} must have shape .* got .*; make one"):
                layer(x, inference_cache={**cache, leaf: wrong})
        other = jnp.float32 if leaf == "seqlen_offset" else jnp.int32
        with pytest.raises(TypeError, match=rf"{name}: {leaf} must be .*, got (int|float)32"):
            layer.step(one, {**cache, leaf: np.zeros(value.shape, other)})
    y, _ = layer.step(one, cache)
    np.testing.assert_allclose(y.reshape(2, 4), jnp.reshape(_output(layer(x)), (2, 4)), atol=2e-6)


def _output(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("batch_size", [-1, 0, 1.5, True])
def test_states_of_so_many_rows(batch_size):
    layers = [original.S5(4, 4), original.S4D(4, 4), original.S4Block(4, d_state=4), lti.S4D(4, d_state=4)]
    for layer in layers:
        with pytest.raises(ValueError, match="batch_size must be a positive integer"):
            layer.allocate_inference_cache(batch_size)
        state = layer.initial_state if isinstance(layer, original.S5) else layer.default_state
        with pytest.raises(ValueError, match="batch_size must be a positive integer"):
            state(batch_size)


MODELS = {
    **LAYERS,
    "S4Model": lambda **kwargs: S4Model(3, d_model=4, n_layers=1, **kwargs),
    "MambaLMHeadModel": lambda **kwargs: MambaLMHeadModel(MambaLMHeadModel.config_class(), **kwargs),
    "Mamba2LMHeadModel": lambda **kwargs: Mamba2LMHeadModel(Mamba2LMHeadModel.config_class(), **kwargs),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [jnp.int32, "int8", jnp.complex64, bool, "float31"])
def test_dtypes_that_are_not_real_floating_point(name, dtype):
    for argument in ("dtype", "param_dtype"):
        with pytest.raises(TypeError, match=f"{name}: {argument} must be a real floating point dtype, such as"):
            MODELS[name](**{argument: dtype})
