"""diagonal_ssm against the sequential float64 oracle: streamed, plain, eager, differentiated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles.scan import diagonal_ssm as oracle
from oracles.scan import directional

from spyx.ops import diagonal_ssm, diagonal_ssm_step

METHODS = ("sequential", "blocked", "associative")
T, B, H, N, K = 37, 3, 4, 5, 6
NAMES = ("u", "lam", "B", "C", "D", "h0")


def numbers(rng, *shape, complex_=True, radius=None):
    z = rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_ else 0)
    if radius is not None:
        z = z / np.abs(z) * rng.uniform(0.3, radius, shape)
    return z.astype(np.complex64 if complex_ else np.float32)


def system(rng, kind):
    """(lam, B, C, D, h0)."""
    if kind == "LRU":
        return numbers(rng, N, radius=1), numbers(rng, N, H), numbers(rng, H, N), numbers(rng, H).real, None
    if kind == "S5, real B, wide D":
        matrices = numbers(rng, N, H, complex_=False), numbers(rng, K, N), numbers(rng, K, H, complex_=False)
        return numbers(rng, N, radius=1), *matrices, numbers(rng, B, N)
    if kind == "real C":
        return numbers(rng, N, radius=1), numbers(rng, N, H), numbers(rng, H, N).real, None, None
    if kind == "real lam, complex B":
        return numbers(rng, N, complex_=False, radius=1), numbers(rng, N, H), numbers(rng, K, N), None, None
    matrices = numbers(rng, N, H, complex_=False), numbers(rng, H, N), numbers(rng, H).real
    return numbers(rng, N, complex_=False, radius=1), *matrices, numbers(rng, B, N).real


KINDS = ("LRU", "S5, real B, wide D", "real C", "real lam, complex B", "real")
OPTIONS = {
    "nothing": {},
    "conj_sym, reverse, lengths": {"conj_sym": True, "reverse": True, "lengths": np.array([T, 20, 0])},
    "reset, lengths": {
        "reset": np.random.default_rng(2).random((T, B)) < 0.1,
        "lengths": np.array([17, T + 5, 1]),
    },
    "reverse, reset in time": {"reverse": True, "reset": np.arange(T) % 9 == 4},
}
CASES = [(method, kind, "nothing") for method in METHODS for kind in KINDS]
CASES += [("blocked", kind, option) for kind in KINDS[:2] for option in OPTIONS if option != "nothing"]
CASES += [(method, "real", "reset, lengths") for method in METHODS]


def relative(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)


def real_dot(z, w):
    return (z.real * w.real + z.imag * w.imag).sum()


@pytest.mark.parametrize(("method", "kind", "option"), CASES)
def test_values_and_gradients_match_the_oracle(method, kind, option):
    kwargs, rng = OPTIONS[option], np.random.default_rng(0)
    values = (numbers(rng, T, B, H, complex_=False), *system(rng, kind))
    truth, single = oracle(*values, **kwargs), oracle(*values, **kwargs, real=np.float32)
    weights = [numbers(rng, *v.shape) for v in truth]

    @jax.jit
    def run(values):
        def loss(values):
            out = diagonal_ssm(*values, **kwargs, method=method, return_state=True, precision="highest")
            return sum(real_dot(o, w) for o, w in zip(out, weights, strict=True)), out

        return jax.value_and_grad(loss, has_aux=True)(values)

    (_, out), grads = run(values)
    for got, want, plain in zip(out, truth, single, strict=True):
        factor = 32 if method == "associative" else 2
        assert relative(got, want) <= max(1e-6, factor * relative(plain, want))
        assert got.dtype == plain.dtype

    def loss64(*values):
        return sum(real_dot(o, w) for o, w in zip(oracle(*values, **kwargs), weights, strict=True))

    values64 = [None if v is None else v.astype(np.result_type(v.dtype, np.float64)) for v in values]
    for k, grad in enumerate(grads):
        if grad is None:
            continue
        assert grad.dtype == values[k].dtype
        direction = numbers(rng, *grad.shape, complex_=np.iscomplexobj(grad))
        want = directional(loss64, values64, [0 if i != k else direction for i in range(6)])
        got = np.sum(np.asarray(grad, np.complex128) * direction).real
        assert abs(got - want) <= 1e-5 * np.linalg.norm(grad) * np.linalg.norm(direction), NAMES[k]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (2, 1), (31, 1), (9, 0)])
def test_small_shapes(shape, method):
    rng = np.random.default_rng(0)
    u = numbers(rng, *shape, 1, complex_=False)
    lam, b, c = numbers(rng, 1, radius=1), numbers(rng, 1, 1), numbers(rng, 1, 1)
    h0 = numbers(rng, shape[1], 1)
    y, state = diagonal_ssm(u, lam, b, c, None, h0, method=method, return_state=True)
    want, want_state = oracle(u, lam, b, c, None, h0)
    assert relative(y, want) <= 2e-6
    assert relative(state, want_state) <= 2e-6


@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_the_batch_may_come_first(method):
    rng = np.random.default_rng(0)
    u, values = numbers(rng, T, B, H, complex_=False), system(rng, "S5, real B, wide D")
    kwargs = {"lengths": np.array([T, 20, 0]), "method": method, "return_state": True}

    @partial(jax.jit, static_argnames="batch_first")
    def run(u, batch_first=False):
        turn = (lambda z: jnp.swapaxes(z, 0, 1)) if batch_first else (lambda z: z)

        def f(u, *values):
            y, state = diagonal_ssm(turn(u), *values, **kwargs, batch_first=batch_first)
            return turn(y), state

        out, pull = jax.vjp(f, u, *values)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    jax.tree.map(np.testing.assert_array_equal, run(u, batch_first=True), run(u))
    with pytest.raises(ValueError, match=r"\(B, T, H\), got \(37, 3\)"):
        diagonal_ssm(u[..., 0], *values, batch_first=True)


@pytest.mark.parametrize("method", METHODS)
def test_padding_touches_nothing(method):
    rng = np.random.default_rng(0)
    u, values = numbers(rng, T, B, H, complex_=False), system(rng, "LRU")[:4]
    lengths = np.array([T, 11, 0])
    dirty = np.where(np.arange(T)[:, None, None] < lengths[:, None], u, np.nan)

    @jax.jit
    def run(u, dy):
        def f(*values):
            return diagonal_ssm(*values, lengths=lengths, method=method, return_state=True)

        (y, state), pull = jax.vjp(f, u, *values)
        return y, state, pull((dy, state))

    mask = np.arange(T)[:, None, None] < lengths[:, None]
    clean = run(u, np.where(mask, np.ones_like(u), 0))
    assert not np.asarray(clean[0])[~np.broadcast_to(mask, u.shape)].any()
    jax.tree.map(np.testing.assert_array_equal, run(dirty, np.where(mask, np.ones_like(u), np.nan)), clean)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_is_nan_stays_alone(method):
    rng = np.random.default_rng(0)
    u, values = numbers(rng, T, B, H, complex_=False), system(rng, "LRU")[:4]
    dirty = u.copy()
    dirty[3, 1] = np.nan
    dirty[:5, 2] = np.inf
    reset = np.zeros((T, B), bool)
    reset[6, 2] = True
    y, want = (diagonal_ssm(v, *values, reset=reset, method=method) for v in (dirty, u))
    np.testing.assert_array_equal(y[:, 0], want[:, 0])
    np.testing.assert_array_equal(y[6:, 2], want[6:, 2])
    assert np.isnan(y[4:, 1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    rng = np.random.default_rng(0)
    u, values = jnp.asarray(rng.normal(size=(T, B, H)), jnp.bfloat16), system(rng, "LRU")[:4]
    f = lambda *v: diagonal_ssm(*v, method=method, return_state=True)  # noqa: E731
    (y, state), pull = jax.vjp(f, u, *values)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.complex64)
    assert relative(np.asarray(y, np.float32), oracle(np.asarray(u, np.float32), *values)[0]) <= 2**-8
    assert [g.dtype for g in pull((y, state))] == [u.dtype, *(v.dtype for v in values)]


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_second_order(method):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        L = 5 if method == "associative" else 18
        u = rng.normal(size=(L, 2, H))
        lam, b, c, D, _ = (None if v is None else v.astype(np.result_type(v, np.float64)) for v in system(rng, "LRU"))
        f = jax.jit(lambda *v: jnp.sum(diagonal_ssm(*v, method=method) ** 4))
        check_grads(f, (u, lam, b, c, D), order=2, modes=["rev"], rtol=1e-5)
        direction = rng.normal(size=u.shape)
        gradient = jax.jit(jax.grad(f))
        _, forward = jax.jvp(lambda u: gradient(u, lam, b, c, D), (u,), (direction,))
        backward = jax.grad(lambda u: jnp.vdot(gradient(u, lam, b, c, D), direction))(u)
        np.testing.assert_allclose(forward, backward, rtol=1e-9)


@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_forward_mode(method):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        u = rng.normal(size=(9, 2, H))
        values = [v.astype(np.result_type(v, np.float64)) for v in system(rng, "LRU")[:4]]
        check_grads(lambda *v: diagonal_ssm(*v, method=method), (u, *values), order=1, modes=["fwd"])


def test_vmap_over_systems():
    rng = np.random.default_rng(0)
    u = numbers(rng, T, B, H, complex_=False)
    systems = [system(rng, "LRU")[:4] for _ in range(3)]
    grad = jax.grad(lambda *v: jnp.sum(diagonal_ssm(u, *v) ** 2), argnums=(0, 1, 2, 3))
    stacked = [np.stack(z) for z in zip(*systems, strict=True)]
    got = jax.jit(jax.vmap(grad))(*stacked)
    want = [jax.jit(grad)(*v) for v in systems]
    for g, *w in zip(got, *want, strict=True):
        assert relative(g, np.stack(w)) <= 1e-5


def test_steps_continue_a_sequence():
    rng = np.random.default_rng(0)
    u, values = numbers(rng, T, B, H, complex_=False), system(rng, "LRU")[:4]
    whole, last = diagonal_ssm(u, *values, return_state=True)
    first, h = diagonal_ssm(u[:20], *values, return_state=True)
    middle, h = diagonal_ssm(u[20:30], *values, h, return_state=True)
    rest = []
    for u_t in u[30:]:
        y, h = diagonal_ssm_step(u_t, h, *values)
        rest.append(y)
    assert relative(np.concatenate([first, middle, np.stack(rest)]), whole) <= 1e-6
    assert relative(h, last) <= 1e-6


def test_memory_does_not_grow_with_the_state_times_steps():
    """Temporary memory is a fraction of one (T, B, N) array, and the backward pass keeps no such array."""
    rng = np.random.default_rng(0)
    steps, width, state = 65536, 8, 256
    u = numbers(rng, steps, 2, width, complex_=False)
    values = numbers(rng, state, radius=1), numbers(rng, state, width), numbers(rng, width, state)
    trajectory = steps * 2 * state * 8
    f = lambda *v: jnp.sum(diagonal_ssm(*v) ** 2)  # noqa: E731
    for g in (f, jax.grad(f, argnums=(0, 1, 2, 3))):
        temp = jax.jit(g).lower(u, *values).compile().memory_analysis().temp_size_in_bytes
        assert temp < trajectory / 10


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_every_dot_has_the_precision_asked_for(method):
    rng = np.random.default_rng(0)
    u, values = numbers(rng, T, B, H, complex_=False), system(rng, "S5, real B, wide D")
    f = lambda *v: jnp.sum(diagonal_ssm(*v, method=method, precision="highest") ** 2)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(f, argnums=tuple(range(6))))(u, *values))
    dots = text.count("dot_general[")
    assert dots > 0
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == dots


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"u": np.ones((T, H), np.float32)}, ValueError, "u must have shape"),
        ({"u": np.ones((T, B, H), np.int32)}, TypeError, "u must be real floating point"),
        ({"u": np.ones((T, B, H), np.complex64)}, TypeError, "u must be real floating point"),
        ({"lam": np.ones((N, N), np.float32)}, ValueError, "lam must have shape"),
        ({"B": np.ones((H, N), np.float32)}, ValueError, "B must have shape"),
        ({"C": np.ones((H, N + 1), np.float32)}, ValueError, "C must have shape"),
        ({"D": np.ones(H + 1, np.float32)}, ValueError, "D must have shape"),
        ({"D": np.ones(H, np.int32)}, TypeError, "D must be floating point"),
        ({"h0": np.ones((B, N + 1), np.float32)}, ValueError, "h0 must have shape"),
        ({"reset": np.zeros(T + 1, bool)}, ValueError, "reset must have shape"),
        ({"lengths": np.ones(B + 1, np.int32)}, ValueError, "lengths must have shape"),
    ],
)
def test_refuses(change, error, match):
    args = {
        "u": np.ones((T, B, H), np.float32),
        "lam": np.ones(N, np.float32),
        "B": np.ones((N, H), np.float32),
        "C": np.ones((H, N), np.float32),
    }
    with pytest.raises(error, match=match):
        diagonal_ssm(**(args | change))
