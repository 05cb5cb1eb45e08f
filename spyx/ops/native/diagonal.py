"""A diagonal state-space layer for CPU, from its inputs to its outputs and back.

h_t = A_t h_{t-1} + W u_t, y_t = V h_t + D u_t. An item is some steps of one row of the batch: they stay in the nearest
caches, and only their recurrence waits for that of the steps before. Layouts: u (T, B, H) and y (T, B, K), or
(B, T, .); states are rows of S = P N numbers, for complex ones (P = 2) N real parts before N imaginary ones; W (H, S),
V (R, K) of the first R of them; A (N, P) or (T, B, N, P). Matrices are packed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .custom_call import kernel
from .memory import LINE, add, clear, copy, flags, floats, ints, piece, wait_for, words
from .products import LANES, add_product, arranged, depth, multiply, pack_matrix, space
from .recurrence import advance, retreat
from .tiles import begin, end

# The table, after what `invoke` writes itself.
_T, _B, _H, _K, _N, _R, _COMPLEX, _VARYING, _D_AXES, _REVERSE = range(3, 13)
_VALID_ROWS, _RESET_ROWS, _STEPS, _ROWS_APART, _STEPS_APART, _SUMS = range(13, 19)
SIZES = 19


@njit
def _place(item, table, backward):
    """(number of the item in its row, row, which steps, the first, how many); items come as their recurrences do."""
    T, most, number = table[_T], table[_STEPS], item // table[_B]
    place = number if backward == (table[_REVERSE] != 0) else (T + most - 1) // most - 1 - number
    return number, item % table[_B], place, place * most, min(most, T - place * most)


@njit
def _is_set(mask, rows, t, row):
    return rows > 0 and mask[t * rows + (row if rows > 1 else 0)] != 0


@njit
def _is_padding(valid, rows, t, row):
    return rows > 0 and not _is_set(valid, rows, t, row)


@njit
def _alike(t, sign, most, row, table, valid, reset):
    """How many steps from t on, at most `most`, are as t is: neither padding nor a reset."""
    steps = 1
    if table[_VALID_ROWS] == 0 and table[_RESET_ROWS] == 0:
        return most
    while steps < most and not (
        _is_padding(valid, table[_VALID_ROWS], t + sign * steps, row)
        or _is_set(reset, table[_RESET_ROWS], t + sign * steps, row)
    ):
        steps += 1
    return steps


@njit
def _recur(states, state, A, first, steps, row, table, valid, reset):
    """The recurrence through the steps from `first` on, in place of its inputs at the address `states`."""
    B, N, is_complex = table[_B], table[_N], table[_COMPLEX]
    S = len(state)
    pitch = S + LINE
    sign, t = (-1, first + steps - 1) if table[_REVERSE] else (1, first)
    while steps > 0:
        here, run = states + 4 * (t - first) * pitch, 1
        if _is_padding(valid, table[_VALID_ROWS], t, row):
            copy(here, state.ctypes.data, S)
        else:
            if _is_set(reset, table[_RESET_ROWS], t, row):
                clear(state.ctypes.data, S)
            run = _alike(t, sign, steps, row, table, valid, reset)
            a, apart = (A + 4 * (t * B + row) * S, sign * B * S) if table[_VARYING] else (A, 0)
            advance(here, sign * pitch, state.ctypes.data, a, apart, N, run, is_complex)
        t, steps = t + sign * run, steps - run


@njit
def _recur_back(cotangents, carry, slopes, states, A, first, steps, row, table, valid, reset):
    """The transpose of `_recur`, in place of the cotangents of the states; those of A are added to `slopes`."""
    N, is_complex = table[_N], table[_COMPLEX]
    S = len(carry)
    pitch = S + LINE
    sign, t = (1, first) if table[_REVERSE] else (-1, first + steps - 1)
    while steps > 0:
        here, run = cotangents + 4 * (t - first) * pitch, 1
        if _is_padding(valid, table[_VALID_ROWS], t, row):
            clear(here, S)
        elif _is_set(reset, table[_RESET_ROWS], t, row):
            given = floats(here, S)
            for s in range(S):
                given[s] += carry[s]
                carry[s] = 0
        else:
            run = _alike(t, sign, steps, row, table, valid, reset)
            before = states + 4 * (t - first + sign) * pitch
            retreat(here, sign * pitch, carry.ctypes.data, slopes.ctypes.data, before, A, N, run, is_complex)
        t, steps = t + sign * run, steps - run


@njit
def _clean(to, rows, stride, first, steps, row, columns, table, valid):
    """Copy steps, 0 for padding."""
    for j in range(steps):
        if _is_padding(valid, table[_VALID_ROWS], first + j, row):
            clear(to + 4 * j * columns, columns)
        else:
            copy(to + 4 * j * columns, rows + 4 * j * stride, columns)


@kernel
def forward(item, buffers):
    """Operands: table, u, A, W, V, D or its transpose, h, valid, reset. Counters: what each row has done.
    Results: y, the last h, h before every item (., B, S).
    """
    begin()
    at = words(buffers, 13)
    table = ints(at[0], SIZES)
    T, B, H, K = table[_T], table[_B], table[_H], table[_K]
    S = table[_N] * (2 if table[_COMPLEX] else 1)
    number, row, place, first, steps = _place(item, table, False)
    valid, reset = flags(at[7], T * table[_VALID_ROWS]), flags(at[8], T * table[_RESET_ROWS])
    pitch = S + LINE
    numbers = steps * pitch + S + max(S, K) + space(steps, H) + space(steps, table[_R])
    memory = np.empty(numbers + 8 * LINE, np.float32)
    states, free = piece(memory.ctypes.data, steps * pitch)
    h, free = piece(free, S)
    zero, free = piece(free, max(S, K))
    side, free = piece(free, space(steps, H))
    state, other = floats(h, S), piece(free, 0)[0]
    clear(zero, max(S, K))
    here, apart = row * table[_ROWS_APART] + first * table[_STEPS_APART], table[_STEPS_APART]
    u, y, shared = at[1] + 4 * here * H, at[10] + 4 * here * K, at[11] + 4 * row * S
    inputs = arranged(side, u, apart * H, 1, steps, H)
    multiply(states, pitch, inputs, steps, at[3], H, S, zero)

    wait_for(at[9] + 4 * LINE * row, number)
    copy(h, shared if number else at[6] + 4 * row * S, S)
    copy(at[12] + 4 * (place * B + row) * S, h, S)
    _recur(states, state, at[2], first, steps, row, table, valid, reset)
    copy(shared, h, S)
    add(at[9] + 4 * LINE * row, 1)

    rows = arranged(other, states, pitch, 1, steps, table[_R])
    multiply(y, apart * K, rows, steps, at[4], table[_R], K, zero)
    if table[_D_AXES] == 2:
        add_product(y, apart * K, inputs, steps, at[5], H, K)
    D = floats(at[5], K)
    for j in range(steps):
        if _is_padding(valid, table[_VALID_ROWS], first + j, row):
            clear(y + 4 * j * apart * K, K)
        elif table[_D_AXES] == 1:
            out, given = floats(y + 4 * j * apart * K, K), floats(u + 4 * j * apart * H, H)
            for p in range(K):
                out[p] += D[p] * given[p]
    end()
    memory[0] = 0  # numba frees an array after its last use


@kernel
def adjoint(item, buffers):
    """Operands: table, u, A (N, P), W, its transpose, that of V, D, h before every item, valid, reset, dy, dh of the
    last step. Counters: what each row has done, how many items each sum has.

    Results: du, dh0, and SUMS sums, each of every SUMS-th item: of dA (S), dW (S, H), dV (R, K), dD.
    """
    begin()
    at = words(buffers, 19)
    table = ints(at[0], SIZES)
    T, B, H, K, R = table[_T], table[_B], table[_H], table[_K], table[_R]
    S = table[_N] * (2 if table[_COMPLEX] else 1)
    pitch = S + LINE
    number, row, place, first, steps = _place(item, table, True)
    valid, reset = flags(at[8], T * table[_VALID_ROWS]), flags(at[9], T * table[_RESET_ROWS])
    wide, most = -(-max(H, K) // LANES) * LANES, max(S, H, K)
    numbers = steps * (H + K + 2 * pitch) + pitch + 3 * S + max(S, H) + depth(steps) * wide
    memory = np.empty(numbers + max(space(steps, most), space(most, steps)) + 16 * LINE, np.float32)
    us, free = piece(memory.ctypes.data, steps * H)
    dys, free = piece(free, steps * K)
    # a step more: the state before the first one
    all_states, free = piece(free, (steps + 1) * pitch)
    cotangents, free = piece(free, steps * pitch)
    h, free = piece(free, S)
    g, free = piece(free, S)
    s, free = piece(free, S)
    zero, free = piece(free, max(S, H))
    packed, free = piece(free, depth(steps) * wide)
    side = piece(free, 0)[0]
    clear(zero, max(S, H))
    clear(s, S)
    states = all_states + (0 if table[_REVERSE] else 4 * pitch)
    state, carry, slopes = floats(h, S), floats(g, S), floats(s, S)
    here, apart = row * table[_ROWS_APART] + first * table[_STEPS_APART], table[_STEPS_APART]
    _clean(us, at[1] + 4 * here * H, apart * H, first, steps, row, H, table, valid)
    _clean(dys, at[10] + 4 * here * K, apart * K, first, steps, row, K, table, valid)

    copy(h, at[7] + 4 * (place * B + row) * S, S)
    copy(all_states + (4 * steps * pitch if table[_REVERSE] else 0), h, S)
    multiply(states, pitch, arranged(side, us, H, 1, steps, H), steps, at[3], H, S, zero)
    _recur(states, state, at[2], first, steps, row, table, valid, reset)
    for j in range(steps):
        clear(cotangents + 4 * (j * pitch + R), S - R)
    multiply(cotangents, pitch, arranged(side, dys, K, 1, steps, K), steps, at[5], K, R, zero)

    shared = at[14] + 4 * row * S
    wait_for(at[12] + 4 * LINE * row, number)
    copy(g, shared if number else at[11] + 4 * row * S, S)
    _recur_back(cotangents, carry, slopes, states, at[2], first, steps, row, table, valid, reset)
    copy(shared, g, S)
    add(at[12] + 4 * LINE * row, 1)

    du = at[13] + 4 * here * H
    multiply(du, apart * H, arranged(side, cotangents, pitch, 1, steps, S), steps, at[4], S, H, zero)
    if table[_D_AXES] == 2:
        add_product(du, apart * H, arranged(side, dys, K, 1, steps, K), steps, at[6], K, H)
    elif table[_D_AXES] == 1:
        D = floats(at[6], H)
        for j in range(steps):
            out, given = floats(du + 4 * j * apart * H, H), floats(dys + 4 * j * H, H)
            for p in range(H):
                out[p] += D[p] * given[p]

    # sums are added to in the order of items, whichever thread comes first
    which, many = item % table[_SUMS], K * H if table[_D_AXES] == 2 else H * table[_D_AXES]
    added = at[12] + 4 * LINE * (B + which)
    of_A, of_W, of_V = at[15] + 4 * which * S, at[16] + 4 * which * S * H, at[17] + 4 * which * R * K
    of_D, total = at[18] + 4 * which * many, floats(of_A, S)
    wait_for(added, item // table[_SUMS])
    if item == which:
        clear(of_A, S)
        clear(of_W, S * H)
        clear(of_V, R * K)
        clear(of_D, many)
    for p in range(S):
        total[p] += slopes[p]
    pack_matrix(packed, us, H, steps, H)
    add_product(of_W, H, arranged(side, cotangents, 1, pitch, S, steps), S, packed, steps, H)
    if table[_D_AXES] == 2:
        add_product(of_D, H, arranged(side, dys, 1, K, K, steps), K, packed, steps, H)
    elif table[_D_AXES] == 1:
        through = floats(of_D, H)
        for j in range(steps):
            u, dy = floats(us + 4 * j * H, H), floats(dys + 4 * j * H, H)
            for p in range(H):
                through[p] += u[p] * dy[p]
    pack_matrix(packed, dys, K, steps, K)
    add_product(of_V, K, arranged(side, states, 1, pitch, R, steps), R, packed, steps, K)
    add(added, 1)
    end()
    memory[0] = 0  # as above
