"""Pooling, flattening, population readout and spike counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spyx import nn


def noise(*shape):
    return np.random.default_rng().normal(size=shape).astype(np.float32)


def pooled(value, window, strides, padding):
    """Sums over windows, one index at a time, sizes given for each axis."""
    value = np.asarray(value, np.float64)
    if padding == "SAME":
        out = [-(-n // s) for n, s in zip(value.shape, strides, strict=True)]
        missing = [max((o - 1) * s + w - n, 0) for o, s, w, n in zip(out, strides, window, value.shape, strict=True)]
        value = np.pad(value, [(m // 2, m - m // 2) for m in missing])
    else:
        out = [(n - w) // s + 1 for n, w, s in zip(value.shape, window, strides, strict=True)]
    result = np.zeros(out)
    for index in itertools.product(*map(range, out)):
        cut = tuple(slice(i * s, i * s + w) for i, s, w in zip(index, strides, window, strict=True))
        result[index] = value[cut].sum()
    return result


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("window", "strides", "channel_axis", "full_window", "full_strides"),
    [
        (2, 2, -1, (1, 2, 2, 1), (1, 2, 2, 1)),
        ((2, 3), (1, 2), -1, (1, 2, 3, 1), (1, 1, 2, 1)),
        ((2, 3), 2, 1, (1, 1, 2, 3), (1, 1, 2, 2)),
        (2, 1, None, (1, 2, 2, 2), (1, 1, 1, 1)),
        ((2, 2, 3), (1, 2, 1), None, (1, 2, 2, 3), (1, 1, 2, 1)),
        ((2, 3, 1, 2), (1, 1, 1, 1), -1, (2, 3, 1, 2), (1, 1, 1, 1)),
        ((3,), 1, -1, (1, 1, 1, 3), (1, 1, 1, 1)),
        (2, 2, 0, (1, 2, 2, 2), (1, 2, 2, 2)),
    ],
)
def test_sum_pool_matches_the_loop(window, strides, channel_axis, full_window, full_strides, padding):
    value = noise(2, 5, 7, 3)
    found = nn.sum_pool(value, window, strides, padding, channel_axis)
    expected = pooled(value, full_window, full_strides, padding)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    layer = nn.SumPool(window, strides, padding, channel_axis)
    np.testing.assert_array_equal(layer(jnp.asarray(value)), found)


def test_sum_pool_dtypes_and_gradient():
    ones = np.ones((1, 4, 4, 1))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int32):
        found = nn.sum_pool(ones.astype(dtype), 2, 2, "VALID")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, 4)
    weight = noise(1, 2, 2, 1)
    gradient = jax.grad(lambda v: jnp.sum(nn.sum_pool(v, 2, 2, "VALID") * weight))(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient, np.kron(weight[0, ..., 0], np.ones((2, 2)))[None, :, :, None])


def test_sum_pool_errors():
    value = noise(2, 5, 7, 3)
    with pytest.raises(ValueError, match="padding must be 'SAME' or 'VALID', got 'same'"):
        nn.sum_pool(value, 2, 2, "same")
    with pytest.raises(ValueError, match=r"channel_axis 4 is not an axis of shape \(2, 5, 7, 3\)"):
        nn.sum_pool(value, 2, 2, "SAME", 4)
    with pytest.raises(ValueError, match="window_shape must be positive, at most 4"):
        nn.sum_pool(value, (1, 1, 1, 1, 1), 2, "SAME")
    with pytest.raises(ValueError, match="strides must be positive"):
        nn.sum_pool(value, 2, (0, 1), "SAME")


def test_flatten():
    x = jnp.asarray(noise(2, 3, 4, 5))
    np.testing.assert_array_equal(nn.Flatten()(x), np.asarray(x).reshape(2, 60))
    assert nn.Flatten()(x[:0]).shape == (0, 60)
    assert nn.Flatten()(x[:, 0, 0, 0]).shape == (2, 1)
    with pytest.raises(ValueError, match="got a scalar"):
        nn.Flatten()(jnp.float32(1))


def test_population_code():
    x = noise(2, 6)
    expected = [sum(x[row, start : start + 3]) for row in (0, 1) for start in (0, 3)]
    np.testing.assert_allclose(nn.PopulationCode(3)(x), expected, atol=1e-6)
    assert nn.PopulationCode(3)(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"4 does not divide the 6 entries of shape \(6,\)"):
        nn.PopulationCode(4)(x[0])
    with pytest.raises(ValueError, match="positive integer, got 0"):
        nn.PopulationCode(0)


def test_activity_is_counted_through_run():
    rngs = nnx.Rngs(0)
    model = nn.Sequential(nnx.Linear(4, 3, rngs=rngs), nn.LIF((3,), rngs=rngs), nn.ActivityRegularization((3,)))
    x = 3 * noise(13, 2, 4)
    spikes, state = nn.run(model, x)
    assert spikes.sum() > 0
    np.testing.assert_array_equal(state[2], spikes.sum(axis=0))
    gradient = nnx.grad(lambda m: jnp.sum(nn.run(m, x)[1][2]))(model)
    assert np.any(gradient["layers"][0]["kernel"][...] != 0)


def test_activity_dtype_shape_errors():
    layer = nn.ActivityRegularization(3, batch_size=7, dtype=jnp.int32)
    count = layer.initial_state(2)
    assert (count.shape, count.dtype) == ((2, 3), jnp.int32)
    spikes, count = layer(jnp.ones((2, 3)), count)
    assert (spikes.dtype, count.dtype, int(count.sum())) == (jnp.float32, jnp.int32, 6)
    with pytest.raises(ValueError, match=r"\[B, 3\]; got spikes \(2, 4\) and counts \(2, 3\)"):
        layer(jnp.ones((2, 4)), count)
    with pytest.raises(ValueError, match="hidden_shape must be a positive integer"):
        nn.ActivityRegularization(())
