"""The neurons of spyx.nn against loops in float64, finite differences, and figures of spyx 1.0.0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import spiking

from spyx import axn, nn

NEURONS = ["ALIF", "IF", "LIF", "RIF", "RLIF", "CuBaLIF", "RCuBaLIF", "LI", "PSU_LIF", "AssociativeLIF"]
FAMILIES = ["LIF", "ALIF", "RCuBaLIF", "LI"]
SPIKING = [name for name in NEURONS if name != "LI"]
RECURRENT = ["RIF", "RLIF", "RCuBaLIF"]
DECAYS = {
    "ALIF": ("beta", "gamma"),
    "IF": (),
    "RIF": (),
    "CuBaLIF": ("alpha", "beta"),
    "RCuBaLIF": ("alpha", "beta"),
}
DOUBLE = ["ALIF", "CuBaLIF", "RCuBaLIF"]


def make(name, n=3, seed=0, **kwargs):
    """A neuron with recurrent weights large enough to matter."""
    neuron = getattr(nn, name)((n,), rngs=nnx.Rngs(seed), **kwargs)
    if name in RECURRENT:
        neuron.recurrent_w.set_value(40 * neuron.recurrent_w[...])
    return neuron


def oracle(name, neuron, x, **kwargs):
    values = {key: np.asarray(getattr(neuron, key)[...], np.float64) for key in DECAYS.get(name, ("beta",))}
    if name in RECURRENT:
        values["w"] = np.asarray(neuron.recurrent_w[...], np.float64)
    if name in ("PSU_LIF", "AssociativeLIF"):
        kwargs = {"threshold": 1.0, **kwargs}
    loop = {
        "ALIF": spiking.adaptive,
        "CuBaLIF": spiking.current_based,
        "RCuBaLIF": spiking.current_based,
        "LI": spiking.leaky,
        "PSU_LIF": spiking.leaky,
        "AssociativeLIF": spiking.leaky,
    }.get(name, spiking.integrate_and_fire)
    return loop(x, **values, **kwargs)


def noise(*shape, seed=0, dtype=jnp.float32):
    return 1.5 * jax.random.normal(jax.random.key(seed), shape, dtype)


UPSTREAM = {  # spyx 1.0.0, jax 0.10.2, Rngs(11), x = noise(23, 3, 5, seed=3): first parameters; sums of the outputs,
    # of the last state, and of the gradient of sum(outputs * x) with respect to x.
    "ALIF": ({"beta": [0.426163, 0.363974, 0.927239], "gamma": [0.566775, 0.000198, 0.501299]}, 63, 8.06226, -4.47695),
    "IF": ({}, 70, -49.35734, -0.65625),
    "LIF": ({"beta": [0.426163, 0.363974, 0.927239]}, 74, 5.08448, 2.42619),
    "RIF": ({"recurrent_w": [-0.002953, -0.005441, 0.01709]}, 70, -48.97020, -0.25849),
    "RLIF": (
        {"beta": [0.566775, 0.000198, 0.501299], "recurrent_w": [-0.002953, -0.005441, 0.01709]},
        72,
        8.39552,
        -2.97335,
    ),
    "CuBaLIF": (
        {"alpha": [0.426163, 0.363974, 0.927239], "beta": [0.566775, 0.000198, 0.501299]},
        125,
        39.18296,
        6.47124,
    ),
    "RCuBaLIF": (
        {
            "alpha": [0.566775, 0.000198, 0.501299],
            "beta": [0.586, 0.419202, 0.936573],
            "recurrent_w": [-0.002953, -0.005441, 0.01709],
        },
        112,
        27.15593,
        -6.58758,
    ),
    "LI": ({"beta": [0.8, 0.8, 0.8]}, 36.46921, 16.68602, 104.31149),
    "PSU_LIF": ({"beta": [0.426163, 0.363974, 0.927239]}, 123, 18.24868, -9.36097),
    "AssociativeLIF": ({"beta": [0.426163, 0.363974, 0.927239]}, 123, 18.24868, -9.36097),
}


@pytest.mark.parametrize("name", NEURONS)
def test_figures_of_upstream(name):
    parameters, outputs, state, gradient = UPSTREAM[name]
    neuron, x = getattr(nn, name)((5,), rngs=nnx.Rngs(11)), noise(23, 3, 5, seed=3)
    found = nnx.to_pure_dict(nnx.state(neuron))
    assert found.keys() == parameters.keys()
    for key, values in parameters.items():
        assert found[key].shape == ((5, 5) if key == "recurrent_w" else (5,))
        np.testing.assert_allclose(found[key].ravel()[:3], values, atol=6e-7)
    y, last = nn.run(neuron, x)
    np.testing.assert_allclose(y.sum(), outputs, atol=1e-4)
    np.testing.assert_allclose(last.sum(), state, atol=1e-4)
    grad = jax.grad(lambda v: jnp.sum(nn.run(neuron, v)[0] * x))(x)
    np.testing.assert_allclose(grad.sum(), gradient, atol=2e-4)


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (13, 2)])
def test_matches_the_float64_loop(name, shape):
    seed = int(np.random.default_rng().integers(1 << 30))
    with jax.enable_x64(True):
        neuron = make(name, seed=seed, param_dtype=jnp.float64)
        x = noise(*shape, 3, seed=seed, dtype=jnp.float64)
        y, last = nn.run(neuron, x)
    expected, state, margin = oracle(name, neuron, x)
    assert margin > 1e-11, "the input happens to meet the threshold"
    assert (y.dtype, last.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(last, state, atol=1e-12)


@pytest.mark.parametrize("name", NEURONS)
def test_float32_gives_the_same_spikes(name):
    neuron, x = make(name, seed=4), noise(29, 2, 3, seed=4)
    y, last = nn.run(neuron, x)
    expected, state, margin = oracle(name, neuron, x)
    assert margin > 1e-4
    np.testing.assert_allclose(y, expected, atol=0 if name in SPIKING else 1e-5)
    np.testing.assert_allclose(last, state, atol=1e-5)
    if name in SPIKING:
        assert set(np.unique(y)) == {0.0, 1.0}


@pytest.mark.parametrize("name", NEURONS)
def test_gradients_are_those_of_a_smooth_spike(name):
    """With a smooth spike function and its true derivative the gradient is that of finite differences."""

    def smooth(v):
        return 1 / (1 + np.exp(-3 * v))

    sigmoid = jax.nn.sigmoid
    activation = axn.custom(lambda v: 3 * sigmoid(3 * v) * sigmoid(-3 * v), lambda v: sigmoid(3 * v))
    rng = np.random.default_rng()
    with jax.enable_x64(True):
        kwargs = {} if name == "LI" else {"activation": activation}
        neuron = make(name, n=2, seed=1, param_dtype=jnp.float64, **kwargs)
        x, weight = rng.normal(size=(4, 1, 2)), rng.normal(size=(4, 1, 2))

        def loss(neuron, x):
            return jnp.sum(nn.run(neuron, x)[0] * weight)

        grads = nnx.to_pure_dict(nnx.grad(loss)(neuron, jnp.asarray(x)))
        found = {"x": np.asarray(jax.grad(partial(loss, neuron))(jnp.asarray(x)))}
        found |= {key: np.asarray(value) for key, value in grads.items()}

    def value():
        return float(np.sum(oracle(name, neuron, x, spike=smooth)[0] * weight))

    for key, gradient in found.items():
        for index in np.ndindex(gradient.shape):
            sides = []
            for h in (1e-5, -1e-5):
                if key == "x":
                    x[index] += h
                    sides.append(value())
                    x[index] -= h
                else:
                    with jax.enable_x64(True):
                        old = getattr(neuron, key)[...]
                        getattr(neuron, key).set_value(old.at[index].add(h))
                        sides.append(value())
                        getattr(neuron, key).set_value(old)
            expected = (sides[0] - sides[1]) / 2e-5
            np.testing.assert_allclose(gradient[index], expected, atol=1e-7, err_msg=f"{key}{index}")


@pytest.mark.parametrize("name", NEURONS)
def test_given_decays_draw_nothing(name):
    names = DECAYS.get(name, ("beta",))
    rngs = nnx.Rngs(3)
    neuron = getattr(nn, name)((4,), **{key: 0.25 for key in names}, rngs=rngs)
    for key in names:
        assert getattr(neuron, key).shape == ()
    assert int(rngs.params.count[...]) == (1 if name in RECURRENT else 0)
    unitwise = getattr(nn, name)((4,), **{key: np.full(4, 0.25) for key in names}, rngs=nnx.Rngs(3))
    x = noise(9, 2, 4)
    np.testing.assert_array_equal(nn.run(neuron, x)[0], nn.run(unitwise, x)[0])


@pytest.mark.parametrize("name", ["LIF", "LI", "CuBaLIF"])
def test_decays_are_clipped(name):
    x = noise(9, 2, 3)
    for given, limit in ((1.7, 1.0), (-0.4, 0.0)):
        kwargs = {"alpha": given} if name == "CuBaLIF" else {}
        other = {"alpha": limit} if name == "CuBaLIF" else {}
        outside = getattr(nn, name)((3,), beta=given, **kwargs, rngs=nnx.Rngs(0))
        at_limit = getattr(nn, name)((3,), beta=limit, **other, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(nn.run(outside, x)[0], nn.run(at_limit, x)[0])
        grads = nnx.grad(lambda m: jnp.sum(nn.run(m, x)[0]))(outside)
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", NEURONS)
def test_dtypes(name):
    neuron, low = make(name), make(name, param_dtype=jnp.bfloat16)
    state = neuron.initial_state(2) + 1.2
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))} <= {jnp.dtype(jnp.bfloat16)}
    assert low.initial_state(2).dtype == jnp.float32
    half = [(dtype, dtype) for dtype in (jnp.bfloat16, jnp.float16)]
    for dtype, out in (*half, (jnp.int8, jnp.float32), (bool, jnp.float32)):
        x = (2 * noise(2, 3)).astype(dtype)
        y, last = neuron(x, state)
        exact, expected = neuron(x.astype(jnp.float32), state)
        assert (y.dtype, last.dtype) == (out, jnp.float32)
        np.testing.assert_array_equal(y, exact.astype(out))
        np.testing.assert_array_equal(last, expected)
        assert [value.dtype for value in low(x, state)] == [out, jnp.float32]
    _, last = neuron(noise(2, 3), state.astype(jnp.bfloat16))
    assert last.dtype == jnp.bfloat16, "a step keeps the dtype of its state"


@pytest.mark.parametrize("name", FAMILIES)
def test_float64_input_has_a_float64_state(name):
    with jax.enable_x64(True):
        neuron = make(name)
        y, last = nn.run(neuron, noise(7, 2, 3, dtype=jnp.float64))
        assert (y.dtype, last.dtype) == (jnp.float64, jnp.float64)
        y, last = nn.run(neuron, noise(7, 2, 3))
        assert (y.dtype, last.dtype) == (jnp.float32, jnp.float32)
        _, last = neuron(noise(2, 3, dtype=jnp.float64), neuron.initial_state(2))
        assert last.dtype == jnp.float32, "a step keeps the dtype of its state"
        drawn = {key: np.asarray(v) for key, v in nnx.to_pure_dict(nnx.state(neuron)).items()}
    for key, value in nnx.to_pure_dict(nnx.state(make(name))).items():
        np.testing.assert_array_equal(value, drawn[key])


@pytest.mark.parametrize("name", [*FAMILIES, "RLIF"])
def test_more_than_one_hidden_axis(name):
    """Units on a grid are the same units in a row."""
    shape, n = (2, 3), 6
    grid, row, x = getattr(nn, name)(shape, rngs=nnx.Rngs(5)), make(name, n, seed=5), noise(11, 2, n)
    state = grid.initial_state(2)
    assert state.shape == (2, *shape[:-1], shape[-1] * (2 if name in DOUBLE else 1))
    for key, value in nnx.to_pure_dict(nnx.state(row)).items():
        assert getattr(grid, key).shape == (shape * 2 if key == "recurrent_w" else shape)
        getattr(grid, key).set_value(value.reshape(getattr(grid, key).shape))
    y, last = nn.run(grid, x.reshape(11, 2, *shape))
    expected, state = nn.run(row, x)
    np.testing.assert_allclose(y.reshape(x.shape), expected, atol=1e-6)
    parts = 2 if name in DOUBLE else 1
    split = [part.reshape(2, n) for part in jnp.split(last, parts, axis=-1)]
    np.testing.assert_allclose(jnp.concatenate(split, -1), state, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES[:-1], "PSU_LIF"])
def test_thresholds(name):
    x = noise(15, 2, 3)
    low, high = (nn.run(make(name, threshold=value), x)[0] for value in (0.25, 4.0))
    per_unit = make(name, threshold=np.array([0.25, 4.0, 0.25]))
    y = nn.run(per_unit, x)[0]
    if name not in RECURRENT:
        np.testing.assert_array_equal(y, jnp.where(jnp.array([True, False, True]), low, high))
    trained = make(name, threshold=nnx.Param(jnp.array([0.25, 4.0, 0.25])))
    np.testing.assert_array_equal(nn.run(trained, x)[0], y)
    grads = nnx.grad(lambda m: jnp.sum(nn.run(m, x)[0] * x))(trained)
    assert np.all(grads["threshold"][...] != 0)


@pytest.mark.parametrize("name", ["LI", "PSU_LIF"])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (31, 2)])
def test_parallel_equals_run(name, shape):
    neuron, x = make(name, seed=2), noise(*shape, 3, seed=2)
    y, last = nn.run(neuron, x)
    whole, state = neuron.parallel(x, return_state=True)
    assert (whole.dtype, state.dtype) == (y.dtype, last.dtype)
    np.testing.assert_allclose(whole, y, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)
    np.testing.assert_array_equal(neuron.parallel(x), whole)
    for cut in {0, min(1, shape[0]), shape[0] // 2}:
        first, state = neuron.parallel(x[:cut], neuron.initial_state(shape[1]), return_state=True)
        second, state = neuron.parallel(x[cut:], state, return_state=True)
        np.testing.assert_allclose(jnp.concatenate([first, second]), y, atol=1e-5)
        np.testing.assert_allclose(state, last, atol=1e-5)
    weight = noise(*shape, 3, seed=9)
    by_run, by_parallel = (
        nnx.grad(lambda m, f=f: jnp.sum(f(m) * weight))(neuron)
        for f in (lambda m: nn.run(m, x)[0], lambda m: m.parallel(x))
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), by_run, by_parallel)
    assert neuron.parallel(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert neuron.parallel(x > 0).dtype == jnp.float32


def test_associative_lif_is_the_state_leaky_of_snntorch():
    """Its kernel exp(-(t - s) (1 - beta)), summed directly."""
    beta, x = 0.9, np.random.default_rng().normal(size=(17, 2, 3))
    V = np.array([sum(np.exp(-(t - s) * (1 - beta)) * x[s] for s in range(t + 1)) for t in range(17)])
    converted = nn.AssociativeLIF.beta_from_snntorch(beta)
    read = axn.custom(jnp.ones_like, lambda v: v)
    neuron = nn.AssociativeLIF((3,), beta=converted, activation=read, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(neuron.parallel(x) + 1.0, V, atol=1e-5)
    np.testing.assert_allclose(nn.AssociativeLIF.snntorch_beta_from_beta(converted), beta, rtol=1e-6)


def test_recurrent_weights_go_from_row_to_column():
    neuron = nn.RIF((2,), rngs=nnx.Rngs(0))
    neuron.recurrent_w.set_value(jnp.array([[0.0, 5.0], [0.0, 0.0]]))
    spikes, V = neuron(jnp.zeros((1, 2)), jnp.array([[2.0, 0.0]]))
    np.testing.assert_array_equal(spikes, [[1, 0]])
    np.testing.assert_array_equal(V, [[1, 5]])


@pytest.mark.parametrize("name", RECURRENT)
def test_precision_reaches_the_product(name):
    neuron, x = make(name, precision="highest"), noise(2, 3)
    lowered = jax.jit(neuron.__call__).lower(x, neuron.initial_state(2)).as_text()
    assert "HIGHEST" in lowered
    default = jax.jit(make(name).__call__).lower(x, neuron.initial_state(2)).as_text()
    assert "HIGHEST" not in default


@pytest.mark.parametrize("name", FAMILIES)
def test_constructed_abstractly_and_split(name):
    abstract = nnx.eval_shape(lambda: make(name))
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(abstract)))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(make(name))))
    graphdef, state = nnx.split(make(name))
    x = noise(4, 2, 3)
    again = jax.jit(lambda state: nn.run(nnx.merge(graphdef, state), x)[0])(state)
    np.testing.assert_array_equal(again, nn.run(make(name), x)[0])


@pytest.mark.parametrize("name", NEURONS)
def test_errors_say_what_was_expected(name):
    cls, neuron, x = getattr(nn, name), make(name), noise(2, 3)
    state = neuron.initial_state(2)
    with pytest.raises(ValueError, match=rf"{name} expects input \[B, 3\]; got shape \(2, 4\)"):
        neuron(noise(2, 4), state)
    with pytest.raises(ValueError, match=rf"{name} expects a state of shape .* got \(5, "):
        neuron(x, neuron.initial_state(5))
    with pytest.raises(ValueError, match=r"initial_state\(batch_size\)"):
        neuron(x, None)
    with pytest.raises(TypeError, match="real input; got complex64"):
        neuron(x.astype(jnp.complex64), state)
    for shape in ((), (3, 0), (2.5,), -1):
        with pytest.raises(ValueError, match=f"{name}: (hidden|layer)_shape must be a positive integer"):
            cls(shape, rngs=nnx.Rngs(0))
    for key in DECAYS.get(name, ("beta",)):
        with pytest.raises(ValueError, match=rf"{name}: {key} must be .* \(3,\), got shape \(2,\)"):
            cls((3,), **{key: jnp.ones(2)}, rngs=nnx.Rngs(0))
    if name == "LI":
        assert nn.LI((3,)).layer_shape == (3,)
        return
    with pytest.raises(ValueError, match=rf"{name}: threshold must be .* got shape \(2, 3\)"):
        cls((3,), threshold=jnp.ones((2, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="activation must be a function"):
        cls((3,), activation="superspike", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"activation=axn.superspike\(\)"):
        cls((3,), activation=axn.superspike, rngs=nnx.Rngs(0))(x, state)


@pytest.mark.parametrize("name", ["LI", "PSU_LIF"])
def test_errors_of_parallel(name):
    neuron = make(name)
    with pytest.raises(ValueError, match=r"expects \[T, B, 3\]; got shape \(3,\)"):
        neuron.parallel(jnp.ones(3))
    with pytest.raises(ValueError, match=r"a state of shape \(2, 3\)"):
        neuron.parallel(noise(5, 2, 3), neuron.initial_state(1))
    with pytest.raises(TypeError, match="complex64"):
        neuron.parallel(noise(5, 2, 3).astype(jnp.complex64))


def test_an_integer_is_a_shape():
    assert nn.LIF(3, rngs=nnx.Rngs(0)).initial_state(2).shape == (2, 3)
    assert nn.ALIF(np.int64(3), rngs=nnx.Rngs(0)).initial_state(2).shape == (2, 6)
