"""S4 and S4D with bfloat16 parameters and inputs: whole, pieces and steps, within the roundings that they make.

The system and the activations after it compute in float32; values are rounded where they enter and leave a projection,
and in the activation of one. The bound of an output is those roundings, carried through the layer in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import s4 as oracle

from compat_torch import decode
from compat_torch.models.lti import S4, S4D

ROUNDING = 1.02 * 2.0**-8
"""The largest relative error of a rounding to bfloat16, and a little for the float32 arithmetic in between."""
SLOPE = 1.13
"""The largest slope of GELU."""
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
QUICK = settings(max_examples=2, deadline=None, derandomize=True, phases=UNSHRUNK)
WIDE = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)


@st.composite
def configurations(draw, cls):
    kwargs = {
        "d_model": draw(st.sampled_from([1, 3, 4])),
        "gate": draw(st.sampled_from([None, 1, 2])),
        "channels": draw(st.sampled_from([1, 2])),
        "d_state": draw(st.sampled_from([2, 4, 8])),
        "final_act": draw(st.sampled_from([None, "glu"])),
        "transposed": draw(st.booleans()),
        "l_max": draw(st.sampled_from([None, 3, 16])),
        "dt_tie": draw(st.booleans()),
        "is_real": draw(st.booleans()),
        "init": draw(st.sampled_from(["legs", "diag-lin", "diag-real", "diag-rand"])),
    }
    if cls is S4D:
        kwargs["disc"] = draw(st.sampled_from(["zoh", "bilinear"]))
    return kwargs


def dense(p, name, value, error):
    """A projection, which rounds its product and its sum."""
    weight, out = np.abs(p[f"{name}.weight"]), oracle._dense(p, name, value)
    return out, error @ weight.T + ROUNDING * (np.abs(value) @ weight.T + 2 * np.abs(out))


def activated(value, error):
    """GELU in bfloat16, x erfc(-x / sqrt 2) / 2, rounds the argument (0.6 at most in the result) and three factors."""
    out = oracle.gelu(value)
    return out, SLOPE * error + ROUNDING * (3 * np.abs(out) + 0.6)


def rounded(value, error):
    return value, error + ROUNDING * np.abs(value)


def expected(layer, x, truncate):
    """Outputs (B, L, W) of the definition, and how far bfloat16 may be from them."""
    p, (B, L, _) = oracle.parameters(layer), x.shape
    cut = layer.l_max if truncate else None
    y = oracle.respond(oracle.systems(layer), x, cut) + x[:, :, None] * p["D"]
    y = oracle.gelu(y.reshape(B, L, -1))
    error = 0 * y
    if layer.gate is not None:
        v = activated(*dense(p, "input_gate.0", x, 0 * x))
        if layer.gate != layer.channels:
            y, error = dense(p, "output_gate", *rounded(y, error))
        y, error = y * v[0], np.abs(y) * v[1] + np.abs(v[0]) * error + error * v[1]
    y, error = rounded(oracle.gelu(y), SLOPE * error)
    if layer.final_act is not None:
        y, error = activated(*dense(p, "output_linear.0", y, error))
    return y, error


def within(actual, wanted, error):
    assert actual.dtype == jnp.bfloat16
    excess = np.abs(np.asarray(actual, np.float64) - wanted) - error
    assert excess.max(initial=0) <= 0, f"{excess.max()} more than the roundings"


def check(cls, kwargs, L, seed):
    layer = cls(**kwargs, dtype=jnp.bfloat16, rngs=nnx.Rngs(seed))
    x = jax.random.normal(jax.random.key(seed), (2, L, layer.d_model), jnp.bfloat16)
    to_layer = (lambda v: jnp.swapaxes(v, 1, 2)) if layer.transposed else (lambda v: v)
    exact = np.asarray(x, np.float64)
    within(to_layer(layer(to_layer(x))[0]), *expected(layer, exact, True))

    whole, error = expected(layer, exact, False)
    cut, start = seed % (L + 1), layer.allocate_inference_cache(2)
    first, cache = layer(to_layer(x[:, :cut]), inference_cache=start)
    second, cache = layer(to_layer(x[:, cut:]), inference_cache=cache)
    within(jnp.concatenate([to_layer(first), to_layer(second)], 1), whole, error)
    by_steps, after = decode(layer, to_layer(x), start)
    within(to_layer(by_steps), whole, error)
    assert cache["lrnn_state"].dtype in (jnp.float32, jnp.complex64)
    np.testing.assert_allclose(
        after["lrnn_state"], cache["lrnn_state"], atol=1e-5 * max(1.0, np.abs(cache["lrnn_state"]).max(initial=0))
    )
    lengths = jnp.array([L // 2, L])
    valid = (jnp.arange(L) < lengths[:, None])[..., None]
    masked = layer(to_layer(jnp.where(valid, x, jnp.nan)), lengths, inference_cache=start)[0]
    within(to_layer(masked), np.where(valid, whole, 0), np.where(valid, error, 0))


LENGTHS = st.sampled_from([1, 2, 5, 17])


@pytest.mark.parametrize("cls", [S4D, S4])
def test_bfloat16_matrix(cls):
    @QUICK
    @given(configurations(cls), LENGTHS, st.integers(0, 99))
    def run(kwargs, L, seed):
        check(cls, kwargs, L, seed)

    run()


@pytest.mark.full
@pytest.mark.parametrize("cls", [S4D, S4])
def test_bfloat16_matrix_wide(cls):
    @WIDE
    @given(configurations(cls), LENGTHS, st.integers(0, 99))
    def run(kwargs, L, seed):
        check(cls, kwargs, L, seed)

    run()


@pytest.mark.parametrize("cls", [S4D, S4])
def test_the_bound_is_not_loose(cls):
    """It is some hundredths of the outputs, and a parameter that is off by more than that breaks it."""
    layer = cls(4, d_state=8, transposed=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 17, 4), jnp.bfloat16)
    y, error = expected(layer, np.asarray(x, np.float64), False)
    assert error.max() < 0.06 * np.abs(y).max()
    layer.D.set_value(layer.D[...] * 1.1)
    with pytest.raises(AssertionError, match="more than the roundings"):
        within(layer(x)[0], y, error)
