"""Quadratic forms of the numbers that meet each other in a matrix product of pairs, against float64."""

import math

import numpy as np
import pytest
from numba import njit

from spyx.ops.native.tiles import DEPTH, SIDE, TILES, begin, end
from spyx.ops.native.triangles import add_triangles, pack_part, parts, size, space_for_triangles, triangles


@njit(error_model="numpy", fastmath={"contract"})
def _packed(to, w):
    H, N = w.shape[1:]
    for part in range(parts(H)):
        pack_part(to.ctypes.data, w.ctypes.data, w.strides[0] // 4, part, H, N)


@njit(error_model="numpy", fastmath={"contract"})
def _added(to, u, w, memory):
    (rows, H), N = u.shape, to.shape[1]
    begin()
    add_triangles(to.ctypes.data, u.ctypes.data, rows, w.ctypes.data, H, N, memory.ctypes.data)
    end()


def _inside(H):
    """Which h, k are pairs of one triangle."""
    part = np.arange(H) // SIDE
    return (part[:, None] == part) & (part[:, None] % 2 == 1)


def test_matrix_units_have_triangles_in_every_second_half():
    assert [triangles(H) for H in (1, SIDE, SIDE + 1, DEPTH, DEPTH + SIDE, DEPTH + SIDE + 1, 2 * DEPTH)] == (
        [0, 0, 1, 1, 1, 2, 2] if TILES else [0] * 7
    )


@pytest.mark.skipif(not TILES, reason="this processor has no matrix units")
@pytest.mark.parametrize("rows", [1, 16, 37, 64])
@pytest.mark.parametrize(("H", "N"), [(17, 1), (29, 16), (32, 5), (49, 20), (64, 33), (100, 16)])
def test_pairs_of_a_triangle_are_weighted_and_added(rows, H, N):
    rng = np.random.default_rng()
    u, w = rng.standard_normal((rows, H), np.float32), rng.standard_normal((H, H + 3, N), np.float32)[:, :H]
    to = np.full((rows + 1, N), 7, np.float32)
    matrix = np.full(size(H, N), np.nan, np.float32)
    _packed(matrix, w)
    # whatever was in the memory before
    _added(to[:rows], u, matrix, np.full(space_for_triangles(H), np.nan, np.float32))
    chosen = w.astype(float) * _inside(H)[..., None]
    exact, magnitude = (
        7 + np.einsum("rh,rk,khn->rn", v, v, m)
        for v, m in ((u.astype(float), chosen), (np.abs(u).astype(float), np.abs(chosen)))
    )
    assert np.all(np.abs(to[:rows] - exact) <= 2**-23 * math.sqrt(SIDE * SIDE) * magnitude)
    assert np.all(to[rows] == 7)


@pytest.mark.skipif(not TILES, reason="this processor has no matrix units")
def test_the_error_of_a_triangle_is_that_of_float32():
    rng = np.random.default_rng(0)
    u, w = rng.standard_normal((64, DEPTH), np.float32), rng.standard_normal((DEPTH, DEPTH, 16), np.float32)
    to, matrix = np.zeros((64, 16), np.float32), np.zeros(size(DEPTH, 16), np.float32)
    _packed(matrix, w)
    _added(to, u, matrix, np.empty(space_for_triangles(DEPTH), np.float32))
    chosen = w.astype(float) * _inside(DEPTH)[..., None]
    exact = np.einsum("rh,rk,khn->rn", u.astype(float), u.astype(float), chosen)
    assert np.linalg.norm(to - exact) <= 2e-7 * np.linalg.norm(exact)
