"""Causal convolutions against float64 loops, and what padding, resets and other rows must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracles.convolution import depthwise, long_convolution

from spyx.ops.convolution import _fast_length, causal_conv1d, causal_conv1d_update, fft_conv

CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def arrays(rng, *shapes, dtype=np.float32):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def conv_case(seed, T, B, D, K, dtype=np.float32):
    return arrays(np.random.default_rng(seed), (T, B, D), (D, K), (D,), (B, D, K), dtype=dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("T", "B", "D", "K"),
    [
        (0, 2, 3, 4),
        (1, 1, 1, 1),
        (1, 2, 3, 4),
        (2, 1, 5, 4),
        (3, 2, 1, 4),
        (4, 2, 3, 4),
        (17, 3, 2, 4),
        (5, 2, 3, 1),
        (7, 0, 3, 2),
    ],
)
def test_conv1d_matches_the_loop(T, B, D, K, activation):
    x, weight, bias, state = conv_case(0, T, B, D, K)
    for given_bias, given_state in ((None, None), (bias, state)):
        y, new = causal_conv1d(x, weight, given_bias, given_state, activation=activation, return_state=True)
        expected, expected_state = depthwise(x, weight, given_bias, given_state, activation)
        assert y.shape == x.shape
        assert y.dtype == new.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, **CLOSE)
        np.testing.assert_array_equal(new, expected_state.astype(np.float32))
        np.testing.assert_array_equal(y, causal_conv1d(x, weight, given_bias, given_state, activation=activation))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(1, 1, 4), (2, 3, 4), (9, 2, 3), (9, 2, 1)]), st.integers(0, 99), st.booleans(), st.booleans())
def test_conv1d_lengths_and_resets(shape, seed, per_row, with_lengths):
    T, B, K = shape
    x, weight, bias, state = conv_case(seed, T, B, 2, K)
    rng = np.random.default_rng(seed)
    reset = rng.random((T, B) if per_row else T) < 0.3
    lengths = rng.integers(0, T + 2, B) if with_lengths else None
    if with_lengths:
        x[np.arange(T)[:, None] >= lengths] = np.nan
    kwargs = {"activation": "silu", "lengths": lengths, "reset": reset}
    y, new = causal_conv1d(x, weight, bias, state, return_state=True, **kwargs)
    expected, expected_state = depthwise(x, weight, bias, state, **kwargs)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_array_equal(new, expected_state.astype(np.float32))


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_conv1d_in_parts_and_in_steps(cut, dtype):
    x, weight, bias, state = (jnp.asarray(v, dtype) for v in conv_case(1, 11, 2, 3, 4))
    reset = jnp.arange(11) == 6
    whole, last = causal_conv1d(x, weight, bias, state, activation="silu", reset=reset, return_state=True)
    y1, part = causal_conv1d(x[:cut], weight, bias, state, activation="silu", reset=reset[:cut], return_state=True)
    y2, part = causal_conv1d(x[cut:], weight, bias, part, activation="silu", reset=reset[cut:], return_state=True)
    assert whole.dtype == last.dtype == dtype
    np.testing.assert_array_equal(jnp.concatenate([y1, y2]), whole)
    np.testing.assert_array_equal(part, last)
    steps = []
    for x_t, reset_t in zip(x, reset, strict=True):
        state = jnp.where(reset_t, 0, state)
        y, state = causal_conv1d_update(x_t, state, weight, bias, activation="silu")
        steps.append(y)
    assert y.dtype == state.dtype == dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == jnp.bfloat16 else CLOSE
    as_float = [np.asarray(v, np.float32) for v in (jnp.stack(steps), whole)]
    np.testing.assert_allclose(*as_float, **tolerance)
    np.testing.assert_array_equal(state, last)


def test_conv1d_bfloat16_is_computed_in_float32():
    x, weight, bias, state = (jnp.asarray(v, jnp.bfloat16) for v in conv_case(2, 13, 2, 3, 4))
    y, new = causal_conv1d(x, weight, bias, state, return_state=True)
    wide = [np.asarray(v, np.float32) for v in (x, weight, bias, state)]
    np.testing.assert_array_equal(y, causal_conv1d(*wide).astype(jnp.bfloat16))
    assert causal_conv1d(x, weight, bias, wide[3], return_state=True)[1].dtype == jnp.float32
    assert new.dtype == jnp.bfloat16


@pytest.mark.parametrize("case", ["plain", "reset", "lengths", "both", "short"])
def test_conv1d_gradients(case):
    T = 2 if case == "short" else 7
    with jax.enable_x64(True):
        args = conv_case(3, T, 2, 3, 4, np.float64)
        kwargs = {}
        if case in ("reset", "both"):
            kwargs["reset"] = np.arange(T * 2).reshape(T, 2) % 5 == 3
        if case in ("lengths", "both"):
            kwargs["lengths"] = np.array([4, 7])

        def layer(*args):
            return causal_conv1d(*args, activation="silu", return_state=True, **kwargs)

        order = 2 if case == "both" else 1
        check_grads(layer, args, order=order, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)
        y, state = layer(*args)
        assert y.dtype == state.dtype == jnp.float64
        expected, _ = depthwise(*args, "silu", **kwargs)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_update_gradients():
    with jax.enable_x64(True):
        x, weight, bias, state = conv_case(3, 1, 2, 3, 4, np.float64)
        check_grads(causal_conv1d_update, (x[0], state, weight, bias), order=2, modes=["rev"], eps=1e-5)


def test_conv1d_padding_and_cleared_inputs_touch_nothing():
    x, weight, bias, state = conv_case(4, 9, 3, 2, 4)
    lengths, reset = np.array([9, 4, 0]), np.arange(9) == 3
    cotangent = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)

    def loss(x, weight, bias, state):
        y, new = causal_conv1d(
            x, weight, bias, state, activation="silu", lengths=lengths, reset=reset, return_state=True
        )
        return jnp.sum(y * cotangent) + jnp.sum(new**2), y

    grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    clean, y_clean = grad(x, weight, bias, state)
    dirty = x.copy()
    dirty[np.arange(9)[:, None] >= lengths] = np.nan
    got, y = grad(dirty, weight, bias, state)
    np.testing.assert_array_equal(y, y_clean)
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(got[0])[np.arange(9)[:, None] >= lengths])

    before = x.copy()
    before[:3, 0] = np.nan
    after = causal_conv1d(before, weight, bias, np.full_like(state, np.nan), reset=reset)[3:]
    np.testing.assert_array_equal(after, causal_conv1d(x[3:], weight, bias))


def test_conv1d_row_with_nan_stays_alone():
    x, weight, bias, state = conv_case(6, 9, 3, 2, 4)
    dirty = x.copy()
    dirty[2, 1] = np.nan
    y, new = causal_conv1d(dirty, weight, bias, state, return_state=True)
    expected, expected_new = causal_conv1d(x, weight, bias, state, return_state=True)
    np.testing.assert_array_equal(y[:, ::2], expected[:, ::2])
    np.testing.assert_array_equal(y[6:], expected[6:])
    np.testing.assert_array_equal(new, expected_new)
    d_x = jax.grad(lambda x: jnp.sum(causal_conv1d(x, weight, bias, state, activation="silu")[:, ::2]))(dirty)
    assert np.all(np.isfinite(np.asarray(d_x)[:, ::2]))


def test_conv1d_under_vmap_and_jit():
    x, weight, bias, state = conv_case(7, 5, 4, 3, 4)
    lengths = np.array([5, 2, 0, 3])
    whole = jax.jit(causal_conv1d)(x, weight, bias, state, lengths=lengths)
    rows = jax.vmap(
        lambda x, s, n: causal_conv1d(x[:, None], weight, bias, s[None], lengths=n[None])[:, 0], (1, 0, 0), 1
    )(x, state, lengths)
    np.testing.assert_allclose(rows, whole, **CLOSE)


def test_the_backward_pass_keeps_the_arguments_only():
    x, weight, bias, state = conv_case(8, 32, 2, 8, 4)
    _, pull = jax.vjp(lambda *a: causal_conv1d(*a, activation="silu"), x, weight, bias, state)
    assert sum(v.nbytes for v in jax.tree.leaves(pull)) <= x.nbytes + weight.nbytes + bias.nbytes + state.nbytes
    k = arrays(np.random.default_rng(0), (32, 8))[0]
    _, pull = jax.vjp(fft_conv, x, k)
    assert sum(v.nbytes for v in jax.tree.leaves(pull)) <= x.nbytes + k.nbytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((5, 3))}, ValueError, r"x must have shape \(T, B, D\), got \(5, 3\)"),
        ({"x": np.ones((5, 2, 3), int)}, TypeError, "x must be real floating point, got int"),
        ({"x": np.ones((5, 2, 3), complex)}, TypeError, "x must be real floating point, got complex"),
        ({"weight": np.ones((4, 3))}, ValueError, r"weight must have shape \(3, K\), K >= 1.*got \(4, 3\)"),
        ({"weight": np.ones((3, 0))}, ValueError, r"weight must have shape"),
        ({"bias": np.ones(4)}, ValueError, r"bias must have shape \(3,\).*got \(4,\)"),
        ({"conv_state": np.ones((2, 3, 3))}, ValueError, r"conv_state must have shape \(2, 3, 4\).*got \(2, 3, 3\)"),
        ({"activation": "relu"}, ValueError, "activation must be None or one of .*'relu'"),
        ({"lengths": np.ones(3, int)}, ValueError, "lengths must have shape"),
        ({"lengths": np.ones(2)}, TypeError, "lengths must be integers"),
        ({"reset": np.ones((5, 3), bool)}, ValueError, "reset must have shape"),
        ({"reset": np.ones(5)}, TypeError, "reset must be bool"),
    ],
)
def test_conv1d_errors(change, error, message):
    args = {"x": np.ones((5, 2, 3), np.float32), "weight": np.ones((3, 4), np.float32)} | change
    with pytest.raises(error, match=message):
        causal_conv1d(**args)


def test_update_errors():
    x, state, weight = np.ones((2, 3)), np.ones((2, 3, 4)), np.ones((3, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\), got \(1, 2, 3\)"):
        causal_conv1d_update(x[None], state, weight)
    with pytest.raises(ValueError, match="conv_state must have shape"):
        causal_conv1d_update(x, state[..., 1:], weight)


@pytest.mark.parametrize(
    ("T", "B", "H", "L", "C"),
    [
        (0, 2, 3, 4, None),
        (1, 1, 1, 1, None),
        (5, 2, 3, 0, None),
        (17, 1, 2, 17, 3),
        (13, 2, 1, 40, None),
        (31, 2, 3, 7, 2),
        (2, 1, 1, 2, 1),
    ],
)
def test_fft_conv_matches_the_loop(T, B, H, L, C):
    x, k = arrays(np.random.default_rng(9), (T, B, H), (L, H) if C is None else (L, C, H))
    y = fft_conv(x, k)
    expected = long_convolution(x, k)
    assert y.shape == expected.shape
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6 * max(1, np.abs(expected).max(initial=0)))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(8, 9), (9, 8), (11, 11), (12, 3)]), st.integers(0, 99))
def test_fft_conv_does_not_wrap(sizes, seed):
    T, L = sizes
    x, k = arrays(np.random.default_rng(seed), (T, 1, 2), (L, 2))
    np.testing.assert_allclose(fft_conv(x, k), long_convolution(x, k), rtol=1e-5, atol=1e-5)


def test_fft_conv_of_an_impulse_at_the_end_leaves_the_start_at_zero():
    x = np.zeros((1009, 1, 1), np.float32)
    x[-1] = 1
    k = np.full((1009, 1), 1000.0, np.float32)
    y = np.asarray(fft_conv(x, k))
    np.testing.assert_allclose(y[:-1], 0, atol=1e-3)
    np.testing.assert_allclose(y[-1], 1000, rtol=1e-5)


@pytest.mark.parametrize(("T", "L", "C"), [(6, 6, None), (6, 3, 2), (3, 8, None)])
def test_fft_conv_gradients(T, L, C):
    with jax.enable_x64(True):
        args = arrays(np.random.default_rng(10), (T, 2, 3), (L, 3) if C is None else (L, C, 3), dtype=np.float64)
        check_grads(fft_conv, args, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)
        y = fft_conv(*args)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, long_convolution(*args), rtol=1e-12, atol=1e-12)


def test_fft_conv_bfloat16_vmap_and_nan_rows():
    x, k = arrays(np.random.default_rng(11), (9, 3, 2), (9, 2))
    half = fft_conv(jnp.asarray(x, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    rounded = [np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in (x, k)]
    np.testing.assert_allclose(np.asarray(half, np.float64), long_convolution(*rounded), rtol=1e-2, atol=1e-2)
    mapped = jax.vmap(lambda row: fft_conv(row[:, None], k)[:, 0], 1, 1)(x)
    np.testing.assert_allclose(mapped, fft_conv(x, k), rtol=1e-5, atol=1e-5)
    dirty = x.copy()
    dirty[4, 1] = np.nan
    np.testing.assert_allclose(fft_conv(dirty, k)[:, ::2], fft_conv(x, k)[:, ::2], rtol=1e-5, atol=1e-5)
    d_x = jax.grad(lambda x: jnp.sum(fft_conv(x, k)[:, ::2] ** 2))(dirty)
    assert np.all(np.isfinite(np.asarray(d_x)[:, ::2]))


def test_fast_lengths():
    smooth = sorted({2**a * 3**b * 5**c for a in range(1, 13) for b in range(9) for c in range(7)})
    for n in [*range(1, 300), 2017, 2025, 2048, 4001]:
        assert _fast_length(n) == next(s for s in smooth if s >= n)


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        (np.ones((5, 3)), np.ones((5, 3)), ValueError, r"x must have shape \(T, B, H\), got \(5, 3\)"),
        (np.ones((5, 2, 3)), np.ones((5, 4)), ValueError, r"k must have shape \(L, 3\) or \(L, C, 3\).*\(5, 4\)"),
        (np.ones((5, 2, 3)), np.ones(5), ValueError, "k must have shape"),
        (np.ones((5, 2, 3)), np.ones((5, 3), complex), TypeError, "k must be real floating point, got complex"),
    ],
)
def test_fft_conv_errors(x, k, error, message):
    with pytest.raises(error, match=message):
        fft_conv(x, k)
