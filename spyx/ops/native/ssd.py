"""The state-space dual scan of Mamba-2 for CPU: forward and backward, float32.

An item is one row e of E = B * G and `WIDTH` of its R P channels, those of R heads side by side; the states of so many
channels stay in the nearest cache. Layouts: x, y (T, E, R P), dt (T, E, R), A (G, R), b, c (T, E, N), states
(E, N, R P), reset (T, B), or one element that is never read.

All items of a row add to the same cotangents of b, c and dt, in the order of their channels, each some steps behind the
one before it: the sums are the same on any number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .activations import LOG2_E, exp2_and_slope
from .custom_call import kernel
from .memory import LINE, add, clear, copy, flags, floats, ints, wait_for, words
from .vectors import WIDTH, fill, gather, load, put, store, take, total, zeros

_ROW = 4 * WIDTH
_GROUP = 8
"""Steps after which an item tells the next one how far it has come."""

# The table, after what `invoke` writes itself.
_T, _E, _G, _R, _P, _N, _K, _REVERSE, _RESET = range(3, 12)
_SIZES = 12


@njit
def _blocks(table):
    return (table[_R] * table[_P] + WIDTH - 1) // WIDTH


@njit
def _step(table, i):
    """The time of the i-th step in the direction of the scan."""
    return table[_T] - 1 - i if table[_REVERSE] else i


@njit
def _cleared(table, reset, t, e):
    batch = table[_E] // table[_G]
    return table[_RESET] != 0 and flags(reset, table[_T] * batch)[t * batch + e // table[_G]] != 0


@njit
def _spread(table, fades, steps, dt, A, first, width):
    """Decay and step size of each of the `width` channels from the `first` on, from those of their heads."""
    P, p = table[_P], 0
    fade, step = floats(fades, WIDTH), floats(steps, WIDTH)
    while p < width:
        r = (first + p) // P
        end = min(width, (r + 1) * P - first)
        size = floats(dt + 4 * r, 1)[0]
        kept = exp2_and_slope(size * (floats(A + 4 * r, 1)[0] * LOG2_E))[0]
        if end - p == WIDTH:
            fade[0] = kept
            store(fades, fill(fades))
            store(steps, fill(dt + 4 * r))
        else:
            for q in range(p, end):
                fade[q] = kept
                step[q] = size
        p = end


@njit
def _advance(to, h, fade, drive, b, N):
    """The states at `to`, one step after those at `h`."""
    for n in range(N):
        store(to + _ROW * n, fade * load(h + _ROW * n) + drive * fill(b + 4 * n))


@kernel
def forward(item, buffers):
    """Operands: table, x, dt, A, b, c, reset, h0. Results: y, last state."""
    at = words(buffers, 10)
    table = ints(at[0], _SIZES)
    T, E, G, R, N = table[_T], table[_E], table[_G], table[_R], table[_N]
    D, blocks = R * table[_P], _blocks(table)
    e, first = item // blocks, item % blocks * WIDTH
    width = min(WIDTH, D - first)
    memory = np.zeros((N + 3, WIDTH), np.float32)
    h = (memory.ctypes.data + 63) // 64 * 64
    fades, steps = h + _ROW * N, h + _ROW * (N + 1)
    gather(h, at[7] + 4 * (e * N * D + first), D, N, width)
    for i in range(T):
        t = _step(table, i)
        row = t * E + e
        if _cleared(table, at[6], t, e):
            clear(h, N * WIDTH)
        _spread(table, fades, steps, at[2] + 4 * row * R, at[3] + 4 * (e % G) * R, first, width)
        fade, drive = load(fades), load(steps) * take(at[1] + 4 * (row * D + first), width)
        b, c, y = at[4] + 4 * row * N, at[5] + 4 * row * N, zeros()
        for n in range(N):
            state = fade * load(h + _ROW * n) + drive * fill(b + 4 * n)
            store(h + _ROW * n, state)
            y = y + state * fill(c + 4 * n)
        put(at[8] + 4 * (row * D + first), y, width)
    for n in range(N):
        put(at[9] + 4 * ((e * N + n) * D + first), load(h + _ROW * n), width)
    memory[0] = 0  # numba frees an array after its last use


@njit
def _by_head(table, ddt, dA, A, by_drive, by_fade, steps, first, width):
    """Add the cotangents of step sizes and rates that those of drive and decay, each times itself, make."""
    P, p = table[_P], 0
    drives, fades = floats(by_drive, WIDTH), floats(by_fade, WIDTH)
    while p < width:
        r = (first + p) // P
        end = min(width, (r + 1) * P - first)
        of_drive, of_fade = np.float32(0), np.float32(0)
        for q in range(p, end):
            of_drive += drives[q]
            of_fade += fades[q]
        floats(ddt + 4 * r, 1)[0] += of_drive + of_fade * floats(A + 4 * r, 1)[0]
        floats(dA + 4 * r, 1)[0] += of_fade * floats(steps, WIDTH)[p]
        p = end


@kernel
def backward(item, buffers):
    """The adjoint of `forward`, chunk by chunk of K steps against the direction of the scan, states recomputed.

    Operands: table, x, dt, A, b, c, reset, h0, dy, dh. Counters: the steps that each item has done, (E, blocks).
    Results, cotangents: x, dt, A of each item (E, blocks, R), b, c, h0.
    """
    at = words(buffers, 17)
    table = ints(at[0], _SIZES)
    T, E, G, R, N, K = table[_T], table[_E], table[_G], table[_R], table[_N], table[_K]
    D, blocks, chunks = R * table[_P], _blocks(table), (T + K - 1) // K
    e, block = item % E, item // E
    first, done = block * WIDTH, at[10] + 4 * LINE * (e * blocks + block)
    width = min(WIDTH, D - first)
    A, dA = at[3] + 4 * (e % G) * R, at[13] + 4 * (e * blocks + block) * R

    memory = np.empty(((chunks + K + 3) * N + 2 * K + 3, WIDTH), np.float32)
    starts = (memory.ctypes.data + 63) // 64 * 64
    states = starts + _ROW * chunks * N
    nothing, g = states + _ROW * (K + 1) * N, states + _ROW * (K + 2) * N
    fades = g + _ROW * N
    steps, by_drive, by_fade = fades + _ROW * K, fades + _ROW * 2 * K, fades + _ROW * (2 * K + 1)
    clear(nothing, N * WIDTH)
    clear(fades, (2 * K + 2) * WIDTH)
    clear(dA, R)
    gather(starts, at[7] + 4 * (e * N * D + first), D, N, width)
    gather(g, at[9] + 4 * (e * N * D + first), D, N, width)

    for k in range(chunks - 1):
        h, to = starts + _ROW * k * N, starts + _ROW * (k + 1) * N
        for i in range(k * K, (k + 1) * K):
            row = _step(table, i) * E + e
            _spread(table, fades, steps, at[2] + 4 * row * R, A, first, width)
            drive = load(steps) * take(at[1] + 4 * (row * D + first), width)
            if _cleared(table, at[6], _step(table, i), e):
                h = nothing
            _advance(to, h, load(fades), drive, at[4] + 4 * row * N, N)
            h = to

    finished = 0
    for k in range(chunks - 1, -1, -1):
        count = min(K, T - k * K)
        copy(states, starts + _ROW * k * N, N * WIDTH)
        for j in range(count):
            t = _step(table, k * K + j)
            row = t * E + e
            _spread(table, fades + _ROW * j, steps + _ROW * j, at[2] + 4 * row * R, A, first, width)
            drive = load(steps + _ROW * j) * take(at[1] + 4 * (row * D + first), width)
            h = nothing if _cleared(table, at[6], t, e) else states + _ROW * j * N
            _advance(states + _ROW * (j + 1) * N, h, load(fades + _ROW * j), drive, at[4] + 4 * row * N, N)

        for i in range(count):
            j = count - 1 - i
            if i % _GROUP == 0:
                finished += min(_GROUP, count - i)
                if block > 0:
                    wait_for(done - 4 * LINE, finished)
            t = _step(table, k * K + j)
            row = t * E + e
            b, c = at[4] + 4 * row * N, at[5] + 4 * row * N
            db, dc = at[14] + 4 * row * N, at[15] + 4 * row * N
            ddt, cleared = at[12] + 4 * row * R, _cleared(table, at[6], t, e)
            if block == 0:
                clear(db, N)
                clear(dc, N)
                clear(ddt, R)
            fade, step = load(fades + _ROW * j), load(steps + _ROW * j)
            x, dy = take(at[1] + 4 * (row * D + first), width), take(at[8] + 4 * (row * D + first), width)
            drive, ddrive, dfade = step * x, zeros(), zeros()
            before, here = nothing if cleared else states + _ROW * j * N, states + _ROW * (j + 1) * N
            for n in range(N):
                change = load(g + _ROW * n) + dy * fill(c + 4 * n)
                floats(dc + 4 * n, 1)[0] += total(dy * load(here + _ROW * n))
                floats(db + 4 * n, 1)[0] += total(drive * change)
                ddrive = ddrive + change * fill(b + 4 * n)
                dfade = dfade + change * load(before + _ROW * n)
                store(g + _ROW * n, fade * change)
            if cleared:
                clear(g, N * WIDTH)
            put(at[11] + 4 * (row * D + first), step * ddrive, width)
            store(by_drive, x * ddrive)
            store(by_fade, fade * dfade)
            _by_head(table, ddt, dA, A, by_drive, by_fade, steps + _ROW * j, first, width)
            if (i + 1) % _GROUP == 0 or i == count - 1:
                add(done, min(_GROUP, i % _GROUP + 1))
    for n in range(N):
        put(at[16] + 4 * ((e * N + n) * D + first), load(g + _ROW * n), width)
    memory[0] = 0  # as above
