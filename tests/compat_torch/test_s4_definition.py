"""S4 and S4D against their definition in NumPy float64, for configurations nobody listed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import s4 as oracle
from programs import forget_when_many

from compat_torch.models.lti import S4, S4D

UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # every attempt compiles anew
QUICK = settings(
    max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=UNSHRUNK
)
WIDE = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
TRANSFORMS = ("none", "exp", "relu", "softplus")


@st.composite
def configurations(draw, cls):
    H = draw(st.sampled_from([1, 2, 4]))
    bottleneck = draw(st.sampled_from([None, 1, 2]))
    init = draw(st.sampled_from(["legs", "legt", "diag-lin", "diag-inv", "diag-real", "diag-rand", "dplr-lin"]))
    kwargs = {
        "d_model": H * (bottleneck or 1),
        "bottleneck": bottleneck,
        "gate": draw(st.sampled_from([None, 1, 2])),
        "channels": draw(st.sampled_from([1, 2, 3])),
        "d_state": draw(st.sampled_from([2, 3, 4, 8])),
        "final_act": draw(st.sampled_from([None, "glu", "gelu"])),
        "transposed": draw(st.booleans()),
        "l_max": draw(st.sampled_from([None, 1, 3, 8])),
        "dt_tie": draw(st.booleans()),
        "dt_transform": draw(st.sampled_from([*TRANSFORMS, "sigmoid"])),
        "dt_fast": draw(st.booleans()),
        "real_transform": draw(st.sampled_from(TRANSFORMS)),
        "imag_transform": draw(st.sampled_from(TRANSFORMS)),
        "is_real": draw(st.booleans()),
        "n_ssm": draw(st.sampled_from([None, 1])),
        "rank": 2 if init == "legt" else draw(st.sampled_from([1, 2, 3])),
        "init": init,
        "swap_channels": draw(st.booleans()),
        "reference": draw(st.sampled_from(["lrnnx", "paper"])),
    }
    if cls is S4D:
        kwargs["disc"] = draw(st.sampled_from(["zoh", "bilinear"]))
    return kwargs


def glu(x):
    a, b = np.split(x, 2, -1)
    return a / (1 + np.exp(-b))


def check_definition(cls, kwargs, L, seed):
    forget_when_many()
    with jax.enable_x64(True):
        layer = cls(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        x = jax.random.normal(jax.random.key(seed + 1), (2, L, layer.d_model), jnp.float64)
        to_layer = (lambda v: jnp.swapaxes(v, 1, 2)) if layer.transposed else (lambda v: v)
        activation = glu if layer.reference == "paper" and layer.final_act == "glu" else oracle.gelu
        limit = {"atol": 1e-9, "rtol": 1e-7}

        y, state = layer(to_layer(x))
        expected = oracle.forward(layer, np.asarray(x), activation=activation)
        assert state is None
        assert y.shape == to_layer(expected).shape
        assert layer.d_output == expected.shape[-1]
        np.testing.assert_allclose(to_layer(y), expected, **limit)

        whole = oracle.forward(layer, np.asarray(x), truncate=False, activation=activation)
        cut = seed % (L + 1)
        before = layer.allocate_inference_cache(2)
        first, cache = layer(to_layer(x[:, :cut]), inference_cache=before)
        second, cache = layer(to_layer(x[:, cut:]), inference_cache=cache)
        np.testing.assert_allclose(np.concatenate([to_layer(first), to_layer(second)], 1), whole, **limit)

        lengths = jnp.array([L // 2, L])
        valid = (jnp.arange(L) < lengths[:, None])[..., None]
        padded, masked = layer(to_layer(jnp.where(valid, x, jnp.nan)), lengths, inference_cache=before)
        np.testing.assert_allclose(to_layer(padded), np.where(valid, whole, 0), **limit)
        np.testing.assert_allclose(masked["lrnn_state"][1], cache["lrnn_state"][1], **limit)
        _, half = layer(to_layer(x[:, : L // 2]), inference_cache=before)
        np.testing.assert_allclose(masked["lrnn_state"][0], half["lrnn_state"][0], **limit)

        swap = layer.swap_channels and layer.reference == "paper"
        stepped = oracle.forward(layer, np.asarray(x), truncate=False, swap=swap, activation=activation)
        cache = before
        for t in range(min(L, 4)):
            y_t, cache = layer.step(x[:, t], cache)
            np.testing.assert_allclose(y_t, stepped[:, t], **limit)
        assert all(not np.any(value) for name, value in before.items() if name == "lrnn_state")


LENGTHS = st.sampled_from([1, 2, 5, 8])


@pytest.mark.parametrize("cls", [S4D, S4])
def test_definition(cls):
    @QUICK
    @given(configurations(cls), LENGTHS, st.integers(0, 99))
    def run(kwargs, L, seed):
        check_definition(cls, kwargs, L, seed)

    run()


@pytest.mark.full
@pytest.mark.parametrize("cls", [S4D, S4])
def test_definition_wide(cls):
    @WIDE
    @given(configurations(cls), LENGTHS, st.integers(0, 99))
    def run(kwargs, L, seed):
        check_definition(cls, kwargs, L, seed)

    run()
