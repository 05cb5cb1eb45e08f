"""A Mamba block quantised by qwix: projections and convolution are reached, streaming and masks still hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.ssm import CHUNK, H, close, close_trees, make, noise

qwix = pytest.importorskip("qwix")

# qwix 0.1.8 uses accessors that current flax deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:qwix\..*")


def quantised(provider, layer, path=".*"):
    rule = qwix.QuantizationRule(
        module_path=path, op_names=("dot_general", "conv_general_dilated"), weight_qtype="int8", act_qtype="int8"
    )
    return qwix.quantize_model(layer, provider([rule]), noise(6, 2, H))


@pytest.mark.parametrize("provider", [pytest.param("PtqProvider", marks=pytest.mark.full), "QtProvider"])
def test_the_convolution_is_quantised(provider):
    layer, u = make("MambaBlock"), noise(11, 2, H)
    everything = quantised(getattr(qwix, provider), layer)
    projections = quantised(getattr(qwix, provider), layer, ".*proj")
    convolution = quantised(getattr(qwix, provider), layer, "conv")
    exact = layer(u)
    errors = [float(jnp.abs(m(u) - exact).max()) for m in (everything, projections, convolution)]
    assert all(1e-4 < error < 0.3 for error in errors)
    assert np.abs(everything(u) - projections(u)).max() > 1e-4
    if provider == "PtqProvider":
        assert everything.conv.kernel.array.qvalue.dtype == jnp.int8


def test_streaming_and_masks_hold():
    model, u = quantised(qwix.PtqProvider, make("MambaBlock")), noise(7, 2, H)
    whole, last = model(u, return_state=True)
    lengths, reset = jnp.array([7, 4]), jnp.zeros((7, 2), bool).at[CHUNK, 0].set(True)
    mask = jnp.arange(7)[:, None, None] < lengths[:, None]
    y, state = model(jnp.where(mask, u, jnp.nan), lengths=lengths, reset=reset, return_state=True)
    close(y[:CHUNK, 0], whole[:CHUNK, 0])
    close(y[:4, 1], whole[:4, 1])
    np.testing.assert_array_equal(y[4:, 1], 0)
    fresh, after = model(u[CHUNK:], return_state=True)
    close(y[CHUNK:, 0], fresh[:, 0])
    close_trees(jax.tree.map(lambda v: v[0], state), jax.tree.map(lambda v: v[0], after))
    first, middle = model(u[:4], return_state=True)
    second, end = model(u[4:], middle, return_state=True)
    close(jnp.concatenate([first, second]), whole)
    close_trees(end, last)
    close_trees(jax.tree.map(lambda v: v[1], state), jax.tree.map(lambda v: v[1], middle))


def test_the_slow_way_computes_the_same():
    layer, u = make("MambaBlock"), noise(7, 2, H)
    nothing = quantised(qwix.PtqProvider, layer, "absent")
    assert hasattr(nothing.conv, "qwix_path")
    close(nothing(u), layer(u))
    y_t, state = layer.step(u[0], layer.initial_state(2))
    slow, slow_state = nothing.step(u[0], nothing.initial_state(2))
    close(slow, y_t)
    close_trees(slow_state, state)
