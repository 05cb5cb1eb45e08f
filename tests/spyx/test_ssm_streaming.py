"""Every layer of spyx.ssm: whole == parts == steps; lengths, resets, reverse; what depends on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.ssm import ALL, CAUSAL, CHUNK, WHOLE, H, call, close, close_trees, each, length, make, noise, row, started
from oracles.ssm import step as step_of


@each(ALL)
def test_whole_equals_parts(name):
    layer, u = make(name), noise(length(name), 2, H)
    state = started(layer, name)
    whole, last = call(layer, u, state)
    for cut in (6,) if name in WHOLE else (5, 6):
        first, middle = call(layer, u[:cut], state)
        second, end = call(layer, u[cut:], middle)
        close(jnp.concatenate([first, second]), whole)
        close_trees(end, last)


@each(ALL)
def test_no_state_is_the_zero_state(name):
    layer, u = make(name), noise(length(name), 2, H)
    whole, last = call(layer, u, layer.initial_state(2))
    close(layer(u), whole)
    close_trees(call(layer, u)[1], last)


@each(CAUSAL)
def test_whole_equals_steps(name):
    layer, u = make(name), noise(11, 2, H)
    state = started(layer, name)
    whole, last = call(layer, u, state)
    outputs = []
    for u_t in u:
        y_t, after = step_of(layer, u_t, state)
        assert jax.tree.map(lambda v: v.dtype, after) == jax.tree.map(lambda v: v.dtype, state)
        outputs.append(y_t)
        state = after
    close(jnp.stack(outputs), whole)
    close_trees(state, last)


@each(CAUSAL)
def test_step_is_a_scan_body(name):
    layer, u = make(name), noise(11, 2, H)
    _, y = jax.lax.scan(lambda state, u_t: layer.step(u_t, state)[::-1], layer.initial_state(2), u)
    close(y, call(layer, u)[0])


@pytest.mark.parametrize("reverse", [False, True])
@each(ALL)
def test_lengths_equal_unpadded_rows(name, reverse):
    layer, T = make(name, reverse=reverse), length(name)
    short = 6 if name in WHOLE else 5
    u, lengths, state = noise(T, 2, H), jnp.array([short, T]), started(layer, name)
    for empty in (False, True):
        lengths = lengths.at[1].set(0 if empty else T)
        padded = jnp.where(jnp.arange(T)[:, None, None] < lengths[:, None], u, jnp.nan)
        y, last = call(layer, padded, state, lengths)
        alone, after = call(layer, u[:short], state)
        close(y[:short, 0], alone[:, 0])
        np.testing.assert_array_equal(y[short:, 0], 0)
        close_trees(row(last, 0), row(after, 0))
        if empty:
            np.testing.assert_array_equal(y[:, 1], 0)
            close_trees(row(last, 1), row(state, 1))
        else:
            whole, after = call(layer, u, state)
            close(y[:, 1], whole[:, 1])
            close_trees(row(last, 1), row(after, 1))


@pytest.mark.parametrize("resets", [([4], [3, 4]), ([0], [0, 6, 7, 10])])
@pytest.mark.parametrize("reverse", [False, True])
@each(ALL)
def test_reset_equals_separate_sequences(name, reverse, resets):
    layer, T = make(name, reverse=reverse), length(name)
    u, ends, state = noise(T, 2, H), [T, T - 1], started(layer, name)
    reset = np.zeros((T, 2), bool)
    for i, times in enumerate(resets):
        reset[times, i] = True
    y, last = call(layer, u, state, jnp.array(ends), jnp.asarray(reset))
    never, fresh = jnp.zeros((T, 2), bool), layer.initial_state(2)
    for i, times in enumerate(resets):
        pieces: list[list[int]] = [[]]
        for t in range(ends[i] - 1, -1, -1) if reverse else range(ends[i]):
            pieces = [*pieces, [t]] if t in times else [*pieces[:-1], [*pieces[-1], t]]
        for before, piece in zip([state, *[fresh] * len(pieces)], pieces, strict=False):
            if piece:
                begin, end = min(piece), max(piece) + 1
                alone = jnp.zeros_like(u).at[: end - begin].set(u[begin:end])
                out, after = call(layer, alone, before, jnp.full(2, end - begin), never)
                close(y[begin:end, i], out[: end - begin, i])
        close_trees(row(last, i), row(after, i))


@each(ALL)
def test_reset_for_all_rows_and_any_lengths(name):
    layer, T = make(name), length(name)
    u, state = noise(T, 2, H), started(layer, name)
    reset = jnp.zeros(T, bool).at[0].set(True).at[6].set(True)
    y, last = call(layer, u, state, None, reset)
    wide, wide_last = call(layer, u, state, jnp.full(2, T + 5), jnp.broadcast_to(reset[:, None], (T, 2)))
    close(y, wide)
    close_trees(last, wide_last)
    close(y[:6], call(layer, u[:6])[0])


@each(ALL)
def test_reverse_is_flipped(name):
    forward, backward, T = make(name), make(name, reverse=True), length(name)
    u, lengths, state = noise(T, 2, H), jnp.array([T, 6]), started(make(name), name)
    flipped = u[::-1].at[:6, 1].set(u[5::-1, 1])
    expected, expected_state = call(forward, flipped, state, lengths)
    y, last = call(backward, u, state, lengths)
    close(y[:, 0], expected[::-1, 0])
    close(y[:6, 1], expected[5::-1, 1])
    close_trees(last, expected_state)
    close(backward(u), call(forward, u[::-1])[0][::-1])
    with pytest.raises(ValueError, match="reverse=True needs the whole sequence: it has no step"):
        backward.step(u[0], backward.initial_state(2))


@each(ALL)
def test_rows_are_independent(name):
    layer, u = make(name), noise(length(name), 2, H)
    close(call(layer, u.at[:, 1].set(jnp.nan))[0][:, 0], call(layer, u)[0][:, 0])


@each(CAUSAL)
def test_causal(name):
    layer, u = make(name), noise(11, 2, H)
    y = call(layer, u)[0]
    for t in range(11):
        changed = np.abs(call(layer, u.at[t].add(1.0))[0] - y).max((1, 2)) > 1e-6
        assert not changed[:t].any()
        assert changed[t]
        assert t == 10 or changed[t + 1 :].any()


@each(WHOLE)
def test_chunks_see_their_own_end_and_nothing_later(name):
    layer, u = make(name), noise(12, 2, H)
    changed = np.abs(call(layer, u.at[7].add(1.0))[0] - call(layer, u)[0]).max((1, 2)) > 1e-6
    assert not changed[:6].any()
    assert changed[6:].all()
    with pytest.raises(ValueError, match="causal=False"):
        layer.step(u[0], layer.initial_state(2))


@pytest.mark.parametrize("T", [0, 1, 2])
@each(ALL)
def test_short_sequences(name, T):
    layer, u = make(name), noise(T, 2, H)
    if name in WHOLE and T % CHUNK:
        with pytest.raises(ValueError, match=f"length {T} is not a multiple of chunk_size 3"):
            layer(u)
        return
    state = started(layer, name)
    y, last = call(layer, u, state)
    assert y.shape == layer(u).shape == (T, 2, H)
    if T == 0:
        close_trees(last, state)
    if name in CAUSAL:
        for u_t, y_t in zip(u, y, strict=True):
            out, state = step_of(layer, u_t, state)
            close(out, y_t)
        close_trees(state, last)
