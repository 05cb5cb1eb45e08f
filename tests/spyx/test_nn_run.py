"""Sequential and run: figures, transformations, state, layers with and without it, errors."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spyx import axn, nn, ssm


def noise(*shape, seed=0, dtype=jnp.float32):
    return 1.5 * jax.random.normal(jax.random.key(seed), shape, dtype)


def front(seed=0):
    rngs = nnx.Rngs(seed)
    linear = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
    return nn.Sequential(linear, nn.LIF((8,), activation=axn.triangular(), rngs=rngs))


def deep(rngs=None):
    rngs = rngs or nnx.Rngs(1)
    linear, alif = nnx.Linear(4, 6, rngs=rngs), nn.ALIF((6,), rngs=rngs)
    return nn.Sequential(linear, alif, jnp.expm1, nn.RLIF((6,), rngs=rngs), nn.LI((6,), rngs=rngs))


def by_hand(model, x, state):
    outputs = []
    for x_t in x:
        out, state = model(x_t, state)
        outputs.append(out)
    return jnp.stack(outputs), state


def assert_trees(found, expected, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def test_published_firing_rate():
    u = jax.random.normal(jax.random.PRNGKey(6), (12, 4, 4))
    spikes, state = nn.run(front(), u)
    assert spikes.shape == (12, 4, 8)
    assert state[0] is None
    assert set(np.unique(spikes)) == {0.0, 1.0}
    assert f"{spikes.mean():.3f}" == "0.107"


def test_hybrid_trains_through_the_spikes():
    rngs = nnx.Rngs(0)
    spiking = nn.Sequential(
        nnx.Linear(4, 8, use_bias=False, rngs=rngs), nn.LIF((8,), activation=axn.triangular(), rngs=rngs)
    )
    model = nnx.Dict(front=spiking, body=ssm.LRU(d_model=8, d_state=16, rngs=rngs), readout=nnx.Linear(8, 3, rngs=rngs))
    u, labels = noise(12, 16, 4), jnp.arange(16) % 3
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def loss(model):
        spikes, _ = nn.run(model.front, u)
        logits = model.readout(model.body(spikes).sum(axis=0))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def train_step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value, grads

    first, grads = train_step(model, optimizer)
    for _ in range(40):
        last, _ = train_step(model, optimizer)
    assert np.all(np.any(np.asarray(grads["front"]["layers"][0]["kernel"][...]) != 0, axis=1))
    assert np.any(grads["front"]["layers"][1]["beta"][...] != 0)
    assert last < 0.3 * first


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (7, 3)])
def test_run_is_the_loop_over_steps(shape):
    model, x = deep(), noise(*shape, 4)
    y, state = nn.run(model, x)
    expected, last = by_hand(model, x, model.initial_state(shape[1]))
    assert_trees((y, state), (expected, last))
    for cut in {0, 1, shape[0] // 2}:
        first, middle = nn.run(model, x[:cut])
        second, end = nn.run(model, x[cut:], middle)
        assert_trees((jnp.concatenate([first, second]), end), (y, state))


def test_no_steps():
    model = deep()
    y, state = nn.run(model, noise(0, 2, 4))
    assert y.shape == (0, 2, 6)
    assert_trees(state, model.initial_state(2), atol=0)
    assert nn.run(model, noise(2, 0, 4), batch_major=True)[0].shape == (2, 0, 6)
    assert nn.run(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), noise(0, 2, 4))[0].shape == (0, 2, 2)
    grads = nnx.grad(lambda m: nn.run(m, noise(0, 2, 4))[0].sum())(model)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def test_batch_major_swaps_the_axes():
    model, x = deep(), noise(5, 3, 4)
    y, state = nn.run(model, x)
    swapped, end = nn.run(model, x.swapaxes(0, 1), batch_major=True)
    assert_trees((swapped.swapaxes(0, 1), end), (y, state), atol=0)


def test_without_state():
    linear, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), noise(5, 3, 4)
    y, state = nn.run(linear, x)
    assert state is None
    np.testing.assert_allclose(y, linear(x), atol=1e-6)
    np.testing.assert_array_equal(nn.run(jnp.negative, x)[0], -x)
    y, state = nn.run(nn.Sequential(linear, jax.nn.relu), x)
    assert state == [None, None]
    np.testing.assert_allclose(y, jax.nn.relu(linear(x)), atol=1e-6)
    frames = noise(3, 2, 4, 4, 1)
    conv, pool = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0)), nn.SumPool(2, 2, "VALID")
    model = nn.Sequential(conv, pool, nn.Flatten(), nn.IF((8,)), nn.PopulationCode(4))
    assert nn.run(model, frames)[0].shape == (3, 4)


def test_functions_and_objects_that_are_no_modules():
    x = noise(5, 3, 4)

    def accumulate(x_t, total):
        return total, total + x_t

    y, total = nn.run(accumulate, x, jnp.zeros((3, 4)))
    np.testing.assert_allclose(y[1:], jnp.cumsum(x, 0)[:-1], atol=1e-5)
    np.testing.assert_allclose(total, x.sum(0), atol=1e-5)

    class Accumulator:
        def initial_state(self, batch_size):
            return jnp.zeros((batch_size, 4))

        def __call__(self, x_t, total):
            return accumulate(x_t, total)

    assert isinstance(Accumulator(), nn.StatefulLayer)
    assert isinstance(nn.LIF((3,), rngs=nnx.Rngs(0)), nn.StatefulLayer)
    assert not isinstance(nn.Flatten(), nn.StatefulLayer)
    assert_trees(nn.run(Accumulator(), x), (y, total), atol=0)
    assert_trees(nn.run(nn.Sequential(Accumulator()), x), (y, [total]), atol=0)


def test_under_jit_vmap_and_remat():
    model, x = deep(), noise(3, 5, 2, 4)
    y, state = nn.run(model, x[0])
    assert_trees(jax.jit(lambda x: nn.run(model, x))(x[0]), (y, state))
    assert_trees(nnx.jit(nn.run)(model, x[0]), (y, state))
    rows = jax.vmap(lambda x: nn.run(model, x)[0])(x)
    np.testing.assert_allclose(rows, jnp.stack([nn.run(model, v)[0] for v in x]), atol=1e-6)
    unbatched = jax.vmap(lambda x, state: nn.run(model, x, state), in_axes=(1, 0), out_axes=(1, 0))
    assert_trees(unbatched(x[0], model.initial_state(2)), (y, state))

    def loss(model, run):
        return jnp.sum(run(model, x[0])[0] ** 2)

    plain = nnx.grad(loss)(model, nn.run)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(plain))
    assert_trees(nnx.grad(loss)(model, nnx.remat(lambda m, x: nn.run(m, x))), plain, atol=1e-4)
    assert_trees(nnx.jit(nnx.grad(loss), static_argnums=1)(model, nn.run), plain, atol=1e-4)
    by_input = jax.grad(lambda x: jnp.sum(nn.run(model, x)[0] ** 2))(x[0])
    assert by_input.shape == x[0].shape


def test_gradient_with_respect_to_the_first_state():
    model, x = nn.LI((4,), beta=0.5), noise(3, 2, 4)
    gradient = jax.grad(lambda state: jnp.sum(nn.run(model, x, state)[1]))(jnp.zeros((2, 4)))
    np.testing.assert_allclose(gradient, 0.125)


def test_forward_mode_without_spikes():
    model, x = nn.LI((4,), beta=0.5), noise(30, 2, 4)
    _, tangent = jax.jvp(lambda x: nn.run(model, x)[0], (x,), (x,))
    np.testing.assert_allclose(tangent, nn.run(model, x)[0], atol=1e-5)


def test_an_ensemble():
    models = nnx.vmap(lambda key: deep(nnx.Rngs(params=key)))(jax.random.split(jax.random.key(0), 3))
    x = noise(5, 2, 4)
    y = nnx.vmap(lambda m: nn.run(m, x)[0])(models)
    assert y.shape == (3, 5, 2, 6)
    graphdef, state = nnx.split(models)
    second = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[1], state))
    np.testing.assert_allclose(y[1], nn.run(second, x)[0], atol=1e-5)


SSM = {
    "LRU": lambda rngs: ssm.LRU(4, 3, rngs=rngs),
    "S5Diag": lambda rngs: ssm.S5Diag(4, 3, rngs=rngs),
    "Mamba": lambda rngs: ssm.Mamba(4, 3, rngs=rngs),
    "MambaBlock": lambda rngs: ssm.MambaBlock(4, 3, rngs=rngs),
}


@pytest.mark.parametrize("name", SSM)
def test_state_space_layers_are_stepped(name):
    rngs, x = nnx.Rngs(2), noise(9, 2, 4)
    layer, linear = SSM[name](rngs), nnx.Linear(4, 4, rngs=rngs)
    np.testing.assert_allclose(nn.run(layer, x)[0], layer(x), atol=2e-5)
    model = nn.Sequential(linear, layer, nn.LI((4,), beta=0.5))
    y, state = nn.run(model, x)
    expected = layer(linear(x))
    np.testing.assert_allclose(y, nn.LI((4,), beta=0.5).parallel(expected), atol=5e-5)
    first, middle = nn.run(model, x[:4])
    second, end = nn.run(model, x[4:], middle)
    assert_trees((jnp.concatenate([first, second]), end), (y, state), atol=5e-5)


def test_step_is_preferred_to_the_call():
    class Layer(nnx.Module):
        def initial_state(self, batch_size):
            return jnp.zeros((batch_size, 1))

        def step(self, x_t, state):
            return x_t + state, state + 1

        def __call__(self, x):
            raise AssertionError("the whole-sequence call")

    y, state = nn.run(nn.Sequential(Layer()), jnp.zeros((3, 2, 1)))
    np.testing.assert_array_equal(y[:, 0, 0], [0, 1, 2])
    np.testing.assert_array_equal(state[0], 3)
    np.testing.assert_array_equal(nn.run(Layer(), jnp.zeros((3, 2, 1)))[0], y)


def test_nested_and_shared_layers():
    rngs, x = nnx.Rngs(0), noise(6, 2, 4)
    inner = nn.Sequential(nnx.Linear(4, 4, rngs=rngs), nn.LIF((4,), rngs=rngs))
    nested = nn.Sequential(inner, nn.Sequential(jax.nn.relu), inner)
    y, state = nn.run(nested, x)
    expected, last = nn.run(nn.Sequential(*inner.layers, jax.nn.relu, *inner.layers), x)
    np.testing.assert_array_equal(y, expected)
    assert_trees(jax.tree.leaves(state), jax.tree.leaves(last), atol=0)
    assert nn.run(nn.Sequential(), x)[1] == []


def test_random_and_running_variables_advance():
    """Dropout draws anew at each step, batch norm averages over the steps, evaluation changes nothing."""
    rngs = nnx.Rngs(0)
    model = nn.Sequential(nnx.BatchNorm(4, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nn.LI((4,), beta=0.0))
    x = noise(6, 3, 4) + 5
    kept = nn.run(model, x)[0] != 0
    assert len({row.tobytes() for row in np.asarray(kept)}) == 6
    mean = np.zeros(4)
    for x_t in np.asarray(x):
        mean = 0.5 * mean + 0.5 * x_t.mean(0)
    np.testing.assert_allclose(model.layers[0].mean[...], mean, rtol=1e-5)
    again = nnx.jit(nn.run)(model, x)[0] != 0
    assert np.any(np.asarray(again) != np.asarray(kept))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    first, second = (jax.jit(lambda x: nn.run(model, x)[0])(x) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert_trees(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before, atol=0)


@pytest.mark.parametrize("kind", [nnx.Param, nnx.BatchStat])
def test_a_step_that_adds_or_trains_variables_is_refused(kind):
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(()))

        def __call__(self, x_t):
            if kind is nnx.Param:
                self.w[...] = self.w[...] + 1
            else:
                self.mean = kind(x_t.mean())
            return x_t

    error = flax.errors.TraceContextError if kind is nnx.Param else TypeError
    with pytest.raises(error, match="Param" if kind is nnx.Param else "carry"):
        nn.run(Layer(), noise(5, 2, 4))


def test_dtypes_of_a_sequence():
    model, x = front(), noise(5, 2, 4)
    y, state = nn.run(model, x.astype(jnp.bfloat16))
    assert state[1].dtype == jnp.float32
    assert set(np.unique(y.astype(np.float32))) <= {0.0, 1.0}
    spikes = (x > 1).astype(jnp.uint8)
    np.testing.assert_array_equal(nn.run(model, spikes)[0], nn.run(model, spikes.astype(jnp.float32))[0])
    with jax.enable_x64(True):
        for layer in (nn.Sequential(nn.LIF((4,), rngs=nnx.Rngs(0)), ssm.LRU(4, 3, rngs=nnx.Rngs(0))), nn.LI((4,))):
            y, state = nn.run(layer, noise(5, 2, 4, dtype=jnp.float64))
            assert y.dtype == jnp.float64
            assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {np.dtype(np.float64), np.dtype(np.complex128)}
            given = layer.initial_state(2)
            _, state = nn.run(layer, noise(5, 2, 4, dtype=jnp.float64), given)
            assert [s.dtype for s in jax.tree.leaves(state)] == [s.dtype for s in jax.tree.leaves(given)]


def test_errors_say_what_was_expected():
    model = deep()
    with pytest.raises(ValueError, match=r"run expects x \[T, B, ...\]; got shape \(4,\)"):
        nn.run(model, jnp.ones(4))
    with pytest.raises(ValueError, match=r"run expects x \[B, T, ...\]; got shape \(4,\)"):
        nn.run(jnp.negative, jnp.ones(4), batch_major=True)
    with pytest.raises(ValueError, match=r"run expects x \[T, B, ...\]; got shape \(\)"):
        nn.run(jnp.negative, jnp.float32(1))
    with pytest.raises(ValueError, match=r"ALIF expects a state of shape \(3, 12\) for input \(3, 6\); got \(2, 12\)"):
        nn.run(model, noise(5, 3, 4), model.initial_state(2))
    with pytest.raises(ValueError, match=r"list of 5 states, one for each layer, .* got 1 entries"):
        model(noise(3, 4), [None])
    with pytest.raises(ValueError, match="makes it; got ArrayImpl"):
        model(noise(3, 4), jnp.ones(5))
    with pytest.raises(ValueError, match="LIF expects a state, got None"):
        front()(noise(3, 4), [None, None])
    with pytest.raises(ValueError, match=r"LI expects input \[B, 6\]; got shape \(3, 4\)"):
        nn.run(nn.LI((6,)), noise(5, 3, 4))
    with pytest.raises(TypeError, match="carry"):
        nn.run(lambda x, state: (x, state[:1]), noise(5, 3, 4), jnp.zeros((3, 4)))
