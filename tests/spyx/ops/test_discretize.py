"""Discretizations against float64 formulas, and their limits at A -> 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spyx.ops import async_, bilinear, dirac, no_discretization, zoh
from spyx.ops.discretize import phi1

A64 = np.array([-0.5 + 0j, -1e-3 + 2j, -3 - 40j, -1e-6 + 1e-6j, -20 + 0.1j])
DT64 = np.array([1e-3, 0.1, 0.05, 1.0, 0.3])


def single(values):
    return values.astype(np.complex64 if np.iscomplexobj(values) else np.float32)


def exact_phi1(z):
    import mpmath

    return np.array([complex(mpmath.expm1(v) / v) if v else 1.0 for v in np.ravel(z)]).reshape(np.shape(z))


def test_zoh_is_the_exact_hold():
    A_bar, gamma = zoh(single(A64), single(DT64))
    A, dt = single(A64).astype(np.complex128), single(DT64).astype(np.float64)
    np.testing.assert_allclose(A_bar, np.exp(A * dt), rtol=1e-6)
    np.testing.assert_allclose(gamma, dt * exact_phi1(A * dt), rtol=2e-6)


def test_bilinear_is_tustin_and_stable():
    A_bar, gamma = bilinear(single(A64), single(DT64))
    A, dt = single(A64).astype(np.complex128), single(DT64).astype(np.float64)
    np.testing.assert_allclose(A_bar, (1 + A * dt / 2) / (1 - A * dt / 2), rtol=1e-6)
    np.testing.assert_allclose(gamma, dt / (1 - A * dt / 2), rtol=1e-6)
    assert np.all(np.abs(A_bar) <= 1)


def test_dirac_and_no_discretization():
    A_bar, gamma = dirac(single(A64), single(DT64))
    np.testing.assert_allclose(A_bar, np.exp(single(A64) * single(DT64)), rtol=1e-6)
    assert gamma == 1.0
    A_bar, gamma = no_discretization(single(A64), single(DT64))
    np.testing.assert_array_equal(A_bar, single(A64))
    assert gamma == 1.0


def test_async_scales_only_the_decay():
    steps = np.linspace(0, 3, 4, dtype=np.float32)[:, None]
    A_bar, gamma = async_(single(A64), single(DT64), steps)
    assert A_bar.shape == (4, 5)
    np.testing.assert_allclose(A_bar, np.exp(A64 * DT64 * steps), rtol=1e-5)
    np.testing.assert_allclose(gamma, zoh(single(A64), single(DT64))[1])
    np.testing.assert_allclose(A_bar[0], 1)


@pytest.mark.parametrize("z", [0.0, 1e-20, -1e-8, 1e-3, -0.4999, 0.5001, -30.0])
def test_phi1_value_and_gradient(z):
    import mpmath

    value, gradient = jax.value_and_grad(phi1)(jnp.float32(z))
    z = float(np.float32(z))
    if z == 0:
        exact, slope = 1.0, 0.5
    else:
        with mpmath.workdps(60):
            m = mpmath.mpf(z)
            exact = float(mpmath.expm1(m) / m)
            slope = float((mpmath.exp(m) * m - mpmath.expm1(m)) / m**2)
    np.testing.assert_allclose(value, exact, rtol=5e-7)
    np.testing.assert_allclose(gradient, slope, rtol=5e-6)


@pytest.mark.parametrize("name", ["zoh", "bilinear", "dirac"])
@pytest.mark.parametrize("A", [0j, 1e-30 + 0j, -1e-12 + 1e-12j, 0 + 1j])
def test_finite_value_and_gradient_near_zero(name, A):
    function = {"zoh": zoh, "bilinear": bilinear, "dirac": dirac}[name]

    def total(re, im, dt):
        A_bar, gamma = function(jax.lax.complex(re, im), dt)
        return A_bar.real.sum() + A_bar.imag.sum() + jnp.real(gamma).sum()

    for dt in (1e-8, 0.1, 100.0):
        inputs = (jnp.float32([A.real]), jnp.float32([A.imag]), jnp.float32([dt]))
        assert np.isfinite(total(*inputs))
        assert all(np.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1, 2))(*inputs))


def test_zoh_input_factor_at_zero_is_dt():
    np.testing.assert_allclose(zoh(jnp.zeros(2, jnp.complex64), jnp.float32([0.1, 3.0]))[1], [0.1, 3.0], rtol=1e-6)


@pytest.mark.parametrize("function", [zoh, bilinear, dirac, no_discretization])
def test_time_steps_are_refused_where_they_cannot_be_used(function):
    with pytest.raises(ValueError, match=r"cannot use integration_timesteps"):
        function(single(A64), single(DT64), np.ones(5, np.float32))


def test_async_needs_time_steps():
    with pytest.raises(ValueError, match=r"needs integration_timesteps"):
        async_(single(A64), single(DT64))


def test_64_bit():
    with jax.enable_x64(True):
        A_bar, gamma = zoh(A64, DT64)
        np.testing.assert_allclose(A_bar, np.exp(A64 * DT64), rtol=1e-14)
        np.testing.assert_allclose(gamma, DT64 * exact_phi1(A64 * DT64), rtol=1e-14)
