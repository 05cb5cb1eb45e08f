"""What the kernels of whole layers are made of: products of a few rows, convolution, activation, against float64."""

import importlib
import math
import pkgutil

import jax
import numpy as np
import pytest
from numba import njit

from spyx.ops import native
from spyx.ops.native.depthwise import convolve
from spyx.ops.native.gelu import gelu
from spyx.ops.native.products import LANES, ROWS, Turned, add_product, add_scaled, lanes_of, multiply, packed
from spyx.ops.native.vectors import WIDTH, wide


@njit(error_model="numpy", fastmath={"contract"})
def product(to, x, w, columns, bias):
    rows, inner = x.shape
    multiply(
        to.ctypes.data, to.strides[0] // 4, x.ctypes.data, x.strides[0] // 4, rows, w.ctypes.data, inner, columns,
        bias.ctypes.data,
    )  # fmt: skip


@njit(error_model="numpy", fastmath={"contract"})
def added(to, x, w, columns):
    rows, inner = x.shape
    stride, step = x.strides[0] // 4, x.strides[1] // 4
    add_product(to.ctypes.data, to.strides[0] // 4, x.ctypes.data, stride, step, rows, w.ctypes.data, inner, columns)


@njit(error_model="numpy", fastmath={"contract"})
def added_scaled(to, scale, x, w, columns):
    (rows, inner), a = x.shape, (to.strides[0] // 4, scale.strides[0] // 4, x.strides[0] // 4)
    add_scaled(
        to.ctypes.data, a[0], scale.ctypes.data, a[1], x.ctypes.data, a[2], rows, w.ctypes.data, inner, columns
    )  # fmt: skip


@njit(error_model="numpy", fastmath={"contract"})
def convolved(to, rows, taps, bias):
    (steps, D), K = to.shape, len(taps)
    convolve(to.ctypes.data, rows.ctypes.data, taps.ctypes.data, bias.ctypes.data, steps, D, K)


@njit(error_model="numpy", fastmath={"contract"})
def activated(to, x):
    wide()
    for p in range(len(x)):
        to[p] = gelu(x[p])


SIZES = [
    (1, 1, 1), (ROWS, 5, LANES), (ROWS + 1, 3, LANES + 1), (2 * ROWS - 1, 67, 3 * LANES - 1), (5, 0, 7),
    (2 * ROWS + 1, 9, LANES // 2), (4 * ROWS, 20, LANES + LANES // 2), (3, 4, LANES // 2 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_products_write_their_rows_and_nothing_else(rows, inner, columns):
    rng = np.random.default_rng()
    x, w = rng.standard_normal((rows, inner + 3), np.float32), rng.standard_normal((inner, columns), np.float32)
    bias = rng.standard_normal(columns, np.float32)
    matrix = np.asarray(packed(w)[0]) if inner else np.zeros((1, 1, LANES), np.float32)
    exact = x[:, :inner].astype(float) @ w.astype(float)
    size = np.abs(x[:, :inner]).astype(float) @ np.abs(w)

    def check(to, exact, size):
        assert np.all(np.abs(to[:rows, :columns] - exact) <= 2**-23 * math.sqrt(inner + 1) * size)
        assert np.all(to[rows] == 7)
        assert np.all(to[:, columns:] == 7)

    to = np.full((rows + 1, columns + 4), 7, np.float32)
    product(to[:, :columns], x[:rows, :inner], matrix, columns, bias)
    check(to, exact + bias, size + np.abs(bias))
    for given in (x[:rows, :inner], np.ascontiguousarray(x[:rows, :inner].T).T):
        to = np.full((rows + 1, columns + 4), 7, np.float32)
        added(to[:, :columns], given, matrix, columns)
        check(to, exact + 7, size + 7)


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_rows_of_a_product_are_scaled_and_added(rows, inner, columns):
    rng = np.random.default_rng()
    x, w = rng.standard_normal((rows, inner + 3), np.float32)[:, :inner], rng.standard_normal((inner, columns), "f4")
    scale, lanes = rng.standard_normal((rows, 2), np.float32)[:, :1], lanes_of(columns)
    whole = np.pad(w, ((0, 0), (0, -columns % lanes)))
    matrix = np.ascontiguousarray(whole.reshape(inner, whole.shape[1] // lanes, lanes).transpose(1, 0, 2))
    to = np.full((rows + 1, columns + 4), 7, np.float32)
    added_scaled(to[:, :columns], scale, x, matrix, columns)
    exact = 7 + scale * (x.astype(float) @ w)
    size = 7 + np.abs(scale) * (np.abs(x).astype(float) @ np.abs(w))
    assert np.all(np.abs(to[:rows, :columns] - exact) <= 2**-23 * math.sqrt(inner + 2) * size)
    assert np.all(to[rows] == 7)
    assert np.all(to[:, columns:] == 7)


@pytest.mark.parametrize("K", [1, 3, 4, 5])
@pytest.mark.parametrize("D", [1, WIDTH - 1, WIDTH, 2 * WIDTH + 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_a_convolution_of_rows(steps, D, K):
    rng = np.random.default_rng()
    rows, taps = rng.standard_normal((K + steps, D), np.float32), rng.standard_normal((K, D), np.float32)
    bias = rng.standard_normal(D, np.float32)
    to = np.full((steps + 1, D), 7, np.float32)
    convolved(to[:steps], rows, taps, bias)
    exact = bias + sum(taps[k].astype(float) * rows[1 + k : 1 + k + steps] for k in range(K))
    np.testing.assert_allclose(to[:steps], exact, atol=1e-5)
    assert np.all(to[steps] == 7)


def test_matrices_are_packed_in_one_call():
    rng = np.random.default_rng()
    shapes = (3, LANES), (37, 2 * LANES + 5), (1, 1), (LANES, 18)
    matrices = [rng.standard_normal(shape, np.float32) for shape in shapes]
    for given in (matrices, [Turned(m.T.copy()) for m in matrices]):
        for result, matrix in zip(jax.jit(lambda given: packed(*given))(given), matrices, strict=True):
            panels = -(-matrix.shape[1] // LANES)
            whole = np.pad(matrix, ((0, 0), (0, panels * LANES - matrix.shape[1])))
            np.testing.assert_array_equal(result, whole.reshape(len(matrix), panels, LANES).transpose(1, 0, 2))


def test_the_activation_is_exact_in_both_tails():
    x = np.concatenate([np.linspace(-12, 12, 4001), np.geomspace(1e-30, 1e30, 61), [0, np.nan]]).astype(np.float32)
    y = np.empty_like(x)
    activated(y, x)
    exact = np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
    # the second term is the rounding of x^2
    limit = np.abs(exact) * (5e-7 + 1.2e-7 * x.astype(float) ** 2)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    assert np.all(np.isnan(x) | (np.abs(y - exact) <= np.where(np.abs(x) < 13, limit, 5e-7 * np.abs(exact) + 1e-7)))
    with jax.enable_x64(True):
        close = np.asarray(jax.nn.gelu(x.astype(float), approximate=False))
    np.testing.assert_allclose(exact[~np.isnan(x)], close[~np.isnan(x)], atol=1e-12)


def test_loops_use_the_registers_that_vectors_use():
    one = np.ones(1, np.float32)
    activated(np.empty_like(one), one)
    product(np.empty((1, 1), np.float32), one[None], np.ones((1, 1, LANES), np.float32), 1, one)
    of_vectors, of_loops = ("".join(f.inspect_asm().values()) for f in (product, activated))
    assert "zmm" not in of_vectors or of_loops.count("zmm") > 4 * of_loops.count("ymm")
    assert "prefer-vector-width" in "".join(activated.inspect_llvm().values())


def test_no_two_kernels_have_the_same_number():
    for module in pkgutil.iter_modules(native.__path__):
        importlib.import_module(f"{native.__name__}.{module.name}")
