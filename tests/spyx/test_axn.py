"""spyx.axn: the step forward, the closed surrogate formulas backward."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spyx
from spyx import axn

SURROGATES = {
    "triangular": (axn.triangular, {"k": 3.0}, lambda x, k=2.0: np.maximum(0, 1 - np.abs(k * x))),
    "arctan": (axn.arctan, {"k": 0.5}, lambda x, k=2.0: 1 / np.pi / (1 + (np.pi * k * x) ** 2)),
    "superspike": (axn.superspike, {"k": 10.0}, lambda x, k=25.0: (1 + k * np.abs(x)) ** -2.0),
    "tanh": (axn.tanh, {"k": 2.5}, lambda x, k=1.0: 1 / np.cosh(k * x) ** 2),
    "boxcar": (
        axn.boxcar,
        {"width": 1.0, "height": 0.25},
        lambda x, width=2.0, height=0.5: height * (np.abs(x) < width / 2),
    ),
}
EDGES = np.array([-1.0, -0.5, -1 / 3, 0.0, 1e-30, 1 / 3, 0.5, 1.0])


def points(dtype=np.float32):
    return np.concatenate([np.random.default_rng().normal(size=200) * 2, EDGES]).astype(dtype)


@pytest.mark.parametrize("name", SURROGATES)
def test_step_forward_and_formula_backward(name):
    factory, arguments, formula = SURROGATES[name]
    x = points()
    for kwargs in ({}, arguments):
        spike = factory(**kwargs)
        np.testing.assert_array_equal(spike(x), (x > 0).astype(np.float32))
        incoming = np.random.default_rng().normal(size=x.shape).astype(np.float32)
        (gradient,) = jax.vjp(spike, jnp.asarray(x))[1](incoming)
        expected = incoming * formula(x.astype(np.float64), **kwargs)
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-7)


def test_published_values():
    """Figures of spyx 1.0.0 (jax 0.10.2): the derivatives at -0.3 and 1 of the default surrogates."""
    published = {
        "triangular": [0.4, 0.0],
        "arctan": [0.0699112, 0.0078637],
        "superspike": [0.0138408, 0.0014793],
        "tanh": [0.9151369, 0.4199743],
        "boxcar": [0.5, 0.0],
    }
    for name, values in published.items():
        found = jax.vmap(jax.grad(getattr(axn, name)()))(jnp.array([-0.3, 1.0]))
        np.testing.assert_allclose(found, values, rtol=2e-5)


@pytest.mark.parametrize("name", SURROGATES)
def test_finite_far_away(name):
    x = jnp.array([-1e4, 1e4, -jnp.inf, jnp.inf])
    spike = SURROGATES[name][0]()
    np.testing.assert_array_equal(spike(x), [0, 1, 0, 1])
    assert np.isfinite(jax.vmap(jax.grad(spike))(x[:2])).all()
    assert np.isfinite(jax.vmap(jax.grad(jax.grad(spike)))(x[:2])).all()


def test_derivative_of_the_surrogate():
    x = jnp.array([-0.3, 0.2])
    second = jax.vmap(jax.grad(jax.grad(axn.superspike(4.0))))(x)
    np.testing.assert_allclose(second, -8 * np.sign(x) * (1 + 4 * np.abs(x)) ** -3.0, rtol=1e-6)


def test_heaviside():
    x = jnp.array([-1.0, -0.0, 0.0, 1e-30, 2.0, jnp.nan])
    np.testing.assert_array_equal(axn.heaviside(x), [0, 0, 0, 1, 1, 0])
    assert axn.heaviside(jnp.array([-3, 4], jnp.int8)).dtype == jnp.int8
    np.testing.assert_array_equal(jax.grad(lambda x: axn.heaviside(x).sum())(x), 0)


def test_custom():
    x = jnp.array([-2.0, 0.5])
    gradient = jax.vmap(jax.grad(axn.custom()))(x)
    np.testing.assert_array_equal(gradient, x)
    straight_through = axn.custom(jnp.ones_like)
    np.testing.assert_array_equal(jax.vmap(jax.grad(straight_through))(x), 1)
    graded = axn.custom(lambda x: 3 * x**2, lambda x: x**3)
    np.testing.assert_array_equal(graded(x), x**3)
    np.testing.assert_array_equal(jax.vmap(jax.grad(graded))(x), 3 * x**2)
    for kwargs, name in (({"bwd": 1.0}, "bwd"), ({"fwd": None}, "fwd")):
        with pytest.raises(TypeError, match=name):
            axn.custom(**kwargs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", [*SURROGATES, "custom"])
def test_dtype_is_kept(name, dtype):
    x = jnp.linspace(-1, 1, 7, dtype=dtype)
    spike = getattr(axn, name)()
    assert spike(x).dtype == dtype
    assert jax.grad(lambda x: spike(x).sum())(x).dtype == dtype


@pytest.mark.parametrize("name", SURROGATES)
def test_float64(name):
    factory, arguments, formula = SURROGATES[name]
    with jax.enable_x64(True):
        x = points(np.float64)
        gradient = jax.grad(lambda x: factory(**arguments)(x).sum())(jnp.asarray(x))
        assert gradient.dtype == jnp.float64
        np.testing.assert_allclose(gradient, formula(x, **arguments), rtol=1e-12, atol=1e-300)


def test_under_transformations():
    spike, x = axn.superspike(), jnp.linspace(-1, 1, 12).reshape(3, 4)
    np.testing.assert_array_equal(jax.jit(jax.vmap(spike))(x), spike(x))
    gradient = jax.grad(lambda x: jax.lax.scan(lambda c, x_t: (c, spike(x_t)), 0, x)[1].sum())(x)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(jax.grad(spike))))(x), gradient, rtol=1e-6)


@pytest.mark.parametrize("name", [*SURROGATES, "custom"])
def test_equal_copies_and_pickles(name):
    factory = getattr(axn, name)
    spike = factory()
    others = [factory(), copy.deepcopy(spike), pickle.loads(pickle.dumps(spike))]
    assert all(other == spike and hash(other) == hash(spike) for other in others)
    x = jnp.array([-0.3, 0.2])
    for other in others:
        np.testing.assert_array_equal(jax.vmap(jax.grad(other))(x), jax.vmap(jax.grad(spike))(x))
    if name in SURROGATES:
        assert factory(**SURROGATES[name][1]) != spike


def test_modules_are_found_by_name():
    assert spyx.axn is axn
    assert {"axn", "nn", "phasor", "quant", "ops", "ssm"} <= set(dir(spyx))
