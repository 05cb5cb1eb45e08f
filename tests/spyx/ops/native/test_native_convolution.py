"""The convolution with kernels of diagonal systems: by FFT, and by the compiled recurrence, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spyx.ops import dispatch, fft_conv, vandermonde_conv, vandermonde_kernel

needs_kernels = pytest.mark.skipif(not dispatch.native_kernels(), reason="numba is not installed, or SPYX_NATIVE=0")


def case(T, B, H, n, c=1, real=False, seed=0):
    rng = np.random.default_rng(seed)

    def number(*shape):
        z = rng.normal(size=shape) + (0 if real else 1j * rng.normal(size=shape))
        return z.astype(np.float32 if real else np.complex64)

    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (H, 1)))
    dtA = dt * (-0.5 - np.arange(n) if real else -0.5 + 1j * np.pi * np.arange(n))
    return rng.normal(size=(T, B, H)).astype(np.float32), number(c, H, n), dtA.astype(number(1).dtype)


def definition(u, C, dtA, conj_sym):
    """Step by step in float64."""
    h = np.zeros((u.shape[1], *dtA.shape), np.complex128)
    a, y = np.exp(dtA.astype(np.complex128)), []
    for u_t in u:
        h = a * h + u_t[..., None]
        y.append((1 + conj_sym) * np.einsum("chn,bhn->bch", C, h).real)
    return np.array(y)


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)


@pytest.mark.parametrize("method", ["plain", "auto"])
@pytest.mark.parametrize(
    ("shape", "real", "conj_sym"),
    [((1, 1, 1, 1), False, True), ((67, 2, 66, 3, 2), False, False), ((130, 1, 5, 4), True, True),
     ((131, 3, 64, 2, 3), False, True), ((23, 2, 129, 1), True, False)],
)  # fmt: skip
def test_values_and_gradients(shape, real, conj_sym, method):
    values = case(*shape, real=real)
    plain = method == "plain" or not dispatch.native_kernels()

    def conv(u, C, dtA):
        if plain:
            return fft_conv(u, jnp.moveaxis(vandermonde_kernel(C, dtA, u.shape[0], conj_sym=conj_sym), -1, 0))
        return vandermonde_conv(u, C, dtA, conj_sym=conj_sym)

    want = definition(*values, conj_sym)
    weights = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    program = jax.jit(jax.value_and_grad(lambda *v: jnp.vdot(conv(*v), weights), (0, 1, 2)))
    assert relative(conv(*values), want) < 2e-6
    assert plain or "spyx_native" in program.lower(*values).as_text()
    with jax.enable_x64(True):
        wide = [v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for v in values]
        assert relative(conv(*wide), want) < 1e-12
        exact = jax.grad(lambda *v: jnp.vdot(conv(*v), weights.astype(np.float64)), (0, 1, 2))(*wide)
        exact = [np.asarray(g) for g in exact]
    for got, expected in zip(program(*values)[1], exact, strict=True):
        assert relative(got, expected) < 1e-5


def test_second_derivatives_and_vmap():
    u, C, dtA = case(9, 2, 3, 2)

    def loss(u):
        return jnp.sum(jnp.sin(vandermonde_conv(u, C, dtA)))

    direction = np.random.default_rng(2).normal(size=u.shape).astype(np.float32)
    product = jax.jvp(jax.grad(loss), (u,), (direction,))[1]
    step = 1e-2
    change = (jax.grad(loss)(u + step * direction) - jax.grad(loss)(u - step * direction)) / (2 * step)
    assert relative(product, change) < 1e-3
    many = np.stack([u, 2 * u])
    for got, one in zip(jax.vmap(lambda u: vandermonde_conv(u, C, dtA))(many), many, strict=True):
        np.testing.assert_array_equal(got, vandermonde_conv(one, C, dtA))


@needs_kernels
def test_kernels_only_where_they_gain():
    def text(*values):
        return jax.jit(vandermonde_conv).lower(*values).as_text()

    assert "spyx_native" in text(*case(8, 1, 2, 128))
    assert "spyx_native" not in text(*case(8, 1, 2, 129))
    with jax.enable_x64(True):
        u, C, dtA = case(8, 1, 2, 3)
        assert "spyx_native" not in text(u.astype(np.float64), C, dtA)
    exported = jax.export.export(jax.jit(vandermonde_conv), platforms=("cpu",))(*case(8, 1, 2, 3))
    assert "spyx_native" not in exported.mlir_module()


@needs_kernels
def test_memory_holds_no_states():
    u, C, dtA = case(512, 2, 64, 100)
    program = jax.jit(jax.grad(lambda *v: vandermonde_conv(*v).sum(), (0, 1, 2))).lower(u, C, dtA).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * u.nbytes + 12 * C.nbytes


def test_non_finite_values_stay_in_their_row_and_later():
    u, C, dtA = case(20, 2, 3, 2)
    clean = vandermonde_conv(u, C, dtA)
    u[7, 1] = np.nan
    y = vandermonde_conv(u, C, dtA)
    np.testing.assert_array_equal(y[:, 0], clean[:, 0])
    assert np.isnan(y[7:, 1]).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 2), (4, 0, 3, 2), (4, 2, 0, 2), (4, 2, 3, 0)])
def test_empty(shape):
    u, C, dtA = case(*shape)
    y = vandermonde_conv(u, C, dtA)
    assert y.shape == (shape[0], shape[1], 1, shape[2])
    assert not np.any(y)


def test_errors():
    u, C, dtA = case(4, 2, 3, 2)
    with pytest.raises(ValueError, match=r"u must have shape \(T, B, H\)"):
        vandermonde_conv(u[0], C, dtA)
    with pytest.raises(ValueError, match=r"C \(c, H, n\)"):
        vandermonde_conv(u[..., :2], C, dtA)
    with pytest.raises(ValueError, match="dtA"):
        vandermonde_conv(u, C, dtA[:, :1])
    with pytest.raises(TypeError, match="u must be real"):
        vandermonde_conv(u.astype(np.complex64), C, dtA)
