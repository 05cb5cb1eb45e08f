"""Threads that have helped with a call wait a little for the next one, which then need not wake any.

On a virtual machine, waking a thread takes its caller some 40 us, and it runs 60 us later. XLA's threads look for work
for some 35 us before they sleep; from one call to the next Python alone takes as long. OpenMP's threads wait likewise.
While one waits, other threads may run on its core, but XLA cannot give it work: so it waits only after kernels that
have been followed by a call in time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .memory import CLOCK, add, nanoseconds, pause, replace, symbol, words

_PLACES, _LONGEST = 64, 100_000
"""Where threads wait, and for how many nanoseconds: one that others keep from running gives up at its next turn."""
FEW, SELDOM = 8, 64
"""After so many times in vain a thread waits only once in so many times."""
_FREE, _WAITING = 0, 1
"""What lies in a place, if not the address of a call."""

_places = np.zeros(_PLACES, np.int64)
_places_address = symbol("spyx_places", _places.ctypes.data)


@njit
def next_call(in_vain):
    """The address of another call to help with, or 0 if none comes in time.

    The word at `in_vain` counts how often none has come since one has.
    """
    times = add(in_vain, 1)
    if not CLOCK or (times >= FEW and times % SELDOM != 0):
        return 0
    place, end = _places_address(), _places_address() + 8 * _PLACES
    while replace(place, _FREE, _WAITING) != _FREE:
        place += 8
        if place == end:
            return 0
    clock = np.empty(2, np.int64)
    latest = nanoseconds(clock.ctypes.data) + _LONGEST
    while add(place, 0) == _WAITING and nanoseconds(clock.ctypes.data) < latest:
        pause()
    clock[0] = 0  # numba frees an array after its last use
    shared = replace(place, _WAITING, _FREE)
    if shared == _WAITING:
        return 0
    replace(place, shared, _FREE)
    words(in_vain, 1)[0] = 0
    return shared


@njit
def hand_over(shared, helpers):
    """Give the call at an address to up to `helpers` threads that wait; how many are still to be found."""
    place, end = _places_address(), _places_address() + 8 * _PLACES
    while helpers > 0 and place < end:
        if words(place, 1)[0] == _WAITING and replace(place, _WAITING, shared) == _WAITING:
            helpers -= 1
        place += 8
    return helpers
