"""compat_torch.models.lti: both arithmetics, every discretization, streaming, masks, dtypes, errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.lti import diagonal_layer

import compat_torch
from compat_torch.errors import ReferenceDefectWarning
from compat_torch.models.lti import LRU, S5

DISCRETIZATIONS = ("zoh", "bilinear", "dirac", "no_discretization")
STABLE = [
    (S5, {"discretization": "zoh"}),
    (S5, {"discretization": "dirac"}),
    (S5, {"discretization": "bilinear", "reference": "paper"}),
    (S5, {"discretization": "no_discretization", "reference": "paper"}),
    (S5, {"discretization": "zoh", "conj_sym": True}),
    (LRU, {}),
    (LRU, {"r_min": 0.5, "r_max": 0.9, "max_phase": 0.3}),
]


def make(cls, d_model=3, d_state=6, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceDefectWarning)
        return cls(d_model, d_state, **kwargs, rngs=nnx.Rngs(3))


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def by_definition(layer, x):
    """lrnnx's formulas in NumPy, 64 bits, from the stored parameters alone."""
    p = {name: np.asarray(value, np.float64) for name, value in layer.state_dict().items()}
    if isinstance(layer, LRU):
        lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
        B = np.exp(p["gamma_log"])[:, None] * (p["B_re"] + 1j * p["B_im"])
        return diagonal_layer(np.swapaxes(x, 0, 1), lam, B, p["C_re"] + 1j * p["C_im"], p["D"])
    dt = np.exp(p["log_dt"])
    A = -np.logaddexp(0, p["A"][:, 0]) + 1j * p["A"][:, 1]
    sign = 1 if layer.reference == "lrnnx" else -1
    if layer.discretization == "zoh":
        lam, gamma = np.exp(dt * A), (np.exp(dt * A) - 1) / A
    elif layer.discretization == "bilinear":
        lam, gamma = (1 - sign * dt * A / 2) / (1 + sign * dt * A / 2), dt / (1 + sign * dt * A / 2)
    elif layer.discretization == "dirac":
        lam, gamma = np.exp(dt * A), np.ones_like(dt)
    else:
        lam, gamma = A if sign == 1 else p["A"][:, 0] + 1j * p["A"][:, 1], np.ones_like(dt)
    C = p["C"][..., 0] + 1j * p["C"][..., 1]
    u = np.swapaxes(x, 0, 1)
    return diagonal_layer(u, lam, gamma[:, None] * p["B"], C, p["D"].T, conj_sym=layer.conj_sym)


@pytest.mark.parametrize("reference", ["lrnnx", "paper"])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("conj_sym", [False, True])
def test_s5_is_its_definition(discretization, reference, conj_sym):
    layer = make(S5, discretization=discretization, reference=reference, conj_sym=conj_sym)
    x = noise(2, 7, 3)
    expected = np.swapaxes(by_definition(layer, x)[0], 0, 1)
    np.testing.assert_allclose(layer(x), expected, atol=5e-6 * max(1, np.abs(expected).max()))


def test_lru_is_its_definition():
    layer, x = make(LRU), noise(2, 17, 3)
    np.testing.assert_allclose(layer(x), np.swapaxes(by_definition(layer, x)[0], 0, 1), atol=5e-6)


def test_the_two_arithmetics_differ_only_where_documented():
    x = noise(2, 7, 3)
    for discretization in DISCRETIZATIONS:
        ours = make(S5, discretization=discretization, reference="lrnnx")
        paper = make(S5, discretization=discretization, reference="paper")
        paper.load_state_dict(ours.state_dict())
        same = np.allclose(ours(x), paper(x))
        assert same == (discretization in ("zoh", "dirac")), discretization


@pytest.mark.parametrize("discretization", ["bilinear", "no_discretization"])
def test_paper_arithmetic_is_stable_and_lrnnx_warns(discretization):
    with pytest.warns(ReferenceDefectWarning, match=f'discretization="{discretization}"'):
        S5(3, 6, discretization, rngs=nnx.Rngs(0))
    layer = make(S5, discretization=discretization, reference="paper")
    A_bar, _, _ = layer.discretize()
    assert np.all(np.abs(A_bar) <= 1)
    assert np.isfinite(layer(noise(1, 1000, 3))).all()


def test_conj_sym_is_the_full_system_of_conjugate_pairs():
    half = make(S5, discretization="zoh", conj_sym=True)
    full = make(S5, discretization="zoh")
    p = half.state_dict()
    mirror = jnp.array([1.0, -1.0])
    full.load_state_dict(
        {
            "A": jnp.concatenate([p["A"], p["A"] * mirror]),
            "B": jnp.concatenate([p["B"], p["B"]]),
            "log_dt": jnp.concatenate([p["log_dt"], p["log_dt"]]),
            "C": jnp.concatenate([p["C"], p["C"] * mirror], axis=1),
            "D": p["D"],
        }
    )
    x = noise(2, 9, 3)
    np.testing.assert_allclose(half(x), full(x), atol=1e-5)
    assert half.allocate_inference_cache(2)["lrnn_state"].shape == (2, 3)


@pytest.mark.parametrize(("cls", "kwargs"), STABLE)
def test_whole_equals_prefill_equals_steps(cls, kwargs):
    layer, x = make(cls, **kwargs), noise(2, 11, 3)
    whole = layer(x)
    for cut in (0, 1, 6, 11):
        cache = layer.allocate_inference_cache(2)
        first, cache = layer(x[:, :cut], inference_cache=cache)
        second, cache = layer(x[:, cut:], inference_cache=cache)
        np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=2e-6)
    cache, steps = layer.allocate_inference_cache(2), []
    before = dict(cache)
    for t in range(11):
        y, cache = layer.step(x[:, t], cache)
        steps.append(y)
    np.testing.assert_allclose(jnp.stack(steps, 1), whole, atol=2e-6)
    np.testing.assert_array_equal(before["lrnn_state"], 0)
    assert cache.keys() == before.keys()


@pytest.mark.parametrize(("cls", "kwargs"), STABLE)
def test_lengths_equal_unpadded_rows(cls, kwargs):
    layer, lengths = make(cls, **kwargs), jnp.array([0, 3, 9])
    x = jnp.where(jnp.arange(9)[None, :, None] < lengths[:, None, None], noise(3, 9, 3), jnp.nan)
    y, cache = layer(x, lengths=lengths, inference_cache=layer.allocate_inference_cache(3))
    for row, length in enumerate(lengths.tolist()):
        alone, last = layer(x[row : row + 1, :length], inference_cache=layer.allocate_inference_cache(1))
        np.testing.assert_allclose(y[row, :length], alone[0], atol=2e-6)
        np.testing.assert_array_equal(y[row, length:], 0)
        np.testing.assert_allclose(cache["lrnn_state"][row], last["lrnn_state"][0], atol=2e-6)
    grads = nnx.grad(lambda m: jnp.sum(m(x, lengths=lengths)))(layer)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(("cls", "kwargs"), STABLE)
def test_kernel_and_discretize_describe_the_layer(cls, kwargs):
    layer, L = make(cls, **kwargs), 6
    A_bar, middle, C = layer.discretize()
    powers, B_bar = layer.compute_kernel(L, A_bar, middle)
    N = 3 if kwargs.get("conj_sym") else 6
    assert (A_bar.shape, powers.shape, B_bar.shape, C.shape) == ((N,), (N, L), (N, 3), (3, N))
    kernel = np.einsum("hn,nl,ni->lhi", C, powers, B_bar).real * (2 if kwargs.get("conj_sym") else 1)
    impulse = jnp.zeros((3, L, 3)).at[jnp.arange(3), 0, jnp.arange(3)].set(1.0)
    y = np.asarray(layer(impulse)).copy()
    D = np.asarray(layer.D[...])
    y[:, 0] -= np.diag(D) if D.ndim == 1 else D
    np.testing.assert_allclose(y, kernel.transpose(2, 0, 1), atol=2e-6)


@pytest.mark.parametrize(("cls", "kwargs"), STABLE)
def test_dtypes(cls, kwargs):
    x, single = noise(2, 9, 3), make(cls, **kwargs)
    small = make(cls, **kwargs, dtype=jnp.bfloat16)
    assert small.state_dict()["D"].dtype == jnp.bfloat16
    y, cache = small(x, inference_cache=small.allocate_inference_cache(2))
    assert (y.dtype, cache["lrnn_state"].dtype) == (jnp.bfloat16, jnp.complex64)
    with jax.enable_x64(True):
        layer = make(cls, **kwargs, dtype=jnp.float64)
        layer.load_state_dict(single.state_dict(), dtype=jnp.float64)
        y = layer(x)
        assert y.dtype == jnp.float64
        assert layer.allocate_inference_cache(1)["lrnn_state"].dtype == jnp.complex128
        np.testing.assert_allclose(y, np.swapaxes(by_definition(layer, x)[0], 0, 1), atol=1e-12)
    np.testing.assert_allclose(single(x), y, atol=5e-6)


@pytest.mark.parametrize(("cls", "kwargs"), STABLE)
def test_jit_vmap_grad(cls, kwargs):
    layer, x = make(cls, **kwargs), noise(4, 2, 5, 3)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x[0]), layer(x[0]), atol=2e-6)
    np.testing.assert_allclose(jax.vmap(layer)(x), layer(x.reshape(8, 5, 3)).reshape(x.shape), atol=2e-6)
    direction = noise(2, 5, 3, seed=1)
    _, slope = jax.jvp(lambda x: jnp.sum(make(cls, **kwargs)(x) ** 2), (x[0],), (direction,))
    gradient = jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x[0])
    np.testing.assert_allclose(slope, jnp.vdot(gradient, direction), rtol=1e-4)


def test_batch_rows_are_independent_and_empty_inputs_work():
    layer, x = make(LRU), noise(3, 5, 3)
    bad = x.at[1].set(jnp.nan)
    np.testing.assert_array_equal(layer(bad)[::2], layer(x)[::2])
    assert layer(x[:, :0]).shape == (3, 0, 3)
    assert layer(x[:0]).shape == (0, 5, 3)


def test_forward_is_call_and_loaded_in_train_or_eval_alike():
    layer, x = make(LRU), noise(1, 4, 3)
    expected = layer(x)
    layer.eval()
    np.testing.assert_array_equal(layer.forward(x), expected)
    layer.train()
    np.testing.assert_array_equal(layer.forward(x), expected)


def test_initialisation_has_the_reference_distributions():
    s5, lru = make(S5, 4, 8, discretization="zoh"), make(LRU, 200, 300, r_min=0.6, r_max=0.9, max_phase=0.5)
    p = s5.state_dict()
    np.testing.assert_allclose(np.logaddexp(0, p["A"][:, 0]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(p["A"][:, 1], np.pi * np.arange(8), rtol=1e-6)
    np.testing.assert_allclose(p["log_dt"], np.linspace(np.log(1e-3), np.log(0.1), 8), rtol=1e-6)
    np.testing.assert_allclose(p["B"], 0.5)
    p = lru.state_dict()
    radius = np.exp(-np.exp(p["nu_log"]))
    assert 0.6 <= radius.min() < 0.61
    assert 0.89 < radius.max() <= 0.9
    np.testing.assert_allclose(np.exp(2 * p["gamma_log"]), 1 - radius**2, rtol=1e-4)
    assert np.exp(p["theta_log"]).max() <= 0.5
    np.testing.assert_allclose(np.std(p["B_re"]), (2 * 200) ** -0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(p["C_im"]), 300**-0.5, rtol=0.02)


@pytest.mark.parametrize("rngs", [3, jax.random.key(0)])
def test_a_seed_or_a_key_in_place_of_rngs_raises(rngs):
    with pytest.raises(TypeError, match=r"rngs must be flax\.nnx\.Rngs, as nnx\.Rngs\(0\) makes them, got "):
        compat_torch.LRU(4, 6, rngs=rngs)


def test_layers_without_rngs_never_share_weights_and_manual_seed_repeats_them():
    compat_torch.manual_seed(5)
    first, second = LRU(3, 4), LRU(3, 4)
    assert not np.allclose(first.state_dict()["C_re"], second.state_dict()["C_re"])
    compat_torch.manual_seed(5)
    np.testing.assert_array_equal(LRU(3, 4).state_dict()["C_re"], first.state_dict()["C_re"])


def test_constructors_work_without_initialising():
    layer = nnx.eval_shape(lambda: S5(4096, 4096, "zoh"))
    assert layer.state_dict.__self__ is layer
    assert isinstance(layer.D.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"discretization": "euler"}, r"discretization must be one of \('zoh'.*got 'euler'"),
        ({"discretization": "async"}, r"got 'async'; for event streams use compat_torch.models.ltv"),
        ({"discretization": "zoh", "reference": "other"}, r"reference must be one of .*'other'"),
        ({"discretization": "zoh", "conj_sym": True, "d_state": 5}, r"d_state must be even, got 5"),
        ({"discretization": "zoh", "d_model": 0}, r"d_model must be a positive integer, got 0"),
        ({"discretization": "zoh", "d_state": 2.0}, r"d_state must be a positive integer, got 2.0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(S5, **kwargs)


@pytest.mark.parametrize(("cls", "kwargs"), STABLE[::5])
def test_bad_inputs(cls, kwargs):
    layer, cache = make(cls, **kwargs), make(cls, **kwargs).allocate_inference_cache(2)
    with pytest.raises(ValueError, match=r"\(B, L, H\) with H = 3, got shape \(5, 3\)"):
        layer(noise(5, 3))
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 4\)"):
        layer(noise(2, 5, 4))
    with pytest.raises(TypeError, match="int32"):
        layer(jnp.ones((2, 5, 3), jnp.int32))
    with pytest.raises(TypeError, match="complex64"):
        layer(jnp.ones((2, 5, 3), jnp.complex64))
    with pytest.raises(ValueError, match="time-invariant and cannot use integration_timesteps"):
        layer(noise(2, 5, 3), jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="lengths must have shape"):
        layer(noise(2, 5, 3), lengths=jnp.ones((3,), jnp.int32))
    with pytest.raises(TypeError, match="lengths must be integers"):
        layer(noise(2, 5, 3), lengths=jnp.ones((2,)))
    with pytest.raises(ValueError, match=r"\(B, H\)"):
        layer.step(noise(2, 1, 3), cache)
    with pytest.raises(ValueError, match="inference_cache must have the keys"):
        layer.step(noise(2, 3), {"lrnn_state": cache["lrnn_state"]})
    with pytest.raises(ValueError, match=r"lrnn_state must have shape \(3, "):
        layer.step(noise(3, 3), cache)
    with pytest.raises(ValueError, match="batch_size"):
        layer.allocate_inference_cache(0)


@pytest.mark.parametrize("kwargs", [{"r_min": 0.9, "r_max": 0.1}, {"r_max": 1.5}, {"max_phase": 0.0}])
def test_bad_lru_ranges(kwargs):
    with pytest.raises(ValueError, match="LRU"):
        make(LRU, **kwargs)


@pytest.mark.parametrize(("cls", "kwargs"), STABLE[::5])
def test_a_cache_keeps_its_dtypes_so_that_steps_can_be_scanned(cls, kwargs):
    with jax.enable_x64(True):
        layer = make(cls, **kwargs, param_dtype=jnp.float32)
        x = noise(5, 2, 3, dtype=jnp.float64)

        def step(cache, x_t):
            y, cache = layer.step(x_t, cache)
            return cache, y

        _, y = jax.lax.scan(step, layer.allocate_inference_cache(2), x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(jnp.swapaxes(y, 0, 1), layer(jnp.swapaxes(x, 0, 1)), atol=2e-6)
