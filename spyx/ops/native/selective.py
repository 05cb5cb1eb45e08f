"""The selective scan of `spyx.ops.selective` for CPU: forward and backward, float32, real A.

There is a kernel for each discretization, with and without a step size of its own for A (`event`), compiled when
first used. An item is one row e of E = B * G and `WIDTH` of its P channels; the state of so many channels stays in the
cache nearest to the core. Arrays are flat; layouts as in `spyx.ops._selective_step`: u, dt, dt_a, z, y (T, E P), b, c
(T, E N), A (N, P) or (E, N, P), states (E, N, P), the states before each segment of S chunks of K steps
(ceil(T / (K S)), E, N, P), D and dt_bias (G P), valid (T, B), reset (T, E) or (T, 1). What is absent is one element
that is never read; the table of sizes says so.

All items of a row add to the same cotangents of b and c, in the order of their channels, each some steps behind the
one before it: the sums are the same on any number of threads, and no item keeps sums of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from .activations import sigmoid, softplus
from .custom_call import kernel
from .discretize import BILINEAR, KINDS, MAMBA, ZOH, common, decay, decay_slope, gain_slopes, rate, respond
from .memory import LINE, add, clear, copy, flags, floats, ints, prefetch, wait_for, words
from .vectors import wide

WIDTH = 64
_AHEAD = 4
"""Steps between asking for a row and reading it: rows lie too far apart for the hardware to guess."""
_GROUP = 8
"""Steps after which an item tells the next one how far it has come."""
_one = np.float32(1)

# The table, after what `invoke` writes itself.
_T, _E, _P, _N, _K, _S, _G, _A_ROWS, _REVERSE, _SOFTPLUS = range(3, 13)
_HAS_D, _HAS_BIAS, _HAS_Z, _VALID_ROWS, _RESET_ROWS = range(13, 18)
_SIZES = 18


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


@njit
def _visit(table, k, v):
    """Visit v of 2 S - 1 in the segment that is k-th against the direction of the scan, through its chunks and back.

    `(segment, chunk, place of the chunk in the segment in scan direction, chunks left on the way through)`; back, what
    is left is negative; the place is negative where a segment has fewer visits.
    """
    span = table[_K] * table[_S]
    segments, reverse = (table[_T] + span - 1) // span, table[_REVERSE]
    segment = k if reverse else segments - 1 - k
    members = min(table[_S], (table[_T] - segment * span + table[_K] - 1) // table[_K])
    left = members - 1 - v
    place = members - 1 - abs(left)
    return segment, segment * table[_S] + (members - 1 - place if reverse else place), place, left


@njit(inline="always")
def advance(kind, event, h, rates, dt, step, drive, b, c, y):
    """One step of `WIDTH` channels: states h (N, WIDTH), and what they add to y."""
    for n in range(len(b)):
        for p in range(WIDTH):
            key, rest = respond(kind, step[p], rates[n, p])
            if event:
                _, rest = respond(kind, dt[p], rates[n, p])
            h[n, p] = decay(kind, key, step[p], rates[n, p]) * h[n, p] + drive[p] * b[n] * rest
            y[p] += h[n, p] * c[n]


def _kernels(make: Callable[[int, bool], Callable[[int, int], None]]) -> dict[tuple[str, bool], int]:
    """The number of each kernel by (discretization, event)."""

    def named(kind: int, event: bool) -> int:
        function = make(kind, event)
        function.__qualname__ = f"{make.__name__.strip('_')}_{KINDS[kind]}{'_event' if event else ''}"
        return kernel(function)

    return {(name, event): named(kind, event) for kind, name in enumerate(KINDS) for event in (False, True)}


def _forward(kind: int, event: bool):
    """Operands: table, u, dt, dt_a, b, c, z, A, D, dt_bias, valid, reset, h0. Results: y, last state, starts."""

    def forward(item, buffers):
        wide()
        at = words(buffers, 16)
        table = ints(at[0], _SIZES)
        T, E, P, N, group = table[_T], table[_E], table[_P], table[_N], table[_G]
        segment, blocks = table[_K] * table[_S], (P + WIDTH - 1) // WIDTH
        e, first = item // blocks, item % blocks * WIDTH
        width, ahead = min(WIDTH, P - first), 4 * (-_AHEAD if table[_REVERSE] else _AHEAD) * E * P
        valid, reset = flags(at[10], T * table[_VALID_ROWS]), flags(at[11], T * table[_RESET_ROWS])

        h, a = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
        local = np.zeros((7, WIDTH), np.float32)
        u, dt, drive, y, D, bias = local[0], local[1], local[2], local[3], local[4], local[5]
        step = local[6] if event else dt
        row_of_A = e if table[_A_ROWS] > 1 else 0
        for n in range(N):
            _load(h[n], at[12], (e * N + n) * P + first, width)
            _load(a[n], at[7], (row_of_A * N + n) * P + first, width)
            for p in range(WIDTH):
                a[n, p] = rate(kind, a[n, p])
        if table[_HAS_D]:
            _load(D, at[8], e % group * P + first, width)
        if table[_HAS_BIAS]:
            _load(bias, at[9], e % group * P + first, width)

        for i in range(T):
            t = T - 1 - i if table[_REVERSE] else i
            here = (t * E + e) * P + first
            if i == 0 or t % segment == (segment - 1 if table[_REVERSE] else 0):
                for n in range(N):
                    _store(at[15], ((t // segment * E + e) * N + n) * P + first, h[n], width)
            if _skipped(table, valid, t, e):
                clear(y.ctypes.data, WIDTH)
                _store(at[13], here, y, width)
                continue
            if _cleared(table, reset, t, e):
                clear(h.ctypes.data, N * WIDTH)
            for k in (1, 2, 13):
                prefetch(at[k] + ahead + 4 * here, width)
            if table[_HAS_Z]:
                prefetch(at[6] + ahead + 4 * here, width)
            _load(u, at[1], here, width)
            _load(dt, at[2], here, width)
            if event:
                prefetch(at[3] + ahead + 4 * here, width)
                _load(step, at[3], here, width)
            for p in range(WIDTH):
                dt[p] += bias[p]
            if table[_SOFTPLUS]:
                for p in range(WIDTH):
                    dt[p] = softplus(dt[p])
            for p in range(WIDTH):
                drive[p] = common(kind, dt[p]) * u[p]
                y[p] = D[p] * u[p]
            b, c = floats(at[4] + 4 * (t * E + e) * N, N), floats(at[5] + 4 * (t * E + e) * N, N)
            advance(kind, event, h, a, dt, step, drive, b, c, y)
            if table[_HAS_Z]:
                _load(u, at[6], here, width)
                for p in range(WIDTH):
                    y[p] *= u[p] * sigmoid(u[p])
            _store(at[13], here, y, width)
        for n in range(N):
            _store(at[14], (e * N + n) * P + first, h[n], width)

    return forward


def _backward(kind: int, event: bool):
    """The adjoint of `forward`, chunk by chunk against the direction of the scan, states recomputed in each.

    A segment of several chunks is run through once before, to know the state before each of them.

    Operands: table, u, dt, dt_a, b, c, z, A, D, dt_bias, valid, reset, starts, dy, dh. Counters: the
    steps that each item has done, (E, blocks). Results, cotangents: u, dt, dt_a, b, c, z, A by row (E, N, P), D and
    dt_bias by row (E, P), h0.
    """
    gain_varies = kind in (ZOH, BILINEAR)

    def backward(item, buffers):
        wide()
        at = words(buffers, 26)
        table = ints(at[0], _SIZES)
        T, E, P, N, K, S, group = table[_T], table[_E], table[_P], table[_N], table[_K], table[_S], table[_G]
        e, block, blocks = item % E, item // E, (P + WIDTH - 1) // WIDTH
        first, done, row = block * WIDTH, at[15] + 4 * LINE * (e * blocks + block), 4 * N * WIDTH
        width, ahead = min(WIDTH, P - first), 4 * (-_AHEAD if table[_REVERSE] else _AHEAD) * E * P
        row_of_A = e if table[_A_ROWS] > 1 else 0
        valid, reset = flags(at[10], T * table[_VALID_ROWS]), flags(at[11], T * table[_RESET_ROWS])

        states, keys = np.empty((K + 1, N, WIDTH), np.float32), np.empty((K, N, WIDTH), np.float32)
        clear(states.ctypes.data, N * WIDTH)
        starts = np.empty((S, N, WIDTH), np.float32)
        us, raws = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
        dts, ys = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
        steps = np.zeros((K, WIDTH), np.float32) if event else dts
        a, dh = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
        da, rates = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
        local = np.zeros((16, WIDTH), np.float32)
        D, bias, dD, dbias = local[0], local[1], local[2], local[3]
        drive, dy, z, by_drive, by_dt, by_step = local[4], local[5], local[6], local[7], local[8], local[9]
        g, change, nothing = local[10], local[11], local[12]
        rest, slope, slope_A = local[13], local[14], local[15]

        for n in range(N):
            _load(a[n], at[7], (row_of_A * N + n) * P + first, width)
            for p in range(WIDTH):
                rates[n, p] = rate(kind, a[n, p])
            _load(dh[n], at[14], (e * N + n) * P + first, width)
        if table[_HAS_D]:
            _load(D, at[8], e % group * P + first, width)
        if table[_HAS_BIAS]:
            _load(bias, at[9], e % group * P + first, width)

        visits, finished = 2 * S - 1, 0
        for k in range((T + K * S - 1) // (K * S) * visits):
            segment, chunk, place, left = _visit(table, k // visits, k % visits)
            count = min(K, T - chunk * K)
            if place < 0:
                continue
            if k % visits == 0:
                for n in range(N):
                    _load(states[0, n], at[12], ((segment * E + e) * N + n) * P + first, width)
            if left >= 0:
                copy(starts.ctypes.data + place * row, states.ctypes.data, N * WIDTH)
            else:
                copy(states.ctypes.data, starts.ctypes.data + place * row, N * WIDTH)
            for j in range(count):
                t = chunk * K + (count - 1 - j if table[_REVERSE] else j)
                here = (t * E + e) * P + first
                if _skipped(table, valid, t, e):
                    copy(states.ctypes.data + (j + 1) * row, states.ctypes.data + j * row, N * WIDTH)
                    continue
                prefetch(at[1] + ahead + 4 * here, width)
                prefetch(at[2] + ahead + 4 * here, width)
                _load(us[j], at[1], here, width)
                _load(raws[j], at[2], here, width)
                if event:
                    prefetch(at[3] + ahead + 4 * here, width)
                    _load(steps[j], at[3], here, width)
                for p in range(WIDTH):
                    raws[j, p] += bias[p]
                if table[_SOFTPLUS]:
                    for p in range(WIDTH):
                        dts[j, p] = softplus(raws[j, p])
                else:
                    copy(dts.ctypes.data + 4 * WIDTH * j, raws.ctypes.data + 4 * WIDTH * j, WIDTH)
                for p in range(WIDTH):
                    drive[p] = common(kind, dts[j, p]) * us[j, p]
                for p in range(WIDTH):
                    ys[j, p] = D[p] * us[j, p]
                b, c = floats(at[4] + 4 * (t * E + e) * N, N), floats(at[5] + 4 * (t * E + e) * N, N)
                cleared = _cleared(table, reset, t, e)
                for n in range(N):
                    for p in range(WIDTH):
                        keys[j, n, p], factor = respond(kind, steps[j, p], rates[n, p])
                        if gain_varies:
                            rest[p] = respond(kind, dts[j, p], rates[n, p])[1] if event else factor
                    if cleared:
                        for p in range(WIDTH):
                            states[j + 1, n, p] = drive[p] * b[n] * (rest[p] if gain_varies else _one)
                    else:
                        for p in range(WIDTH):
                            kept = decay(kind, keys[j, n, p], steps[j, p], rates[n, p]) * states[j, n, p]
                            states[j + 1, n, p] = kept + drive[p] * b[n] * (rest[p] if gain_varies else _one)
                    for p in range(WIDTH):
                        ys[j, p] += states[j + 1, n, p] * c[n]
            if left > 0:
                copy(states.ctypes.data, states.ctypes.data + count * row, N * WIDTH)
                continue

            for begin in range(0, count, _GROUP):
                end = min(begin + _GROUP, count)
                finished += end - begin
                if block > 0:
                    wait_for(done - 4 * LINE, finished)
                for i in range(begin, end):
                    j = count - 1 - i
                    t = chunk * K + (i if table[_REVERSE] else j)
                    here = (t * E + e) * P + first
                    db, dc = floats(at[19] + 4 * (t * E + e) * N, N), floats(at[20] + 4 * (t * E + e) * N, N)
                    if block == 0:
                        clear(db.ctypes.data, N)
                        clear(dc.ctypes.data, N)
                    clear(by_drive.ctypes.data, 3 * WIDTH)
                    if _skipped(table, valid, t, e):
                        _store(at[16], here, nothing, width)
                        _store(at[17], here, nothing, width)
                        if event:
                            _store(at[18], here, nothing, width)
                        if table[_HAS_Z]:
                            _store(at[21], here, nothing, width)
                        continue
                    prefetch(at[13] - ahead + 4 * here, width)
                    _load(dy, at[13], here, width)
                    if table[_HAS_Z]:
                        prefetch(at[6] - ahead + 4 * here, width)
                        _load(z, at[6], here, width)
                        for p in range(WIDTH):
                            s = sigmoid(z[p])
                            g[p] = dy[p] * ys[j, p] * s * (_one + z[p] * (_one - s))
                            z[p] = z[p] * s
                        _store(at[21], here, g, width)
                        for p in range(WIDTH):
                            dy[p] *= z[p]
                    for p in range(WIDTH):
                        drive[p] = common(kind, dts[j, p]) * us[j, p]
                    b, c = floats(at[4] + 4 * (t * E + e) * N, N), floats(at[5] + 4 * (t * E + e) * N, N)
                    cleared = _cleared(table, reset, t, e)
                    for n in range(N):
                        for p in range(WIDTH):
                            g[p] = dh[n, p] + dy[p] * c[n]
                        if cleared:
                            for p in range(WIDTH):
                                dh[n, p] = 0
                        else:
                            for p in range(WIDTH):
                                dh[n, p] = g[p] * decay(kind, keys[j, n, p], steps[j, p], rates[n, p])
                            for p in range(WIDTH):
                                change[p] = decay_slope(kind, keys[j, n, p], g[p], dh[n, p]) * states[j, n, p]
                            for p in range(WIDTH):
                                by_step[p] += change[p] * a[n, p]
                            for p in range(WIDTH):
                                da[n, p] += change[p] * steps[j, p]
                        dc[n] += _dot(states[j + 1, n], dy)
                        if gain_varies:
                            for p in range(WIDTH):
                                key = respond(kind, dts[j, p], rates[n, p])[0] if event else keys[j, n, p]
                                rest[p], slope[p], slope_A[p] = gain_slopes(kind, key, dts[j, p], a[n, p])
                            for p in range(WIDTH):
                                by_dt[p] += g[p] * b[n] * slope[p]
                            for p in range(WIDTH):
                                da[n, p] += g[p] * b[n] * slope_A[p] * us[j, p]
                            for p in range(WIDTH):
                                g[p] *= rest[p]
                        for p in range(WIDTH):
                            by_drive[p] += g[p] * b[n]
                        db[n] += _dot(g, drive)
                    for p in range(WIDTH):
                        dD[p] += dy[p] * us[j, p]
                    if kind == MAMBA:
                        copy(by_dt.ctypes.data, by_drive.ctypes.data, WIDTH)
                    for p in range(WIDTH):
                        by_dt[p] *= us[j, p]
                    if event:
                        _store(at[18], here, by_step, width)
                    else:
                        for p in range(WIDTH):
                            by_dt[p] += by_step[p]
                    if table[_SOFTPLUS]:
                        for p in range(WIDTH):
                            by_dt[p] *= sigmoid(raws[j, p])
                    for p in range(WIDTH):
                        dbias[p] += by_dt[p]
                    for p in range(WIDTH):
                        by_drive[p] = common(kind, dts[j, p]) * by_drive[p] + dy[p] * D[p]
                    _store(at[16], here, by_drive, width)
                    _store(at[17], here, by_dt, width)
                add(done, end - begin)

        for n in range(N):
            _store(at[22], (e * N + n) * P + first, da[n], width)
            _store(at[25], (e * N + n) * P + first, dh[n], width)
        _store(at[23], e * P + first, dD, width)
        _store(at[24], e * P + first, dbias, width)

    return backward


forward, backward = _kernels(_forward), _kernels(_backward)
