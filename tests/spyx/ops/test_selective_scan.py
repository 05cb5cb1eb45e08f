import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.selective import selective_scan as oracle

from spyx.ops.selective import _selective_scan, selective_scan, selective_state_update

FULL = pytest.mark.full
METHODS = ("sequential", "blocked", "associative")
DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "dirac")


def case(T=7, batch=2, width=4, N=3, groups=0, is_complex=False, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def real(*shape):
        return rng.normal(size=shape).astype(dtype)

    def number(*shape):
        return real(*shape) + 1j * real(*shape) if is_complex else real(*shape)

    vector = (T, batch, groups, N) if groups else (T, batch, N)
    A = -np.exp(real(width, N)) + (1j * real(width, N) if is_complex else 0)
    return {
        "u": real(T, batch, width), "dt": real(T, batch, width), "A": A.astype(number(1).dtype),
        "B": number(*vector), "C": number(*vector), "D": real(width), "z": real(T, batch, width),
        "dt_bias": real(width), "h0": number(batch, width, N), "dt_softplus": True,
    }  # fmt: skip


def arrays(c):
    return {k: v for k, v in c.items() if isinstance(v, (np.ndarray, jax.Array))}


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def evaluation(method, dt_softplus=True, **fixed):
    """A compiled function of the arrays: (output, state, gradients of a sum in which every entry counts)."""

    def weigh(v):
        return jnp.sum(v * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape)))

    def loss(c):
        y, h = selective_scan(**c, dt_softplus=dt_softplus, **fixed, method=method, return_state=True)
        return weigh(y) + weigh(h.real) + (weigh(h.imag) if jnp.iscomplexobj(h) else 0), (y, h)

    def evaluate(c):
        gradients, (y, h) = jax.grad(loss, has_aux=True)(c)
        return y, h, gradients

    return jax.jit(evaluate)


@settings(max_examples=3, deadline=None)
@given(
    T=st.sampled_from([1, 17, 37]),
    groups=st.sampled_from([0, 1, 2]),
    is_complex=st.booleans(),
    discretization=st.sampled_from(DISCRETIZATIONS),
    reverse=st.booleans(),
    resets=st.sampled_from([None, "T", "TB"]),
    lengths=st.booleans(),
    event=st.booleans(),
)
def test_values_and_gradients(T, groups, is_complex, discretization, reverse, resets, lengths, event):
    c = case(T, groups=groups, is_complex=is_complex)
    rng = np.random.default_rng(1)
    if event:
        c["dt_A"] = rng.uniform(0.01, 1, (T, 2, 4)).astype(np.float32)
    fixed = {"discretization": discretization, "reverse": reverse}
    if resets:
        fixed["reset"] = rng.random((T,) if resets == "T" else (T, 2)) < 0.3
    if lengths:
        fixed["lengths"] = np.array([T, T // 2])
    y, h = oracle(**c, **fixed)
    exact = {k: v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for k, v in arrays(c).items()}
    with jax.enable_x64(True):
        y64, h64, wanted = evaluation("sequential", **fixed)(exact)
    assert max(relative(y64, y), relative(h64, h)) < 1e-13
    errors = {}
    for method in METHODS:
        y32, h32, gradients = evaluation(method, **fixed)(arrays(c))
        assert y32.dtype == jnp.float32
        errors[method] = max(relative(y32, y), relative(h32, h))
        for name, g in gradients.items():
            assert relative(g, np.asarray(wanted[name])) < 1e-5, (method, name)
    assert errors["sequential"] < 1e-5
    assert errors["blocked"] <= max(1e-6, 2 * errors["sequential"])
    assert errors["associative"] <= max(1e-6, 32 * errors["sequential"])


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("method", ["sequential", "blocked"])
def test_gradients_against_finite_differences(discretization, method):
    with jax.enable_x64(True):
        c = case(5, dtype=np.float64)
        c["dt_A"] = np.random.default_rng(2).uniform(0.01, 1, c["u"].shape)
        evaluate = evaluation(method, discretization=discretization)
        rng = np.random.default_rng(3)
        directions = {k: rng.normal(size=v.shape) for k, v in arrays(c).items()}

        def total(c):
            y, h, _ = evaluate(c)
            return sum(float(jnp.sum(v * jnp.cos(jnp.arange(v.size).reshape(v.shape)))) for v in (y, h))

        c = arrays(c)
        for name, g in evaluate(c)[2].items():
            v = directions[name]
            high, low = (total({**c, name: c[name] + s * 1e-6 * v}) for s in (1, -1))
            np.testing.assert_allclose(np.sum(g * v), (high - low) / 2e-6, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize(("is_complex", "groups"), [(False, 0), (True, 2)])
def test_step_agrees_with_scan(discretization, is_complex, groups):
    c = case(5, groups=groups, is_complex=is_complex)
    c["dt_A"] = np.random.default_rng(2).uniform(0.01, 1, c["u"].shape).astype(np.float32)
    y, h = selective_scan(**c, discretization=discretization, return_state=True, conj_sym=True)
    state, weights = c.pop("h0"), {k: c.pop(k) for k in ("A", "D", "dt_bias", "dt_softplus")}
    for t in range(5):
        now = {k: v[t] for k, v in c.items()}
        y_t, state = selective_state_update(state, **now, **weights, discretization=discretization, conj_sym=True)
        np.testing.assert_allclose(y_t, y[t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 2), (1, 1, 1, 1), (3, 1, 2, 1), (67, 1, 1, 2), (257, 2, 2, 2)])
def test_edge_shapes(shape, method):
    c = case(*shape)
    y, h = selective_scan(**c, method=method, return_state=True)
    wanted_y, wanted_h = oracle(**c)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(h, wanted_h, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_extreme_steps_are_finite(discretization):
    c = case(18)
    c |= {"dt": np.geomspace(1e-8, 1e2, 18 * 8, dtype=np.float32).reshape(18, 2, 4), "dt_softplus": False}
    c["A"][0], c["A"][1], c["u"][3] = 0, 1e-12 * c["A"][1], 0
    del c["dt_bias"]
    y, h = oracle(**c, discretization=discretization)
    for method in METHODS:
        evaluate = evaluation(method, dt_softplus=False, discretization=discretization)
        y32, h32, gradients = evaluate(arrays(c))
        assert relative(y32, y) < 2e-6
        assert relative(h32, h) < 2e-6
        assert all(bool(jnp.isfinite(g).all()) for g in gradients.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_padding_and_in_its_row(method, reverse):
    clean, dirty = case(9), case(9)
    lengths = np.array([9, 4])
    for name in ("u", "dt", "B", "C", "z"):
        dirty[name][4:, 1] = np.nan
    evaluate = evaluation(method, reverse=reverse, lengths=lengths)
    results = [evaluate(arrays(c)) for c in (clean, dirty)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert bool(jnp.isfinite(results[0][0]).all())
    assert not np.any(results[0][0][4:, 1])
    dirty = case(9)
    dirty["u"][2, 1] = np.nan
    y, h, gradient = evaluate(arrays(dirty))
    assert not bool(jnp.isfinite(y[:, 1]).all())
    assert bool(jnp.isfinite(y[:, 0]).all())
    assert bool(jnp.isfinite(h[0]).all())
    for name in ("u", "dt", "B", "C", "z"):
        assert bool(jnp.isfinite(gradient[name][:, 0]).all()), name


@pytest.mark.parametrize("method", METHODS)
def test_reset_stops_nan(method):
    c = case(6)
    c["h0"][:] = np.nan
    y, h, gradients = evaluation(method, reset=np.arange(6) == 0)(arrays(c))
    for value in jax.tree.leaves((y, h, gradients)):
        assert bool(jnp.isfinite(value).all())


def test_dtypes():
    c = case(5)
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in arrays(c).items()}
    y, h = selective_scan(**half, dt_softplus=True, return_state=True)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    wanted, _ = oracle(**{k: np.asarray(v, np.float64) for k, v in half.items()}, dt_softplus=True)
    assert relative(np.asarray(y, np.float64), wanted) < 4e-3
    gradient = jax.grad(lambda w: selective_scan(**w, dt_softplus=True).astype(jnp.float32).sum())(half)
    assert all(g.dtype == jnp.bfloat16 for g in gradient.values())
    with jax.enable_x64(True):
        c = case(5, dtype=np.float64)
        y, h = selective_scan(**c, return_state=True)
        assert (y.dtype, h.dtype) == (jnp.float64, jnp.float64)
        assert relative(y, oracle(**c)[0]) < 1e-14


def test_transformations():
    c = case(5)
    u = jnp.stack([c["u"], 2 * c["u"]])
    for method in METHODS:
        f = lambda u, m=method: selective_scan(**{**c, "u": u}, method=m)  # noqa: E731
        mapped = jax.jit(jax.vmap(f))(u)
        np.testing.assert_allclose(mapped[1], f(u[1]), rtol=1e-5, atol=1e-6)
    f = lambda u: selective_scan(**{**c, "u": u}, method="sequential")  # noqa: E731
    _, tangent = jax.jvp(f, (u[0],), (u[0],))
    np.testing.assert_allclose(tangent, f(2 * u[0]) - f(u[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
def test_second_derivatives(discretization):
    with jax.enable_x64(True):
        c = case(3, dtype=np.float64, width=2, N=2)
        direction = np.random.default_rng(4).normal(size=c["A"].shape)
        products = []
        for method in ("sequential", "blocked"):

            def loss(A, method=method):
                y = selective_scan(**{**c, "A": A}, discretization=discretization, method=method)
                return (jnp.sin(y) * c["u"]).sum()

            gradient = jax.grad(loss)
            products.append(jax.jit(lambda A, g=gradient: jax.jvp(g, (A,), (direction,))[1])(c["A"]))
            products.append(jax.jit(jax.grad(lambda A, g=gradient: jnp.vdot(g(A), direction)))(c["A"]))
        for other in products[1:]:
            np.testing.assert_allclose(other, products[0], rtol=1e-9)


@pytest.mark.parametrize("discretization", ["mamba", pytest.param("bilinear", marks=pytest.mark.full)])
def test_second_derivatives_under_vmap(discretization):
    """Hessian-vector products of all arguments, two at a time, by reverse over reverse; the program stays small."""
    with jax.enable_x64(True):
        c = arrays(case(3, dtype=np.float64, width=2, N=2))
        rng = np.random.default_rng(4)
        directions = [jax.tree.map(lambda v: rng.normal(size=v.shape), c) for _ in range(2)]
        both = jax.tree.map(lambda *v: np.stack(v), *directions)

        def products(method):
            def loss(c):
                y, h = selective_scan(
                    **c, dt_softplus=True, discretization=discretization, method=method, return_state=True
                )
                return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

            def product(direction):
                def slope(c):
                    return sum(map(jnp.vdot, jax.tree.leaves(jax.grad(loss)(c)), jax.tree.leaves(direction)))

                return jax.grad(slope)(c)

            return jax.jit(jax.vmap(product)).lower(both)

        programs = {method: products(method) for method in ("sequential", "blocked", "auto")}
        sizes = {method: len(program.as_text()) for method, program in programs.items()}
        assert sizes["auto"] < 1.2 * sizes["blocked"]
        expected, got = (programs[method].compile()(both) for method in ("sequential", "auto"))
        for name, v in got.items():
            assert relative(v, np.asarray(expected[name])) < 1e-10, name


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_auto_takes_the_blocked_form_on_cpu_where_no_kernel_is(discretization):
    c = case(20, is_complex=True) | {"discretization": discretization}
    np.testing.assert_array_equal(selective_scan(**c), selective_scan(**c, method="blocked"))


@pytest.mark.parametrize("method", ["auto", "blocked", pytest.param("associative", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("reverse", "masked"), [(False, True), (True, False), *(pytest.param(v, v, marks=FULL) for v in (False, True))]
)
def test_states_saved_further_apart_than_chunks(method, reverse, masked, monkeypatch):
    """Several chunks in a block, blocks in a segment, and segments, of which the last has fewer steps and chunks."""
    T, *sizes = 150, 8, 32, 96
    c, fixed = case(T, width=70), {"discretization": "zoh", "reverse": reverse}
    if masked:
        fixed |= {"reset": np.arange(T) % 37 == 5, "lengths": np.array([T, 101])}
    wanted = evaluation("sequential", **fixed)(arrays(c))
    monkeypatch.setattr("spyx.ops.selective._sizes", lambda T, N: sizes)
    _selective_scan.clear_cache()
    got = evaluation(method, **fixed)(arrays(c))
    _selective_scan.clear_cache()
    jax.tree.map(lambda a, b: np.testing.assert_array_less(relative(a, b), 5e-6), got, wanted)


@pytest.mark.parametrize(
    ("N", "method"),
    [(16, "auto"), (256, "auto"), (16, "blocked"), *(pytest.param(N, "associative", marks=FULL) for N in (16, 256))],
)
def test_memory_does_not_grow_with_steps(N, method):
    """Beside the cotangents, which are results. The methods in XLA copy some of the inputs, but keep no more states."""

    @jax.jit
    def pull(c, dy):
        return jax.vjp(lambda c: selective_scan(**c, dt_softplus=True, method=method), c)[1](dy)

    def temp(T):
        of_step = arrays(case(1, 1, 8, N))
        shapes = {k: (T, *v.shape[1:]) if v.shape[0] == 1 and k != "h0" else v.shape for k, v in of_step.items()}
        abstract = {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in shapes.items()}
        return pull.lower(abstract, abstract["u"]).compile().memory_analysis().temp_size_in_bytes

    half, whole = temp(1 << 17), temp(1 << 18)
    if method == "auto":
        assert half == whole < 300 * N * 8 * 4
    else:
        inputs = 4 * 8 + 2 * N
        assert whole - half < (1 << 17) * inputs * 4 / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": np.zeros((7, 4))}, ValueError, "u must have shape"),
        ({"u": np.zeros((7, 2, 4), int)}, TypeError, "u must be real"),
        ({"dt": np.zeros((7, 2, 3))}, ValueError, r"dt must have shape \(7, 2, 4\)"),
        ({"dt": np.zeros((7, 2, 4), np.complex64)}, TypeError, "dt must be real"),
        ({"A": np.zeros((5, 3))}, ValueError, "A must have shape"),
        ({"A": np.zeros(4)}, ValueError, r"A must have shape \(D, N\)"),
        ({"A": np.zeros((4, 3), int)}, TypeError, "A must be floating"),
        ({"B": np.zeros((7, 2, 5))}, ValueError, "B must have shape"),
        ({"B": np.zeros((7, 2, 3, 3))}, ValueError, "G a divisor of 4"),
        ({"C": np.zeros((7, 3))}, ValueError, "C must have shape"),
        ({"B": np.zeros((7, 2, 2, 3)), "C": np.zeros((7, 2, 4, 3))}, ValueError, "equally many groups"),
        ({"D": np.zeros(3)}, ValueError, "D must have shape"),
        ({"z": np.zeros((7, 2))}, ValueError, "z must have shape"),
        ({"h0": np.zeros((2, 3, 4))}, ValueError, "h0 must have shape"),
        ({"reset": np.zeros(7)}, TypeError, "reset must be bool"),
        ({"lengths": np.zeros(3, int)}, ValueError, "lengths must have shape"),
        ({"discretization": "tustin"}, ValueError, "discretization must be one of"),
        ({"method": "fast"}, ValueError, "method must be one of"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(case() | change))


def test_step_errors():
    c = {k: v[0] if k in ("u", "dt", "B", "C", "z") else v for k, v in case().items()}
    state = c.pop("h0")
    with pytest.raises(ValueError, match="state must have shape"):
        selective_state_update(state[:1], **c)
    with pytest.raises(ValueError, match=r"u must have shape \(B, D\)"):
        selective_state_update(state, **(c | {"u": c["u"][None]}))
