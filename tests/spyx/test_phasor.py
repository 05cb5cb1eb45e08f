"""spyx.phasor: codes, layers, training, spiking conversion, resonate-and-fire."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from spyx import phasor


def uniform(*shape, seed=0, low=-np.pi, high=np.pi):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def make(depth=2, **kwargs):
    return phasor.PhasorMLP(3, 5, 2, depth=depth, rngs=nnx.Rngs(0), **kwargs)


def mlp_oracle(model, x):
    """The network in numpy, complex128."""
    values = {path: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(model))}
    z = np.exp(1j * np.pi * np.asarray(x, np.float64))
    for k in range(0, 2 * (len(model.layers) // 2), 2):
        get = lambda name, k=k: values["layers", k, f"{name}_re"] + 1j * values["layers", k, f"{name}_im"]  # noqa: E731
        z = z @ get("kernel") + get("bias")
        z = z / (np.abs(z) + 1e-8)
    return (z @ (values["readout", "proj", "kernel_re"] + 1j * values["readout", "proj", "kernel_im"])).real


def test_real_to_phasor():
    x = uniform(3, 4)
    z = phasor.real_to_phasor(x, scale=0.7)
    assert z.dtype == jnp.complex64
    np.testing.assert_allclose(z, np.exp(0.7j * x), atol=1e-6)
    np.testing.assert_allclose(phasor.real_to_phasor(jnp.array([0, 1])), [1, -1], atol=1e-6)
    np.testing.assert_allclose(phasor.phasor_to_real(z), np.cos(0.7 * x), atol=1e-6)
    np.testing.assert_allclose(phasor.phase_of(phasor.real_to_phasor(x, scale=1)), x, atol=1e-6)
    with jax.enable_x64(True):
        assert phasor.real_to_phasor(np.float64(0.3)).dtype == jnp.complex128
    with pytest.raises(TypeError, match="complex64"):
        phasor.real_to_phasor(z)


@pytest.mark.parametrize("T", [1, 2, 7, 16, 64])
def test_round_trip_is_close_and_unbiased(T):
    edges = np.array([-np.pi, np.pi, 0.0, np.nextafter(np.float32(np.pi), np.float32(0))], np.float32)
    theta = np.concatenate([edges, uniform(20000, seed=T)])
    spikes = phasor.phase_to_spikes(theta, T)
    np.testing.assert_array_equal(spikes.sum(0), 1)
    exact = (theta.astype(np.float64) + np.pi) / (2 * np.pi) * T
    assert np.abs(np.argmax(spikes, 0) + 0.5 - exact).max() <= 0.5 + 1e-5 * T
    error = np.asarray(phasor.spikes_to_phase(spikes), np.float64) - theta
    assert np.abs(error).max() <= np.pi / T + 1e-6
    assert np.abs(error).max() <= 2 * np.pi / T
    standard_error = 2 * np.pi / T / np.sqrt(12 * len(theta))
    assert abs(error.mean()) < 4 * standard_error


def test_phases_out_of_range_are_wrapped():
    middles = (np.arange(5) + 0.5) / 5 * 2 * np.pi - np.pi
    for turns in (-2, 0, 1, 3):
        np.testing.assert_array_equal(phasor.phase_to_spikes(middles + 2 * np.pi * turns, 5), np.eye(5))


def test_silent_and_repeated_spikes():
    spikes = np.zeros((8, 3), np.float32)
    spikes[[1, 4], 1] = 1
    spikes[[0, 7], 2] = [1, 3]
    expected = [0, np.pi * (2 * 3 / 8 - 1), np.pi * (2 * (0.5 + 3 * 7.5) / 4 / 8 - 1)]
    np.testing.assert_allclose(phasor.spikes_to_phase(spikes), expected, atol=1e-6)
    np.testing.assert_allclose(phasor.spikes_to_phase(spikes.astype(bool)[:, :2], 8), expected[:2], atol=1e-6)
    gradient = jax.grad(lambda s: phasor.spikes_to_phase(s).sum())(jnp.asarray(spikes))
    assert np.isfinite(gradient).all()


def test_codes_refuse_what_is_no_cycle():
    with pytest.raises(ValueError, match="T must be a positive integer, got 0"):
        phasor.phase_to_spikes(0.0, 0)
    for spikes, T in ((np.ones((6, 2)), 5), (np.ones((0, 2)), None), (np.ones(()), None)):
        with pytest.raises(ValueError, match="one cycle"):
            phasor.spikes_to_phase(spikes, T)


def test_parameters_are_those_of_spyx_1_0_0():
    model = make(depth=3)
    shapes = {path: v.shape for path, v in nnx.to_flat_state(nnx.state(model))}
    parts = [("kernel", (5, 5)), ("bias", (5,))]
    expected = {("layers", k, f"{n}_{p}"): s for k in (0, 2, 4) for n, s in parts for p in ("re", "im")}
    expected |= {("layers", 0, f"kernel_{p}"): (3, 5) for p in ("re", "im")}
    expected |= {("readout", "proj", f"kernel_{p}"): (5, 2) for p in ("re", "im")}
    assert shapes == expected
    first = model.layers[0]
    np.testing.assert_allclose(
        first.kernel_re[0], [-0.23465303, 0.32653195, -0.10598406, 0.5837432, -0.21384147], rtol=1e-5
    )
    np.testing.assert_allclose(
        first.kernel_im[0], [-0.5133631, -0.16395432, -0.45779335, 0.35859624, -0.35181], rtol=1e-5
    )
    y = model(jax.random.uniform(jax.random.key(3), (7, 3)))
    np.testing.assert_allclose(y[0], [-0.3326943, -0.6292836], atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (1,), (4, 7)])
def test_mlp_matches_numpy(depth, batch):
    model, x = make(depth), uniform(*batch, 3, low=0, high=1)
    y = model(x)
    np.testing.assert_allclose(y, mlp_oracle(model, x), atol=2e-5)
    np.testing.assert_allclose(model(phasor.real_to_phasor(x)), y, atol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        model = make(param_dtype=jnp.float64)
        x = np.random.default_rng(1).uniform(0, 1, (4, 3))
        assert model.layers[0].kernel.dtype == jnp.complex128
        np.testing.assert_allclose(model(x), mlp_oracle(model, x), atol=1e-12)


def test_activation_is_finite_at_zero():
    activation = phasor.PhasorActivation()

    def loss(re, im):
        z = activation(jax.lax.complex(re, im))
        return jnp.sum(z.real + 2 * z.imag + phasor.phase_of(z))

    re, im = (jnp.array(v, jnp.float32) for v in ([0.0, 3.0, 1e-30, 1e25], [0.0, -4.0, 0.0, 1e25]))
    z = activation(jax.lax.complex(re, im))
    np.testing.assert_allclose(z, [0, 0.6 - 0.8j, 0, np.sqrt(0.5) * (1 + 1j)], atol=1e-6)
    for gradient in jax.grad(loss, (0, 1))(re, im):
        assert np.isfinite(gradient).all()
    zero = jnp.zeros(1, jnp.complex64)
    assert phasor.phase_of(zero)[0] == 0
    np.testing.assert_allclose(phasor.phase_of(jnp.array([1e-25j, -1e-18 + 0j])), [np.pi / 2, np.pi], rtol=1e-6)
    gradient = jax.grad(lambda r: jnp.sum(phasor.phase_of(jax.lax.complex(r, r))))(jnp.zeros(1))
    assert np.isfinite(gradient).all()


def test_zero_weights_have_finite_gradients():
    model = make()
    model.layers[0].kernel_re.set_value(jnp.zeros((3, 5)))
    model.layers[0].kernel_im.set_value(jnp.zeros((3, 5)))
    gradients = nnx.grad(lambda m: jnp.sum(m(uniform(4, 3)) ** 2))(model)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        model = make(param_dtype=jnp.float64)
        x = np.random.default_rng(2).uniform(0, 1, (4, 3))
        graphdef, params = nnx.split(model)
        check_grads(lambda p: nnx.merge(graphdef, p)(x), (params,), order=1, modes=["rev"], atol=1e-6)


def rings(count, seed):
    """Points in a disc, or in the ring around it: no line divides them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    angle, radius = rng.uniform(0, 2 * np.pi, count), rng.uniform(0, 0.2, count) + 0.25 * labels
    return (0.5 + np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)).astype(np.float32), labels


def run_spiking(model, x, T):
    spikes = phasor.phase_to_spikes(phasor.phase_of(phasor.real_to_phasor(x)), T)
    for layer in list(model.layers)[::2]:
        spikes = phasor.SpikingPhasor(layer, T)(spikes)
    return model.readout(phasor.real_to_phasor(phasor.spikes_to_phase(spikes), scale=1.0))


def test_trains_with_adam_and_runs_as_spikes():
    (x, labels), (x_test, labels_test) = rings(256, 0), rings(256, 1)
    model = phasor.PhasorMLP(2, 16, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(m):
            return optax.softmax_cross_entropy_with_integer_labels(m(x), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(train_step(model, optimizer)) for _ in range(120)]
    assert losses[-1] < 0.1 * losses[0]
    logits = model(x_test)
    assert np.mean(logits.argmax(-1) == labels_test) > 0.95
    errors = [float(jnp.abs(run_spiking(model, x_test, T) - logits).mean()) for T in (16, 256)]
    assert errors[1] < errors[0] / 4
    assert np.mean(run_spiking(model, x_test, 64).argmax(-1) == labels_test) > 0.95


def test_spiking_layer_equals_its_parts():
    layer = phasor.PhasorLinear(4, 6, rngs=nnx.Rngs(3))
    theta = uniform(5, 4)
    spiking = phasor.SpikingPhasor(layer, period_T=16)
    out = spiking(phasor.phase_to_spikes(theta, 16))
    assert out.shape == (16, 5, 6)
    centre = (np.floor((theta.astype(np.float64) + np.pi) / (2 * np.pi) * 16) + 0.5) / 16 * 2 * np.pi - np.pi
    z = np.exp(1j * centre) @ np.asarray(layer.kernel)
    np.testing.assert_allclose(phasor.spikes_to_phase(out), np.angle(z), atol=np.pi / 16 + 1e-4)
    silent = spiking(jnp.zeros((16, 1, 4)))
    np.testing.assert_array_equal(silent, phasor.phase_to_spikes(phasor.phase_of(layer(jnp.ones((1, 4), complex))), 16))
    layer.kernel_re.set_value(layer.kernel_re[...] + 1)
    assert spiking.layer is layer


def test_errors():
    layer = phasor.PhasorLinear(4, 6, rngs=nnx.Rngs(3))
    assert phasor.PhasorLinear(4, 6, use_bias=False, rngs=nnx.Rngs(3)).bias is None
    with pytest.raises(TypeError, match=r"float32.*real_to_phasor"):
        layer(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"in_features=4.*\(2, 3\)"):
        layer(jnp.ones((2, 3), complex))
    with pytest.raises(ValueError, match="depth must be a positive integer, got 0"):
        make(depth=0)
    with pytest.raises(ValueError, match="out_features must be a positive integer, got -1"):
        phasor.PhasorLinear(4, -1, rngs=nnx.Rngs(3))
    with pytest.raises(ValueError, match="eps must be positive"):
        phasor.PhasorActivation(0.0)
    with pytest.raises(ValueError, match="period_T must be a positive integer, got 0"):
        phasor.SpikingPhasor(layer, 0)
    with pytest.raises(TypeError, match="must be a PhasorLinear, got PhasorMLP"):
        phasor.SpikingPhasor(make(), 8)
    with pytest.raises(ValueError, match="one cycle"):
        phasor.SpikingPhasor(layer, 8)(jnp.ones((7, 1, 4)))


def resonate(**kwargs):
    return phasor.ResonateFire((4,), rngs=nnx.Rngs(5), **kwargs)


def resonate_oracle(layer, x, z):
    a = np.asarray(layer.a, np.complex128)
    spikes = []
    for x_t in np.asarray(x, np.float64):
        z = a * z + x_t
        spikes.append(z.real > layer.threshold)
    return np.array(spikes, np.float32).reshape(x.shape), z


def test_resonate_parameters_are_those_of_spyx_1_0_0():
    layer = resonate()
    np.testing.assert_allclose(layer.raw_lambda[...], [0.59883595, 0.7677827, 0.3424331, 0.78749573], rtol=1e-5)
    np.testing.assert_allclose(layer.omega[...], [0.36698145, 0.6493119, 0.43677002, 0.70718986], rtol=1e-5)
    given_ = resonate(lambda_init=0.3, omega_init=1.2, dt=0.5)
    np.testing.assert_allclose(given_.a, np.exp(0.5 * (-0.3 + 1.2j)), atol=1e-6)
    assert given_.raw_lambda.shape == given_.omega.shape == ()
    np.testing.assert_allclose(resonate(lambda_init=100.0).decay, 100, rtol=1e-6)
    assert abs(complex(resonate(lambda_init=0.0, omega_init=1.0).a)) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (23, 2)])
@pytest.mark.parametrize("given_", [{}, {"lambda_init": 0.1, "omega_init": 0.5, "threshold": 0.5}])
def test_resonate_matches_the_loop(shape, given_):
    layer = resonate(**given_)
    x = 0.7 * jax.random.normal(jax.random.key(1), (*shape, 4))
    z0 = layer.initial_state(shape[1]) + (0.3 - 0.2j)
    spikes, z = layer.parallel(x, z0, return_state=True)
    expected, last = resonate_oracle(layer, x, np.asarray(z0, np.complex128))
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(z, last, atol=1e-5)
    state, steps = z0, []
    for x_t in x:
        s, state = layer(x_t, state)
        steps.append(s)
    np.testing.assert_array_equal(jnp.array(steps).reshape(x.shape), spikes)
    np.testing.assert_allclose(state, z, atol=1e-5)


def test_resonate_gradients_and_dtypes():
    layer, x = resonate(), jax.random.normal(jax.random.key(2), (9, 2, 4))
    whole = nnx.grad(lambda m: jnp.sum(m.parallel(x) * x))(layer)

    def stepwise(m):
        _, spikes = jax.lax.scan(lambda z, x_t: m(x_t, z)[::-1], m.initial_state(2), x)
        return jnp.sum(spikes * x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, nnx.grad(stepwise)(layer))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(whole))
    assert layer.parallel(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.parallel(jnp.ones((3, 1, 4), jnp.int32)).dtype == jnp.float32


def test_resonate_errors():
    layer = resonate()
    with pytest.raises(ValueError, match=r"\[T, B, \*hidden_shape\].*\(3, 2, 5\)"):
        layer.parallel(jnp.ones((3, 2, 5)))
    with pytest.raises(ValueError, match=r"expects \[B, \*hidden_shape\]"):
        layer(jnp.ones((3, 2, 4)), layer.initial_state(2))
    with pytest.raises(TypeError, match="complex64"):
        layer.parallel(jnp.ones((3, 2, 4), complex))
    with pytest.raises(ValueError, match="dt must be positive"):
        resonate(dt=0.0)
    with pytest.raises(ValueError, match="lambda_init must be at least 0"):
        resonate(lambda_init=-1.0)
    for state in (layer.initial_state(1), jnp.zeros((2, 3), complex)):
        with pytest.raises(ValueError, match=r"a state of shape \(2, 4\) for this input, got"):
            layer(jnp.ones((2, 4)), state)
    for shape in (0, (), (4, -1), "ab"):
        with pytest.raises(ValueError, match="hidden_shape must be a positive integer"):
            phasor.ResonateFire(shape, rngs=nnx.Rngs(0))
    assert phasor.ResonateFire(4, rngs=nnx.Rngs(0)).omega.shape == (4,)


@pytest.mark.parametrize("function", [lambda z: phasor.phase_to_spikes(z, 8), phasor.spikes_to_phase])
def test_phasors_in_place_of_real_values_raise(function):
    with pytest.raises(TypeError, match=r"(phase_to_spikes|spikes_to_phase) expects real input, got complex64"):
        function(phasor.real_to_phasor(jnp.zeros((8, 2))))
