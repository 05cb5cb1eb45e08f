"""The selective scan of `spyx.ops.selective` for CPU: forward and backward, float32, real A, discretization "mamba".

An item is one row e of E = B * G and `WIDTH` of its P channels (backward: a part of them, `WIDTH` at a time);
the state of so many channels stays in the cache nearest to the core. Arrays are flat; layouts as in
`spyx.ops._selective_step`: u, dt, z, y (T, E P), b, c (T, E N), A (N, P) or (E, N, P), states (E, N, P), the states
before each chunk of K steps (T / K, E, N, P), D and dt_bias (G P), valid (T, B), reset (T, E) or (T, 1). What is absent
is one element that is never read; the table of sizes says so.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2, sigmoid, softplus
from .custom_call import kernel
from .memory import flags, floats, ints, prefetch, words

WIDTH = 64
_AHEAD = 4
"""Steps between asking for a row and reading it: rows lie too far apart for the hardware to guess."""
_one = np.float32(1)

# The table, after the kernel's number and the number of items.
_T, _E, _P, _N, _K, _G, _PARTS, _A_ROWS, _REVERSE, _SOFTPLUS = range(2, 12)
_HAS_D, _HAS_BIAS, _HAS_Z, _VALID_ROWS, _RESET_ROWS = range(12, 17)
_SIZES = 17


@njit
def _load(row, address, start, width):
    """`width` elements from `start` of the array at an address, into the beginning of a local row."""
    source = floats(address + 4 * start, width)
    for p in range(width):
        row[p] = source[p]


@njit
def _store(address, start, row, width):
    target = floats(address + 4 * start, width)
    for p in range(width):
        target[p] = row[p]


@njit
def _ask_ahead(address, start, table, width):
    """Prefetch what lies `_AHEAD` steps further in scan direction."""
    steps = -_AHEAD if table[_REVERSE] else _AHEAD
    prefetch(address + 4 * (start + steps * table[_E] * table[_P]), width)


@njit
def _ask_behind(address, start, table, width):
    steps = _AHEAD if table[_REVERSE] else -_AHEAD
    prefetch(address + 4 * (start + steps * table[_E] * table[_P]), width)


@njit(fastmath={"reassoc", "contract"})
def _dot(x, y):
    total = np.float32(0)
    for p in range(WIDTH):
        total += x[p] * y[p]
    return total


@njit
def _skipped(table, valid, t, e):
    rows = table[_VALID_ROWS]
    return rows > 0 and valid[t * rows + e // table[_G]] == 0


@njit
def _cleared(table, reset, t, e):
    rows = table[_RESET_ROWS]
    return rows > 0 and reset[t * rows + e % rows] != 0


@kernel
def forward(item, buffers):
    """Operands: table, u, dt, b, c, z, A, D, dt_bias, valid, reset, h0. Results: y, last state, starts."""
    at = words(buffers, 15)
    table = ints(at[0], _SIZES)
    T, E, P, N, K, group = table[_T], table[_E], table[_P], table[_N], table[_K], table[_G]
    blocks = (P + WIDTH - 1) // WIDTH
    e, first = item // blocks, item % blocks * WIDTH
    width = min(WIDTH, P - first)
    valid, reset = flags(at[9], T * table[_VALID_ROWS]), flags(at[10], T * table[_RESET_ROWS])

    h, a = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
    local = np.zeros((6, WIDTH), np.float32)
    u, dt, drive, y, D, bias = local[0], local[1], local[2], local[3], local[4], local[5]
    row_of_A = e if table[_A_ROWS] > 1 else 0
    for n in range(N):
        _load(h[n], at[11], (e * N + n) * P + first, width)
        _load(a[n], at[6], (row_of_A * N + n) * P + first, width)
        for p in range(WIDTH):
            a[n, p] *= LOG2_E
    if table[_HAS_D]:
        _load(D, at[7], e % group * P + first, width)
    if table[_HAS_BIAS]:
        _load(bias, at[8], e % group * P + first, width)

    for i in range(T):
        t = T - 1 - i if table[_REVERSE] else i
        here = (t * E + e) * P + first
        if i % K == 0:
            for n in range(N):
                _store(at[14], ((t // K * E + e) * N + n) * P + first, h[n], width)
        if _skipped(table, valid, t, e):
            y[:] = 0
            _store(at[12], here, y, width)
            continue
        if _cleared(table, reset, t, e):
            h[:] = 0
        for k in (1, 2, 12):
            _ask_ahead(at[k], here, table, width)
        if table[_HAS_Z]:
            _ask_ahead(at[5], here, table, width)
        _load(u, at[1], here, width)
        _load(dt, at[2], here, width)
        for p in range(WIDTH):
            dt[p] += bias[p]
        if table[_SOFTPLUS]:
            for p in range(WIDTH):
                dt[p] = softplus(dt[p])
        for p in range(WIDTH):
            drive[p] = dt[p] * u[p]
            y[p] = D[p] * u[p]
        b, c = floats(at[3] + 4 * (t * E + e) * N, N), floats(at[4] + 4 * (t * E + e) * N, N)
        for n in range(N):
            for p in range(WIDTH):
                h[n, p] = exp2(dt[p] * a[n, p]) * h[n, p] + drive[p] * b[n]
                y[p] += h[n, p] * c[n]
        if table[_HAS_Z]:
            _load(u, at[5], here, width)
            for p in range(WIDTH):
                y[p] *= u[p] * sigmoid(u[p])
        _store(at[12], here, y, width)
    for n in range(N):
        _store(at[13], (e * N + n) * P + first, h[n], width)


@kernel
def backward(item, buffers):
    """The adjoint of `forward`, chunk by chunk against the direction of the scan, states recomputed in each.

    Operands: table, u, dt, b, c, z, A, D, dt_bias, valid, reset, starts, dy, dh. Results, cotangents: u, dt, b and c
    of each part (parts, T, E N), z, A by row (E, N, P), D and dt_bias by row (E, P), h0.
    """
    at = words(buffers, 23)
    table = ints(at[0], _SIZES)
    T, E, P, N, K, group, parts = (
        table[_T], table[_E], table[_P], table[_N], table[_K], table[_G], table[_PARTS]
    )  # fmt: skip
    e, part, blocks = item // parts, item % parts, (P + WIDTH - 1) // WIDTH
    row_of_A = e if table[_A_ROWS] > 1 else 0
    valid, reset = flags(at[9], T * table[_VALID_ROWS]), flags(at[10], T * table[_RESET_ROWS])

    states, decays = np.zeros((K + 1, N, WIDTH), np.float32), np.zeros((K, N, WIDTH), np.float32)
    us, raws = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
    dts, ys = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
    a, dh = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
    da = np.zeros((N, WIDTH), np.float32)
    local = np.zeros((11, WIDTH), np.float32)
    D, bias, dD, dbias = local[0], local[1], local[2], local[3]
    drive, dy, z, by_b, by_a, g, change = local[4], local[5], local[6], local[7], local[8], local[9], local[10]

    first_block, end_block = part * blocks // parts, (part + 1) * blocks // parts
    for block in range(first_block, end_block):
        first = block * WIDTH
        width = min(WIDTH, P - first)
        a[:], dh[:], da[:], local[:], us[:], raws[:], states[:] = 0, 0, 0, 0, 0, 0, 0
        for n in range(N):
            _load(a[n], at[6], (row_of_A * N + n) * P + first, width)
            _load(dh[n], at[13], (e * N + n) * P + first, width)
        if table[_HAS_D]:
            _load(D, at[7], e % group * P + first, width)
        if table[_HAS_BIAS]:
            _load(bias, at[8], e % group * P + first, width)

        for k in range(T // K):
            chunk = k if table[_REVERSE] else T // K - 1 - k
            for n in range(N):
                _load(states[0, n], at[11], ((chunk * E + e) * N + n) * P + first, width)
            for j in range(K):
                t = chunk * K + (K - 1 - j if table[_REVERSE] else j)
                here = (t * E + e) * P + first
                if _skipped(table, valid, t, e):
                    states[j + 1] = states[j]
                    continue
                _ask_ahead(at[1], here, table, width)
                _ask_ahead(at[2], here, table, width)
                _load(us[j], at[1], here, width)
                _load(raws[j], at[2], here, width)
                for p in range(WIDTH):
                    raws[j, p] += bias[p]
                if table[_SOFTPLUS]:
                    for p in range(WIDTH):
                        dts[j, p] = softplus(raws[j, p])
                else:
                    dts[j] = raws[j]
                for p in range(WIDTH):
                    drive[p] = dts[j, p] * us[j, p]
                for p in range(WIDTH):
                    ys[j, p] = D[p] * us[j, p]
                b, c = floats(at[3] + 4 * (t * E + e) * N, N), floats(at[4] + 4 * (t * E + e) * N, N)
                cleared = _cleared(table, reset, t, e)
                for n in range(N):
                    if cleared:
                        for p in range(WIDTH):
                            states[j + 1, n, p] = drive[p] * b[n]
                    else:
                        for p in range(WIDTH):
                            decays[j, n, p] = exp2(dts[j, p] * a[n, p] * LOG2_E)
                        for p in range(WIDTH):
                            states[j + 1, n, p] = decays[j, n, p] * states[j, n, p] + drive[p] * b[n]
                    for p in range(WIDTH):
                        ys[j, p] += states[j + 1, n, p] * c[n]

            for i in range(K):
                j = K - 1 - i
                t = chunk * K + (i if table[_REVERSE] else j)
                here = (t * E + e) * P + first
                summed = 4 * ((part * T + t) * E + e) * N
                db, dc = floats(at[16] + summed, N), floats(at[17] + summed, N)
                if block == first_block:
                    db[:], dc[:] = 0, 0
                by_b[:], by_a[:] = 0, 0
                if _skipped(table, valid, t, e):
                    _store(at[14], here, by_b, width)
                    _store(at[15], here, by_a, width)
                    if table[_HAS_Z]:
                        _store(at[18], here, by_a, width)
                    continue
                _ask_behind(at[12], here, table, width)
                _load(dy, at[12], here, width)
                if table[_HAS_Z]:
                    _ask_behind(at[5], here, table, width)
                    _load(z, at[5], here, width)
                    for p in range(WIDTH):
                        s = sigmoid(z[p])
                        g[p] = dy[p] * ys[j, p] * s * (_one + z[p] * (_one - s))
                        z[p] = z[p] * s
                    _store(at[18], here, g, width)
                    for p in range(WIDTH):
                        dy[p] *= z[p]
                for p in range(WIDTH):
                    drive[p] = dts[j, p] * us[j, p]
                b, c = floats(at[3] + 4 * (t * E + e) * N, N), floats(at[4] + 4 * (t * E + e) * N, N)
                cleared = _cleared(table, reset, t, e)
                for n in range(N):
                    for p in range(WIDTH):
                        g[p] = dh[n, p] + dy[p] * c[n]
                    for p in range(WIDTH):
                        by_b[p] += g[p] * b[n]
                    if cleared:
                        for p in range(WIDTH):
                            dh[n, p] = 0
                    else:
                        for p in range(WIDTH):
                            dh[n, p] = g[p] * decays[j, n, p]
                        for p in range(WIDTH):
                            change[p] = dh[n, p] * states[j, n, p]
                        for p in range(WIDTH):
                            by_a[p] += change[p] * a[n, p]
                        for p in range(WIDTH):
                            da[n, p] += change[p] * dts[j, p]
                    db[n] += _dot(g, drive)
                    dc[n] += _dot(states[j + 1, n], dy)
                for p in range(WIDTH):
                    dD[p] += dy[p] * us[j, p]
                for p in range(WIDTH):
                    by_a[p] += us[j, p] * by_b[p]
                if table[_SOFTPLUS]:
                    for p in range(WIDTH):
                        by_a[p] *= sigmoid(raws[j, p])
                for p in range(WIDTH):
                    dbias[p] += by_a[p]
                for p in range(WIDTH):
                    by_b[p] = dts[j, p] * by_b[p] + dy[p] * D[p]
                _store(at[14], here, by_b, width)
                _store(at[15], here, by_a, width)

        for n in range(N):
            _store(at[19], (e * N + n) * P + first, da[n], width)
            _store(at[22], (e * N + n) * P + first, dh[n], width)
        _store(at[20], e * P + first, dD, width)
        _store(at[21], e * P + first, dbias, width)
