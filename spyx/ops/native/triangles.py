"""Quadratic forms of a few numbers of each row, for other kernels: sum over h <= k of u_h u_k W[h, k, n].

Of a product of rows with such a matrix W of one h, scaled by u_h, matrix units would waste half the work: they take
`DEPTH` of the k at a time. So the h of every second `SIDE` numbers meet each other here: the u_h u_k are multiplied by
a packed matrix. The pairs (h, h + d), modulo `SIDE`, of one d lie side by side, a group; those of the distance
`SIDE` / 2 are found twice on the way around.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import register_jitable

from .memory import LINE, clear, copy, floats, piece
from .products import LANES, depth, pack_panel
from .tiles import DEPTH, GROUPS, SIDE, TILE, TILES, add_pairs, doubled

_ROWS = 4 * SIDE


@register_jitable
def triangles(H):
    """How many parts of a row there are with a form of their own."""
    return (H + SIDE - 1) // DEPTH if TILES else 0


@register_jitable
def parts(H):
    """How many parts of the matrix `pack_part` packs, each by itself."""
    return (triangles(H) * GROUPS + 1) // 2


@register_jitable
def size(H, N):
    """The packed matrix, in float32."""
    return (N + LANES - 1) // LANES * LANES * depth(parts(H) * DEPTH)


@register_jitable
def space_for_triangles(H):
    """Memory for `add_triangles`, in float32."""
    return _ROWS * (2 * SIDE * triangles(H) + SIDE) + 2 * _ROWS * depth(DEPTH) + 4 * LINE if TILES else 0


@njit
def pack_part(to, W, stride, part, H, N):
    """Pack a part of the matrix of a form sum_hk u_h u_k W[k, h, n]: the (H, N) of k lie `stride` numbers apart."""
    made = np.zeros(DEPTH * N, np.float32)
    for p in range(DEPTH):
        group, i = 2 * part + p // SIDE, p % SIDE
        d, first = group % GROUPS, group // GROUPS * DEPTH + SIDE
        h, k = first + i, first + (i + d) % SIDE
        if max(h, k) < H and (2 * d < SIDE or i < SIDE // 2):
            row = made.ctypes.data + 4 * p * N
            copy(row, W + 4 * (k * stride + h * N), N)
            if d > 0:
                sums, other = floats(row, N), floats(W + 4 * (h * stride + k * N), N)
                for n in range(N):
                    sums[n] += other[n]
    for column in range(0, N, LANES):
        panel = to + 4 * (column * depth(parts(H) * DEPTH) + depth(part * DEPTH) * LANES)
        pack_panel(panel, made.ctypes.data + 4 * column, N, 1, DEPTH, N - column)
    made[0] = 0  # numba frees an array after its last use


@njit
def add_triangles(to, u, rows, w, H, N, memory):
    """Add the forms of up to 64 rows u (rows, H) to the rows (rows, N) at `to`.

    `memory` is the address of memory for `space_for_triangles(H)`.
    """
    if triangles(H) == 0:
        return
    length, last = 2 * SIDE * triangles(H), triangles(H) * GROUPS - 1
    us, free = piece(memory, _ROWS * length)
    made, free = piece(free, _ROWS * SIDE)
    pairs = piece(free, 0)[0]
    for part in range(triangles(H)):
        first = part * DEPTH + SIDE
        doubled(us + 4 * 2 * SIDE * part, length, u + 4 * first, H, rows, H - first)
    for column in range(0, N, SIDE):
        panel = w + 4 * (column // LANES * LANES * depth(parts(H) * DEPTH)) + column % LANES // SIDE * TILE
        width = min(SIDE, N - column)
        if rows == _ROWS and width == SIDE:
            add_pairs(to + 4 * column, N, pairs, us, length, last, panel, parts(H))
        else:
            clear(made, _ROWS * SIDE)
            add_pairs(made, SIDE, pairs, us, length, last, panel, parts(H))
            for j in range(rows):
                sums, found = floats(to + 4 * (j * N + column), width), floats(made + 4 * j * SIDE, width)
                for n in range(width):
                    sums[n] += found[n]
