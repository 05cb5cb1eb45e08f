"""Vandermonde and Cauchy kernels against float64 sums: values, gradients, memory."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracles.convolution import cauchy, vandermonde

from spyx.ops.ssm_kernels import cauchy_kernel, vandermonde_kernel


def normal(rng, *shape, dtype=np.complex64):
    value = rng.standard_normal(shape)
    return (value + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else value).astype(dtype)


def diagonal_case(seed, lead, H, n, frequency=3.0, dtype=np.complex64):
    """Coefficients and dt A, half-lives of a few to a few thousand steps."""
    rng = np.random.default_rng(seed)
    decay = np.exp(rng.uniform(-9, -1, (H, n)))
    return normal(rng, *lead, H, n, dtype=dtype), (-decay + 1j * rng.uniform(-frequency, frequency, (H, n))).astype(
        dtype
    )


def dplr_case(seed, lead, H, n, L, dtype=np.complex64):
    """Numerators, nodes and poles as S4 has them: nodes on the imaginary axis, poles to the left of it."""
    rng = np.random.default_rng(seed)
    w = -np.exp(rng.uniform(-4, 0, (H, n))) + 1j * rng.uniform(0, 3, (H, n))
    z = 2j * np.tan(np.pi * np.arange(L) / (2 * L))
    return normal(rng, *lead, H, n, dtype=dtype), z.astype(dtype), w.astype(dtype)


def assert_near(value, expected, tolerance):
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * scale + 1e-30)


@pytest.mark.parametrize("conj_sym", [False, True])
@pytest.mark.parametrize(
    ("lead", "H", "n", "L"),
    [
        ((), 3, 4, 0),
        ((1,), 1, 1, 1),
        ((2,), 3, 4, 2),
        ((2, 3), 2, 5, 67),
        ((1,), 2, 3, 1009),
        ((40,), 1, 2, 3),
        ((1,), 2, 0, 5),
    ],
)
def test_vandermonde_matches_the_sum(lead, H, n, L, conj_sym):
    C, dtA = diagonal_case(0, lead, H, n)
    K = vandermonde_kernel(C, dtA, L, conj_sym=conj_sym)
    assert K.shape == (*lead, H, L)
    assert K.dtype == jnp.float32
    assert_near(K, vandermonde(C, dtA, L, conj_sym), 1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1e-4, 1.0, 100.0, 1e5]))
def test_vandermonde_phase_is_exact_at_16384_steps(seed, frequency):
    C, dtA = diagonal_case(seed, (1,), 2, 16, frequency)
    expected = vandermonde(C, dtA, 16384, conj_sym=True)
    assert_near(vandermonde_kernel(C, dtA, 16384, conj_sym=True), expected, 1e-6)


def test_vandermonde_phase_is_exact_at_a_million_steps():
    C, dtA = diagonal_case(16, (1,), 1, 2, 100.0)
    dtA.real = -1e-7
    assert_near(vandermonde_kernel(C, dtA, 2**20), vandermonde(C, dtA, 2**20), 1e-6)


@pytest.mark.parametrize(
    ("C_dtype", "A_dtype"),
    [(np.float32, np.float32), (np.complex64, np.float32), (np.float32, np.complex64)],
)
def test_vandermonde_of_real_systems(C_dtype, A_dtype):
    C, dtA = diagonal_case(1, (2,), 3, 4)
    C, dtA = (np.asarray(v if np.dtype(d).kind == "c" else v.real, d) for v, d in ((C, C_dtype), (dtA, A_dtype)))
    assert_near(vandermonde_kernel(C, dtA, 37), vandermonde(C, dtA, 37), 1e-6)


@pytest.mark.parametrize("value", [0, -1e-30, -200, -1e30, 0.01, 1j * np.pi, -1e-3 + 1e4j, -1e-3 - 1e-8j])
def test_vandermonde_at_the_edges_is_finite(value):
    C, dtA = np.ones((1, 1, 1), np.complex64), np.full((1, 1), value, np.complex64)

    def total(C, dtA):
        return jnp.sum(vandermonde_kernel(C, dtA, 300))

    assert_near(vandermonde_kernel(C, dtA, 300), vandermonde(C, dtA, 300), 2e-6)
    gradients = jax.grad(total, argnums=(0, 1))(C, dtA)
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("conj_sym", [False, True])
def test_vandermonde_gradients(conj_sym):
    C, dtA = diagonal_case(2, (2,), 3, 4, 20.0)
    weight = np.random.default_rng(3).standard_normal((2, 3, 500)).astype(np.float32)
    wide = weight.astype(np.float64) * (2 if conj_sym else 1)
    steps = np.arange(500)
    powers = np.exp(dtA.astype(np.complex128)[..., None] * steps)
    exact = np.einsum("chl,hnl->chn", wide, powers), np.einsum("chl,chn,hnl->hn", wide * steps, C, powers)
    loss = lambda *a: jnp.sum(weight * vandermonde_kernel(*a, 500, conj_sym=conj_sym))  # noqa: E731
    for got, expected in zip(jax.grad(loss, argnums=(0, 1))(C, dtA), exact, strict=True):
        assert_near(got, expected, 3e-6)


def test_vandermonde_derivatives_in_float64():
    with jax.enable_x64(True):
        C, dtA = diagonal_case(4, (1,), 1, 2, dtype=np.complex128)
        K = vandermonde_kernel(C, dtA, 50)
        assert K.dtype == jnp.float64
        assert_near(K, vandermonde(C, dtA, 50), 1e-13)
        args = (C.real, C.imag, dtA.real, dtA.imag)
        kernel = lambda a, b, c, d: vandermonde_kernel(jax.lax.complex(a, b), jax.lax.complex(c, d), 11)  # noqa: E731
        check_grads(kernel, args, order=1, modes=["fwd"], atol=1e-5, rtol=1e-5)
        check_grads(kernel, args, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_vandermonde_applies_an_initial_state():
    """K with C A_bar h0 for C is what h0 adds to the outputs."""
    C, dtA = diagonal_case(5, (2,), 3, 4)
    h = normal(np.random.default_rng(6), 5, 3, 4)
    added = vandermonde_kernel(C * (np.exp(dtA) * h)[:, None], dtA, 9, conj_sym=True)
    h, A_bar = h.astype(np.complex128), np.exp(dtA.astype(np.complex128))
    for step in range(9):
        h = A_bar * h
        np.testing.assert_allclose(added[..., step], 2 * np.einsum("chn,bhn->bch", C, h).real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conj_sym", [False, True])
@pytest.mark.parametrize(
    ("lead", "H", "n", "L"),
    [((), 2, 3, 0), ((), 1, 1, 1), ((2, 2), 3, 4, 2), ((3,), 2, 5, 67), ((2,), 3, 0, 5)],
)
def test_cauchy_matches_the_sum(lead, H, n, L, conj_sym):
    v, z, w = dplr_case(7, lead, H, n, L)
    r = cauchy_kernel(v, z, w, conj_sym=conj_sym)
    assert r.shape == (*lead, H, L)
    assert r.dtype == jnp.complex64
    assert_near(r, cauchy(v, z, w, conj_sym), 1e-6)


def test_cauchy_shapes_and_real_values():
    v, z, w = dplr_case(8, (), 6, 4, 9)
    assert_near(cauchy_kernel(v[0], z, w[0]), cauchy(v[0], z, w[0]), 1e-6)
    stacked, poles = v.reshape(2, 3, 4), w.reshape(2, 3, 4)
    assert_near(cauchy_kernel(stacked, z, poles), cauchy(stacked, z, poles), 1e-6)
    r = cauchy_kernel(v.real, z.imag + 1, w.real)
    assert r.dtype == jnp.complex64
    assert_near(r, cauchy(v.real, z.imag + 1, w.real), 1e-6)


@pytest.mark.parametrize("conj_sym", [False, True])
def test_cauchy_far_nodes_and_near_poles(conj_sym):
    v, w = np.ones((1, 1), np.complex64), np.array([[0.5j]], np.complex64)
    z = np.array([4e7j, 1e15j, 1e-12 + 0.5j], np.complex64)
    r = cauchy_kernel(v, z, w, conj_sym=conj_sym)
    np.testing.assert_allclose(r, cauchy(v, z, w, conj_sym), rtol=1e-6)
    d_w = jax.grad(lambda w: jnp.sum(cauchy_kernel(v, z, w, conj_sym=conj_sym).real))(w)
    assert np.all(np.isfinite(d_w))


@pytest.mark.parametrize("conj_sym", [False, True])
def test_cauchy_gradients_follow_jax_convention(conj_sym):
    """A real loss of a complex result, against jax.grad of the definition."""
    with jax.enable_x64(True):
        args = dplr_case(9, (2,), 3, 4, 11, np.complex128)
        weight = normal(np.random.default_rng(10), 2, 3, 11, dtype=np.complex128)

        def naive(v, z, w):
            r = jnp.sum(v[..., None] / (z - w[..., None]), axis=-2)
            return r + jnp.sum(v.conj()[..., None] / (z - w.conj()[..., None]), axis=-2) if conj_sym else r

        def gradients(kernel):
            loss = lambda *a: jnp.sum((weight * kernel(*a)).real) + jnp.sum(jnp.abs(kernel(*a)) ** 2)  # noqa: E731
            return jax.grad(loss, argnums=(0, 1, 2))(*args)

        expected = gradients(naive)
        for got, want in zip(gradients(lambda *a: cauchy_kernel(*a, conj_sym=conj_sym)), expected, strict=True):
            assert_near(got, np.asarray(want), 1e-12)


def test_cauchy_derivatives_in_float64():
    with jax.enable_x64(True):
        v, z, w = dplr_case(11, (1,), 1, 2, 3, np.complex128)
        assert cauchy_kernel(v, z, w).dtype == jnp.complex128
        args = [part for a in (v, z, w) for part in (a.real, a.imag)]

        def kernel(*p):
            r = cauchy_kernel(*map(jax.lax.complex, p[::2], p[1::2]), conj_sym=True)
            return r.real, r.imag

        check_grads(kernel, args, order=1, modes=["fwd"], atol=1e-4, rtol=1e-4)
        check_grads(kernel, args, order=2, modes=["rev"], atol=1e-4, rtol=1e-4)


def test_kernels_under_jit_and_vmap():
    C, dtA = diagonal_case(12, (4,), 2, 3)
    one = lambda C, dtA: vandermonde_kernel(C, dtA, 8)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(one, (0, None)))(C, dtA), one(C, dtA), rtol=1e-5, atol=1e-5)
    both = jax.vmap(one)(C, np.stack([dtA] * 4))
    np.testing.assert_allclose(both, one(C, dtA), rtol=1e-5, atol=1e-5)
    v, z, w = dplr_case(12, (4,), 2, 3, 8)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(cauchy_kernel, (0, None, None)))(v, z, w), cauchy_kernel(v, z, w), rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.vmap(lambda z: cauchy_kernel(v, z[None], w)[..., 0], 0, -1)(z), cauchy_kernel(v, z, w), rtol=1e-5
    )


def test_bfloat16_values_are_widened():
    C, dtA = (jnp.asarray(v.real, jnp.bfloat16) for v in diagonal_case(13, (1,), 2, 3))
    assert vandermonde_kernel(C, dtA, 4).dtype == jnp.float32
    assert_near(vandermonde_kernel(C, dtA, 4), vandermonde(C.astype(np.float32), dtA.astype(np.float32), 4), 1e-6)
    assert cauchy_kernel(C[0], jnp.arange(2.0), dtA).dtype == jnp.complex64


def test_nan_stays_in_its_head():
    C, dtA = diagonal_case(14, (2,), 3, 4)
    expected, dtA[1, 0] = vandermonde_kernel(C, dtA, 20), np.nan
    np.testing.assert_array_equal(vandermonde_kernel(C, dtA, 20)[:, ::2], expected[:, ::2])
    v, z, w = dplr_case(14, (2,), 3, 4, 20)
    expected, v[1, 1, 0] = cauchy_kernel(v, z, w), np.nan
    r = cauchy_kernel(v, z, w)
    np.testing.assert_array_equal(r[0], expected[0])
    np.testing.assert_array_equal(r[1, ::2], expected[1, ::2])


def temp_bytes(function, *args):
    args = [jax.ShapeDtypeStruct(a, jnp.complex64) for a in args]
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_working_memory_does_not_grow_with_the_state(backward):
    H, L = 32, 4096

    def vandermonde_bytes(n):
        loss = lambda C, a: jnp.sum(vandermonde_kernel(C, a, L) ** 2)  # noqa: E731
        f = jax.grad(loss, argnums=(0, 1)) if backward else lambda C, a: vandermonde_kernel(C, a, L)
        return temp_bytes(f, (1, H, n), (H, n))

    def cauchy_bytes(n):
        loss = lambda *a: jnp.sum(jnp.abs(cauchy_kernel(*a, conj_sym=True)) ** 2)  # noqa: E731
        f = jax.grad(loss, argnums=(0, 1, 2)) if backward else lambda *a: cauchy_kernel(*a, conj_sym=True)
        return temp_bytes(f, (2, H, n), (L,), (H, n))

    for measure in (vandermonde_bytes, cauchy_bytes):
        small, large = measure(128), measure(512)
        assert large < 1.2 * small
        assert large < 8 * 512 * H * L / 32


@pytest.mark.parametrize("backward", [False, True])
def test_products_are_exact_on_every_platform(backward):
    """Lowered for TPU and GPU, no float32 product is left to the default precision."""
    C, dtA = diagonal_case(15, (2,), 3, 4)
    v, z, w = dplr_case(15, (2,), 3, 4, 5)

    def total(C, dtA, v, z, w):
        return jnp.sum(vandermonde_kernel(C, dtA, 9)) + jnp.sum(cauchy_kernel(v, z, w, conj_sym=True)).real

    function = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)) if backward else total)
    text = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(C, dtA, v, z, w).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


X, Y = np.ones((2, 3)), np.ones((3, 2))


@pytest.mark.parametrize(
    ("kernel", "args", "error", "message"),
    [
        (vandermonde_kernel, (X, Y, 4), ValueError, r"C must have shape .* got C \(2, 3\) and dtA \(3, 2\)"),
        (vandermonde_kernel, (X[0], X[0], 4), ValueError, r"C must have shape \(..., H, n\) and dtA \(H, n\)"),
        (vandermonde_kernel, (X, X, -1), ValueError, "L must be between 0 and 16777216, got -1"),
        (vandermonde_kernel, (X.astype(int), X, 4), TypeError, "C must be floating point or complex, got int"),
        (cauchy_kernel, (X[0], X, X[0]), ValueError, r"z must have shape \(L,\), got \(2, 3\)"),
        (cauchy_kernel, (X, X[0], X[:1]), ValueError, r"v must have shape .* got v \(2, 3\) and w \(1, 3\)"),
        (cauchy_kernel, (X, X[0], X.astype(int)), TypeError, "w must be floating point or complex, got int"),
    ],
)
def test_errors(kernel, args, error, message):
    with pytest.raises(error, match=message):
        kernel(*args)
