"""S7 for CPU, from its input to its output.

The input of the recurrence is quadratic in u = W_in x, the readout bilinear in the state s and u:
sum_h u_h (sum_k u_k B[k, h, n]) and sum_n s_n (sum_k u_k C[k, h, n]). A sum over k is a matrix product for each h or
n, whose rows are scaled and added up as they are made. A pair (h, k) is needed once: k goes from h on; some pairs are
left to `triangles`.

An item is some steps of one row of the batch: they stay in the nearest caches, and only the recurrence waits for that
of the steps before. Layouts: x, y (B, T, H); h (B, N).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import register_jitable

from .activations import sigmoid
from .custom_call import kernel
from .gelu import gelu
from .memory import LINE, add, clear, copy, floats, ints, piece, wait_for, words
from .products import HALF, LANES, add_scaled, arranged, depth, first_of, multiply, pack_block, pack_panel, space
from .recurrence import advance
from .tiles import DEPTH, SIDE, begin, end, turn
from .triangles import add_triangles, pack_part, parts, size, space_for_triangles
from .vectors import wide

_f = np.float32

# The table, after what `invoke` writes itself.
_T, _B, _H, _N, _STEPS = range(3, 8)
_SIZES = 8


@register_jitable
def _parts(count, size):
    return (count + size - 1) // size


def sizes(H: int, N: int) -> list[int]:
    """How many numbers the packed matrices have, the results behind the others."""
    quadratic = sum(depth(max(H - first_of(pair, True), 0)) for pair in range(_parts(H, 2))) * _parts(N, HALF)
    bilinear = _parts(N, 2) * depth(H) * _parts(H, HALF)
    dense = [depth(H) * _parts(columns, LANES) for columns in (H, N, H, N, H)]
    return [*(LANES * panels for panels in (quadratic, bilinear, *dense)), max(1, size(H, N))]


@register_jitable
def _packing(H: int, N: int) -> tuple[int, int, int]:
    """Items that pack matrices: of the linear maps, of the quadratic form, of the bilinear one."""
    return 3 * _parts(H, LANES) + 2 * _parts(N, LANES), _parts(H, 2) + parts(H), _parts(H, DEPTH) * _parts(H, HALF)


def items(T: int, B: int, H: int, N: int, steps: int) -> int:
    """How many items there are, of so many steps."""
    return sum(_packing(H, N)) + _parts(T, steps) * B


@njit
def _quadratic_panels(to, W, h, H, N, J):
    """Of h and h + 1: [k, n] with k from `first_of` them on."""
    first = first_of(h // 2, True)
    if first >= H:
        return
    panel = np.zeros((H - first) * LANES, np.float32)
    for column in range(0, N, HALF):
        width = min(HALF, N - column)
        for one in range(h, min(h + 2, H)):
            for k in range(max(one, first), H):
                place = panel.ctypes.data + 4 * ((k - first) * LANES + (one - h) * HALF)
                sums, given = floats(place, width), floats(W + 4 * (k * J + N + one * N + column), width)
                other = floats(W + 4 * (one * J + N + k * N + column), width)
                if k > one:
                    for n in range(width):
                        sums[n] = given[n] + other[n]
                else:
                    copy(place, W + 4 * (k * J + N + one * N + column), width)
        pack_panel(to, panel.ctypes.data, LANES, 1, H - first, LANES)
        to += 4 * depth(H - first) * LANES
    panel[0] = 0  # numba frees an array after its last use


@njit
def _bilinear_blocks(to, W, k, column, H, N, J):
    """Of every n and n + 1: the block of [k, h] from k and the column on."""
    pairs, rows, columns = _parts(N, 2), min(DEPTH, H - k), min(HALF, H - column)
    stride = 2 * pairs * HALF
    made = np.zeros(DEPTH * stride, np.float32)
    for i in range(rows):
        given = W + 4 * ((k + i) * J + N + H * N + column * N)
        for n in range(0, N, SIDE):
            to_n = made.ctypes.data + 4 * (i * stride + n * HALF)
            turn(to_n, HALF, given + 4 * n, N, columns, min(SIDE, N - n))
    for pair in range(pairs):
        panel = to + 4 * depth(H) * LANES * (pair * _parts(H, HALF) + column // HALF)
        for first in range(0, LANES, SIDE):
            there = made.ctypes.data + 4 * (pair * LANES + first)
            pack_block(panel, k, first, there, stride, 1, H - k, LANES - first)
    made[0] = 0  # as above


@njit
def _dense_panel(item, W_in, W_gate, W, packed, H, N, J):
    """A panel of the matrices, packed to the addresses `packed`, of the input, A, D, bias and gate."""
    for m in range(5):
        columns, given, stride = H, W_in if m == 0 else W_gate, H
        if m == 1 or m == 3:
            columns, given, stride = N, W + (4 * (J - N) if m == 3 else 0), J
        elif m == 2:
            given, stride = W + 4 * (J - N - H), J
        if item < _parts(columns, LANES):
            first = item * LANES
            pack_panel(packed[2 + m] + 4 * first * depth(H), given + 4 * first, stride, 1, H, columns - first)
            return
        item -= _parts(columns, LANES)


@njit
def _pack(item, W_in, W_gate, W, packed, ready, H, N):
    """Pack a part of the matrices to the addresses `packed`, and count it among the three kinds at `ready`.

    W (H, N + H N + H N + H + N) makes A, B [h, n], C [h, n], D and the bias of u.
    """
    J, (dense, pairs, _) = 2 * N + 2 * H * N + H, _packing(H, N)
    if item < dense:
        _dense_panel(item, W_in, W_gate, W, packed, H, N, J)
        add(ready, 1)
    elif item < dense + pairs:
        to, pair = packed[0], item - dense
        for before in range(min(pair, _parts(H, 2))):
            to += 4 * depth(max(H - first_of(before, True), 0)) * _parts(N, HALF) * LANES
        if pair < _parts(H, 2):
            _quadratic_panels(to, W, 2 * pair, H, N, J)
        else:
            pack_part(packed[7], W + 4 * N, J, pair - _parts(H, 2), H, N)
        add(ready + 4 * LINE, 1)
    else:
        block = item - dense - pairs
        k, column = block // _parts(H, HALF) * DEPTH, block % _parts(H, HALF) * HALF
        _bilinear_blocks(packed[1], W, k, column, H, N, J)
        add(ready + 8 * LINE, 1)


@kernel
def forward(item, buffers):
    """Operands: table, x, lengths, base of A, matrices of the input, of the gate and that makes the others, h.
    Counters: packed parts of three kinds, what each row has done. Results: y, h, packed matrices.
    """
    wide()
    at = words(buffers, 19)
    table = ints(at[0], _SIZES)
    H, N, ready = table[_H], table[_N], at[8]
    of_u, pairs, blocks = _packing(H, N)
    if item < of_u + pairs + blocks:
        _pack(item, at[4], at[5], at[6], words(buffers + 8 * 11, 8), ready, H, N)
        return
    item -= of_u + pairs + blocks
    begin()
    T, B = table[_T], table[_B]
    number, row = item // B, item % B
    first = number * table[_STEPS]
    steps = min(table[_STEPS], T - first)
    valid = min(max(ints(at[2], row + 1)[row] - first, 0), steps)
    numbers = steps * (2 * N + 3 * H) + max(N, H) + space(steps, H) + space_for_triangles(H)
    memory = np.empty(numbers + 8 * LINE, np.float32)
    u, free = piece(memory.ctypes.data, steps * H)
    sums, free = piece(free, steps * N)
    a, free = piece(free, steps * N)
    ys, free = piece(free, steps * H)
    gates, free = piece(free, steps * H)
    nothing, free = piece(free, max(N, H))
    side, free = piece(free, space(steps, H))
    clear(nothing, max(N, H))
    wait_for(ready, of_u)
    x, y = at[1] + 4 * (row * T + first) * H, at[9] + 4 * (row * T + first) * H
    multiply(u, H, arranged(side, x, H, 1, steps, H), steps, at[13], H, H, nothing)
    rows = arranged(side, u, H, 1, steps, H)
    multiply(a, N, rows, steps, at[14], H, N, at[3])
    multiply(ys, H, rows, steps, at[15], H, H, nothing)
    multiply(sums, N, rows, steps, at[16], H, N, nothing)
    decays, rest, inputs = floats(a, steps * N), floats(ys, steps * H), floats(u, steps * H)
    for i in range(steps * N):
        decays[i] = _f(1) - _f(1) / (decays[i] * decays[i] + _f(0.5))
    for i in range(steps * H):
        rest[i] *= inputs[i]
    wait_for(ready + 4 * LINE, pairs)
    add_scaled(sums, N, u, H, rows, steps, at[11], H, True, H, N)
    add_triangles(sums, u, steps, at[18], H, N, free)

    done, state = ready + 4 * LINE * (3 + row), at[10] + 4 * row * N
    wait_for(done, number)
    if number == 0:
        copy(state, at[7] + 4 * row * N, N)
    advance(sums, N, state, a, N, N, valid, False)
    add(done, 1)
    clear(sums + 4 * valid * N, (steps - valid) * N)

    wait_for(ready + 8 * LINE, blocks)
    add_scaled(ys, H, sums, N, rows, steps, at[12], N, False, H, H)
    drives = floats(gates, steps * H)
    for i in range(steps * H):
        drives[i] = gelu(rest[i])
    multiply(u, H, arranged(side, gates, H, 1, steps, H), steps, at[17], H, H, nothing)
    end()
    out, given = floats(y, steps * H), floats(x, steps * H)
    for i in range(steps * H):
        out[i] = given[i] + sigmoid(inputs[i]) * rest[i]
    memory[0] = 0  # as above
