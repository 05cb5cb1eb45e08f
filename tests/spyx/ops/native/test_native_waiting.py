"""Threads that wait for the next call."""

import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import njit

from spyx.ops.native import custom_call, waiting
from spyx.ops.native.products import pack, packed

SECONDS = 60
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@njit(nogil=True)
def _next(word):
    return waiting.next_call(word)


@njit(nogil=True)
def _hand(shared, helpers):
    return waiting.hand_over(shared, helpers)


class Waiter(threading.Thread):
    """Waits again and again, until the call `END` comes.

    How many times for each call is in `times`, what its word was then in `words`.
    """

    END = 8

    def __init__(self, in_vain=0):
        super().__init__(daemon=True)
        self.word, self.taken, self.times, self.words = np.array([in_vain]), [], [], []

    def run(self):
        waited = 0
        while True:
            waited += 1
            call = _next(self.word.ctypes.data)
            if call:
                self.times.append(waited)
                self.words.append(int(self.word[0]))
                waited = 0
                if call == self.END:
                    return
                self.taken.append(call)


def hand_to_all(call, helpers):
    """Give a call until all the helpers have been found."""
    limit = time.monotonic() + SECONDS
    while helpers and time.monotonic() < limit:
        helpers = _hand(call, helpers)
    assert helpers == 0


def end(waiters):
    hand_to_all(Waiter.END, len(waiters))
    for waiter in waiters:
        waiter.join(SECONDS)
        assert not waiter.is_alive()
    assert not waiting._places.any()


@pytest.fixture(autouse=True)
def _alone():
    """No thread of XLA's waits any longer for a call, which here is none; and all is compiled."""
    limit = time.monotonic() + SECONDS
    while waiting._places.any():
        assert time.monotonic() < limit
        time.sleep(1e-3)
    word = np.zeros(1, np.int64)
    assert _next(word.ctypes.data) == 0
    assert word[0] == 1
    assert _hand(16, 0) == 0


def test_no_thread_waits_when_none_came():
    assert _hand(16, 3) == 3
    assert not waiting._places.any()


def test_each_call_is_taken_as_often_as_it_is_given():
    waiters = [Waiter() for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    calls = [(16 * k, 1 + k % 2) for k in range(1, 300)]
    for call, helpers in calls:
        hand_to_all(call, helpers)
    end(waiters)
    assert sorted(v for w in waiters for v in w.taken) == sorted(call for call, n in calls for _ in range(n))


def test_a_thread_waits_seldom_after_waiting_in_vain():
    waiter = Waiter(waiting.FEW)
    waiter.start()
    hand_to_all(16, 1)
    end([waiter])
    assert waiter.taken == [16]
    assert waiter.words == [0, 0]
    first, last = waiter.times
    assert (waiting.FEW + first - 1) % waiting.SELDOM == 0
    assert last <= waiting.FEW or (last - 1) % waiting.SELDOM == 0


@pytest.mark.skipif(CORES == 1, reason="no other thread takes part in a call")
def test_threads_of_one_call_take_part_in_the_next():
    run, matrix = jax.jit(packed), jnp.zeros((512, 512))
    limit, most = time.monotonic() + SECONDS, 0
    while time.monotonic() < limit:
        jax.block_until_ready(run(matrix))
        in_vain = custom_call._in_vain[pack]
        if in_vain < most:  # some other thread than this has waited, and has been given this call
            return
        most = in_vain
    pytest.fail("no call has been given to a thread that waited")
