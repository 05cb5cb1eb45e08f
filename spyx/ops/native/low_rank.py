"""Diagonal-plus-low-rank single-input systems, one per channel, step by step.

h <- h + G h - U Re(V h) + B u, y = Re(C h). An item is one row and `WIDTH` channels. Layouts: u (T, B, H), y
(T, B, c, H), G and B (2, n, H), U and V (r, 2, n, H), C (c, 2, n, H), real parts first.
"""

from __future__ import annotations

import numpy as np

from .custom_call import kernel
from .memory import ints, words
from .vectors import WIDTH, gather, load, put, store, take, zeros

# The table, after what `invoke` writes itself.
_T, _B, _H, _N, _C, _R = range(3, 9)
_SIZES = 9
_ROW = 4 * WIDTH


@kernel
def forward(item, buffers):
    """Operands: table, u, G, U, V, B, C. Result: y."""
    at = words(buffers, 8)
    table = ints(at[0], _SIZES)
    T, B, H, N, C, R = table[_T], table[_B], table[_H], table[_N], table[_C], table[_R]
    blocks = (H + WIDTH - 1) // WIDTH
    first, b = item % blocks * WIDTH, item // blocks
    width = min(WIDTH, H - first)
    memory = np.zeros((2 * N * (3 + 2 * R + C) + R + C, WIDTH), np.float32)
    hs = memory.ctypes.data
    Gs, Bs = hs + _ROW * 2 * N, hs + _ROW * 4 * N
    Us, Vs = hs + _ROW * 6 * N, hs + _ROW * 2 * N * (3 + R)
    Cs = hs + _ROW * 2 * N * (3 + 2 * R)
    feedback = hs + _ROW * 2 * N * (3 + 2 * R + C)
    ys = feedback + _ROW * R
    gather(Gs, at[2] + 4 * first, H, 2 * N, width)
    gather(Us, at[3] + 4 * first, H, 2 * N * R, width)
    gather(Vs, at[4] + 4 * first, H, 2 * N * R, width)
    gather(Bs, at[5] + 4 * first, H, 2 * N, width)
    gather(Cs, at[6] + 4 * first, H, 2 * N * C, width)
    imag = _ROW * N
    for t in range(T):
        u = take(at[1] + 4 * ((t * B + b) * H + first), width)
        for r in range(R):
            total = zeros()
            for n in range(N):
                h, v = hs + _ROW * n, Vs + _ROW * (2 * r * N + n)
                total = total + (load(v) * load(h) - load(v + imag) * load(h + imag))
            store(feedback + _ROW * r, total)
        y = zeros()
        for n in range(N):
            h, g, d, c = hs + _ROW * n, Gs + _ROW * n, Bs + _ROW * n, Cs + _ROW * n
            hr, hi, gr, gi = load(h), load(h + imag), load(g), load(g + imag)
            change_r = load(d) * u + (gr * hr - gi * hi)
            change_i = load(d + imag) * u + (gr * hi + gi * hr)
            for r in range(R):
                k, f = Us + _ROW * (2 * r * N + n), load(feedback + _ROW * r)
                change_r, change_i = change_r - load(k) * f, change_i - load(k + imag) * f
            hr, hi = hr + change_r, hi + change_i
            store(h, hr)
            store(h + imag, hi)
            y = y + (load(c) * hr - load(c + imag) * hi)
        store(ys, y)
        for k in range(1, C):
            y = zeros()
            for n in range(N):
                c, h = Cs + _ROW * (2 * k * N + n), hs + _ROW * n
                y = y + (load(c) * load(h) - load(c + imag) * load(h + imag))
            store(ys + _ROW * k, y)
        for k in range(C):
            put(at[7] + 4 * (((t * B + b) * C + k) * H + first), load(ys + _ROW * k), width)
    memory[0] = 0  # numba frees an array after its last use
