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
from spyx.ops.native.products import (
    BLOCK,
    HALF,
    LANES,
    ROWS,
    Turned,
    add_product,
    add_scaled,
    arranged,
    behind,
    depth,
    first_of,
    multiply,
    pack_matrix,
    packed,
    space,
)
from spyx.ops.native.tiles import begin, end
from spyx.ops.native.vectors import WIDTH, wide


@njit
def rows_of(memory, x):
    (rows, inner), stride, step = x.shape, x.strides[0] // 4, x.strides[1] // 4
    return arranged(memory.ctypes.data, x.ctypes.data, stride, step, rows, inner)


@njit(error_model="numpy", fastmath={"contract"})
def _product(memory, to, x, w, columns, bias):
    begin()
    rows, inner = x.shape
    x = rows_of(memory, x)
    multiply(to.ctypes.data, to.strides[0] // 4, x, rows, w.ctypes.data, inner, columns, bias.ctypes.data)
    end()


@njit(error_model="numpy", fastmath={"contract"})
def _added(memory, to, x, w, columns, skip):
    begin()
    rows, inner = x.shape
    x = behind(rows_of(memory, x), skip)
    add_product(to.ctypes.data, to.strides[0] // 4, x, rows, w.ctypes.data, inner - skip, columns)
    end()


@njit(error_model="numpy", fastmath={"contract"})
def _added_scaled(memory, to, scale, x, w, rising, columns):
    begin()
    (rows, inner), a, count = x.shape, (to.strides[0] // 4, scale.strides[0] // 4), scale.shape[1]
    x = rows_of(memory, x)
    of, w = scale.ctypes.data, w.ctypes.data
    add_scaled(to.ctypes.data, a[0], of, a[1], x, rows, w, count, rising, inner, columns)
    end()


def product(to, x, w, columns, bias):
    _product(np.empty(space(*x.shape), np.float32), to, x, w, columns, bias)


def added(to, x, w, columns, skip=0):
    _added(np.empty(space(*x.shape), np.float32), to, x, w, columns, skip)


@njit(error_model="numpy", fastmath={"contract"})
def pack(to, w):
    (inner, columns), stride = w.shape, w.strides[0] // 4
    pack_matrix(to.ctypes.data, w.ctypes.data, stride, inner, columns)


def in_panels(w):
    """A matrix as products take it, packed by compiled code."""
    inner, columns = w.shape
    matrix = np.zeros((-(-columns // LANES), depth(inner), LANES), np.float32)
    pack(matrix, w)
    return matrix


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
    (1, 1, 1), (ROWS, 5, LANES), (ROWS // 2, 33, LANES // 2), (ROWS // 2 + 1, 65, LANES), (3 * ROWS, 300, 2 * LANES),
    (ROWS + 1, 3, LANES + 1), (2 * ROWS - 1, 67, 3 * LANES - 1), (5, 0, 7), (2 * ROWS + 1, 9, LANES // 2),
    (4 * ROWS, 20, LANES + LANES // 2), (3, 4, LANES // 2 - 1),
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


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_of_products_are_scaled_and_added(rows, inner, columns, count, rising):
    rng = np.random.default_rng()
    count = min(count, inner) if rising else count
    x, w = (
        rng.standard_normal((rows, inner + 3), np.float32)[:, :inner],
        rng.standard_normal((count, inner, columns), "f4"),
    )
    scale = rng.standard_normal((rows, count + 2), np.float32)[:, :count]
    panels = []
    for g in range(0, count, 2):
        if rising:
            w[g, :g], w[g + 1 : g + 2, : g + 1], w[g : g + 2, : first_of(g // 2, rising)] = 0, 0, 0
        for column in range(0, columns, HALF):
            panel = np.zeros((max(inner - first_of(g // 2, rising), 0), LANES), np.float32)
            for k in range(g, min(g + 2, count)):
                part = w[k, first_of(g // 2, rising) :, column : column + HALF]
                panel[:, (k - g) * HALF : (k - g) * HALF + part.shape[1]] = part
            panels.append(in_panels(panel).ravel())
    to = np.full((rows + 1, columns + 4), 7, np.float32)
    matrices = np.concatenate([*panels, np.zeros(1, np.float32)])
    _added_scaled(np.empty(space(rows, inner), np.float32), to[:, :columns], scale, x, matrices, rising, columns)
    exact = 7 + np.einsum("rg,rk,gkc->rc", *(v.astype(float) for v in (scale, x, w)))
    size = 7 + np.einsum("rg,rk,gkc->rc", *(np.abs(v).astype(float) for v in (scale, x, w)))
    assert np.all(np.abs(to[:rows, :columns] - exact) <= 2**-23 * math.sqrt(inner + count) * size)
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
    shapes = (3, LANES), (37, 2 * LANES + 5), (1, 1), (LANES, 18), (2 * LANES + 7, LANES - 3)
    matrices = [rng.standard_normal(shape, np.float32) for shape in shapes]
    x = [rng.standard_normal((5, len(m)), np.float32) for m in matrices]
    for given in (matrices, [Turned(m.T.copy()) for m in matrices]):
        for result, matrix, rows in zip(jax.jit(lambda given: packed(*given))(given), matrices, x, strict=True):
            to, zero = np.empty((5, matrix.shape[1]), np.float32), np.zeros(matrix.shape[1], np.float32)
            product(to, rows, np.asarray(result), matrix.shape[1], zero)
            np.testing.assert_allclose(to, rows.astype(float) @ matrix, atol=2e-5)


@pytest.mark.parametrize("skip", [0, BLOCK, 2 * BLOCK])
def test_rows_without_their_first_numbers(skip):
    rng = np.random.default_rng()
    x, w = rng.standard_normal((7, 67), np.float32), rng.standard_normal((67, 5), np.float32)
    to = np.zeros((7, 5), np.float32)
    added(to, x, in_panels(w[skip:]), 5, skip)
    np.testing.assert_allclose(to, x[:, skip:].astype(float) @ w[skip:], atol=2e-5)


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.uint32(0xFFFFFFFF).view(np.float32)])
def test_what_is_not_finite_stays_in_its_row_and_its_column(value):
    rng = np.random.default_rng()
    x, w = rng.standard_normal((ROWS + 3, 40), np.float32), rng.standard_normal((40, LANES + 3), np.float32)
    exact, zero = x.astype(float) @ w, np.zeros(LANES + 3, np.float32)
    x[3, 39] = w[5, 7] = value
    to = np.empty((len(x), LANES + 3), np.float32)
    product(to, x, in_panels(w), LANES + 3, zero)
    bad = np.zeros(to.shape, bool)
    bad[3], bad[:, 7] = True, True
    np.testing.assert_array_equal(~np.isfinite(to), bad)
    np.testing.assert_allclose(to[~bad], exact[~bad], atol=2e-5)


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
    of_vectors, of_loops = ("".join(f.inspect_asm().values()) for f in (_product, activated))
    assert "zmm" not in of_vectors or of_loops.count("zmm") > 4 * of_loops.count("ymm")
    assert "prefer-vector-width" in "".join(activated.inspect_llvm().values())


def test_no_two_kernels_have_the_same_number():
    for module in pkgutil.iter_modules(native.__path__):
        importlib.import_module(f"{native.__name__}.{module.name}")
