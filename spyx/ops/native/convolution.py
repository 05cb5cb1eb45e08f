"""Causal convolution with the kernel of diagonal single-input systems, by their recurrence: forward and backward.

h_t = h_{t-1} + G h_{t-1} + u_t, y_t = Re(w h_t), one system of n states for every channel. G is kept rather than
1 + G: rounded, that would be off by the same amount at every step. An item is one row and `WIDTH` channels; states
are taken one after the other through a chunk of time, in registers. Layouts: u (T, B, H), y (T, B, c, H), G (2, n, H)
and w (c, 2, n, H), real parts first.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .custom_call import kernel
from .memory import ints, words
from .vectors import WIDTH, gather, load, put, store, take, zeros

# The table, after what `invoke` writes itself.
_T, _B, _H, _N, _C, _K = range(3, 9)
_SIZES = 9


@njit(inline="always")
def _advance(hr, hi, gr, gi, u):
    return hr + (gr * hr - gi * hi) + u, hi + (gr * hi + gi * hr)


@kernel
def forward(item, buffers):
    """Operands: table, u, G, w. Result: y. The item also says which of the c readouts."""
    at = words(buffers, 5)
    table = ints(at[0], _SIZES)
    T, B, H, N, C, K = table[_T], table[_B], table[_H], table[_N], table[_C], table[_K]
    blocks = (H + WIDTH - 1) // WIDTH
    first, row = item % blocks * WIDTH, item // blocks
    b, c = row // C, row % C
    width = min(WIDTH, H - first)
    memory = np.zeros((2 * (K + N), WIDTH), np.float32)
    us = memory.ctypes.data
    ys, states = us + 4 * WIDTH * K, us + 8 * WIDTH * K
    for start in range(0, T, K):
        steps = min(K, T - start)
        gather(us, at[1] + 4 * ((start * B + b) * H + first), B * H, steps, width)
        for j in range(steps):
            store(ys + 4 * WIDTH * j, zeros())
        for n in range(N):
            column = 4 * (n * H + first)
            gr, gi = take(at[2] + column, width), take(at[2] + 4 * N * H + column, width)
            wr = take(at[3] + 8 * c * N * H + column, width)
            wi = take(at[3] + 4 * (2 * c + 1) * N * H + column, width)
            hr, hi = load(states + 8 * WIDTH * n), load(states + 8 * WIDTH * n + 4 * WIDTH)
            for j in range(steps):
                hr, hi = _advance(hr, hi, gr, gi, load(us + 4 * WIDTH * j))
                store(ys + 4 * WIDTH * j, load(ys + 4 * WIDTH * j) + (wr * hr - wi * hi))
            store(states + 8 * WIDTH * n, hr)
            store(states + 8 * WIDTH * n + 4 * WIDTH, hi)
        for j in range(steps):
            put(at[4] + 4 * ((((start + j) * B + b) * C + c) * H + first), load(ys + 4 * WIDTH * j), width)
    memory[0] = 0  # numba frees an array after its last use


@kernel
def backward(item, buffers):
    """Operands: table, u, G, w, dy. Results, cotangents: u, and of each row G (B, 2, n, H) and w (B, c, 2, n, H)."""
    at = words(buffers, 8)
    table = ints(at[0], _SIZES)
    T, B, H, N, C, K = table[_T], table[_B], table[_H], table[_N], table[_C], table[_K]
    blocks = (H + WIDTH - 1) // WIDTH
    first, b = item % blocks * WIDTH, item // blocks
    width = min(WIDTH, H - first)
    row, chunks = 4 * WIDTH, (T + K - 1) // K
    memory = np.zeros((K * (4 + C) + 2 + 2 * N * (chunks + 2 + C), WIDTH), np.float32)
    us = memory.ctypes.data
    dus, dys = us + row * K, us + 2 * row * K
    hs = us + row * K * (2 + C)
    starts = hs + row * 2 * (K + 1)
    carried, dGs, dws = (
        starts + row * 2 * N * chunks, starts + row * 2 * N * (chunks + 1), starts + row * 2 * N * (chunks + 2)
    )  # fmt: skip

    for k in range(chunks - 1):
        gather(us, at[1] + 4 * ((k * K * B + b) * H + first), B * H, K, width)
        for n in range(N):
            column = 4 * (n * H + first)
            gr, gi = take(at[2] + column, width), take(at[2] + 4 * N * H + column, width)
            here = starts + row * 2 * (k * N + n)
            hr, hi = load(here), load(here + row)
            for j in range(K):
                hr, hi = _advance(hr, hi, gr, gi, load(us + row * j))
            store(here + row * 2 * N, hr)
            store(here + row * (2 * N + 1), hi)

    for i in range(chunks):
        k = chunks - 1 - i
        steps = min(K, T - k * K)
        gather(us, at[1] + 4 * ((k * K * B + b) * H + first), B * H, steps, width)
        for c in range(C):
            gather(dys + row * K * c, at[4] + 4 * (((k * K * B + b) * C + c) * H + first), B * C * H, steps, width)
        for j in range(steps):
            store(dus + row * j, zeros())
        for n in range(N):
            column = 4 * (n * H + first)
            gr, gi = take(at[2] + column, width), take(at[2] + 4 * N * H + column, width)
            hr, hi = load(starts + row * 2 * (k * N + n)), load(starts + row * (2 * (k * N + n) + 1))
            store(hs, hr)
            store(hs + row, hi)
            for j in range(steps):
                hr, hi = _advance(hr, hi, gr, gi, load(us + row * j))
                store(hs + row * 2 * (j + 1), hr)
                store(hs + row * (2 * j + 3), hi)
            for c in range(C):
                total = dws + row * 2 * (n * C + c)
                dwr, dwi = load(total), load(total + row)
                for j in range(steps):
                    dy = load(dys + row * (K * c + j))
                    dwr = dwr + dy * load(hs + row * 2 * (j + 1))
                    dwi = dwi - dy * load(hs + row * (2 * j + 3))
                store(total, dwr)
                store(total + row, dwi)
            wr = take(at[3] + column, width)
            wi = take(at[3] + 4 * N * H + column, width)
            qr, qi = load(carried + row * 2 * n), load(carried + row * (2 * n + 1))
            dgr, dgi = load(dGs + row * 2 * n), load(dGs + row * (2 * n + 1))
            for i in range(steps):
                j = steps - 1 - i
                dy = load(dys + row * j)
                qr, qi = qr + wr * dy, qi - wi * dy
                for c in range(1, C):
                    more = at[3] + 8 * c * N * H + column
                    dy = load(dys + row * (K * c + j))
                    qr, qi = qr + take(more, width) * dy, qi - take(more + 4 * N * H, width) * dy
                store(dus + row * j, load(dus + row * j) + qr)
                hr, hi = load(hs + row * 2 * j), load(hs + row * (2 * j + 1))
                dgr, dgi = dgr + (qr * hr + qi * hi), dgi + (qi * hr - qr * hi)
                qr, qi = qr + (gr * qr + gi * qi), qi + (gr * qi - gi * qr)
            store(carried + row * 2 * n, qr)
            store(carried + row * (2 * n + 1), qi)
            store(dGs + row * 2 * n, dgr)
            store(dGs + row * (2 * n + 1), dgi)
        for j in range(steps):
            put(at[5] + 4 * (((k * K + j) * B + b) * H + first), load(dus + row * j), width)

    for n in range(N):
        for part in range(2):
            put(at[6] + 4 * (((b * 2 + part) * N + n) * H + first), load(dGs + row * (2 * n + part)), width)
            for c in range(C):
                to = at[7] + 4 * ((((b * C + c) * 2 + part) * N + n) * H + first)
                put(to, load(dws + row * (2 * (n * C + c) + part)), width)
    memory[0] = 0  # as above
