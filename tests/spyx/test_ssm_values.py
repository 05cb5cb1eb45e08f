"""spyx.ssm: published figures, float64 loops, options of the constructors, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.convolution import depthwise
from oracles.lti import diagonal_layer
from oracles.selective import selective_scan, silu, softplus
from oracles.ssm import ALL, close, make, noise

from spyx.ssm import LRU, ChunkedSSM, Mamba, MambaBlock, MambaState, S5Diag


def train(model, u, rate, steps):
    """First and last loss of learning the identity."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(u) - u) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(steps)]
    return f"{losses[0]:.4f}", f"{losses[-1]:.4f}"


def magnitudes(layer, digits):
    found = jnp.abs(layer._complex_matrices()[0])
    return f"{found.min():.{digits}f}", f"{found.max():.{digits}f}"


def test_published_lru_training_run():
    model = LRU(4, 16, rngs=nnx.Rngs(0))
    assert magnitudes(model, 3) == ("0.268", "0.888")
    u = jax.random.normal(jax.random.PRNGKey(1), (32, 16, 4))
    assert train(model, u, 5e-3, 150) == ("1.4408", "0.0020")
    assert magnitudes(model, 3) == ("0.203", "0.847")


def test_published_s5diag_eigenvalues():
    assert magnitudes(S5Diag(8, 32, rngs=nnx.Rngs(2)), 4) == ("0.9523", "0.9995")


def test_published_mamba_block_training_run():
    model = MambaBlock(8, d_state=8, d_conv=4, expand=2, rngs=nnx.Rngs(4))
    u = jax.random.normal(jax.random.PRNGKey(5), (16, 4, 8))
    assert train(model, u, 3e-3, 100) == ("1.1178", "0.4200")


@pytest.mark.parametrize("shape", [(1, 1), (17, 2), (0, 2)])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("cls", [LRU, S5Diag])
def test_diagonal_layers_match_the_loop(cls, skip, shape):
    layer, u = cls(3, 5, use_skip=skip, rngs=nnx.Rngs(7)), noise(*shape, 3)
    y, state = layer(u, return_state=True)
    D = None if layer.D is None else layer.D[...]
    assert (D is not None) == skip
    expected, last = diagonal_layer(u, *layer._complex_matrices(), D)
    close(y, expected.reshape(u.shape))
    close(state, last)


def linear(layer, v):
    out = v @ np.asarray(layer.kernel[...], np.float64)
    return out if layer.bias is None else out + np.asarray(layer.bias[...], np.float64)


def mamba_loop(layer, u, z=None):
    """(y, state) of the selective core in 64 bits."""
    R, N = layer.dt_rank, layer.d_state
    projected = linear(layer.x_proj, np.asarray(u, np.float64))
    dt = softplus(linear(layer.dt_proj, projected[..., :R]))
    A = -np.exp(np.asarray(layer.A_log[...], np.float64))
    return selective_scan(u, dt, A, projected[..., R : R + N], projected[..., R + N :], layer.D[...], z)


def block_loop(layer, u):
    """(y, MambaState) of the whole block in 64 bits."""
    x, z = np.split(linear(layer.in_proj, np.asarray(u, np.float64)), 2, -1)
    bias = None if layer.conv.bias is None else layer.conv.bias[...]
    x, conv_state = depthwise(x, layer.conv.kernel[...][:, 0].T, bias)
    y, ssm_state = mamba_loop(layer.ssm, silu(x))
    return linear(layer.out_proj, y * silu(z)), MambaState(conv_state, ssm_state)


@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("name", ["Mamba", "MambaBlock", "MambaBlock-biased"])
def test_mamba_layers_match_the_loop(name, T):
    layer, u = make(name), noise(T, 2, 4)
    y, state = layer(u, return_state=True)
    expected, last = (mamba_loop if name == "Mamba" else block_loop)(layer, u)
    close(y, expected)
    jax.tree.map(close, state, last)


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [12, 11])
def test_chunked_matches_its_definition(pool, causal, T):
    inner, outer = make("LRU"), make("S5Diag")
    layer, u = ChunkedSSM(inner, outer, chunk_size=3, pool=pool, causal=causal), noise(T, 2, 4)
    if not causal and T % 3:
        with pytest.raises(ValueError, match="length 11 is not a multiple of chunk_size 3"):
            layer(u)
        return
    h = np.asarray(inner(u))
    summaries = np.stack([h[i : i + 3].mean(0) if pool == "mean" else h[i + 2] for i in range(0, T - 2, 3)])
    o = np.asarray(outer(jnp.asarray(summaries)))
    expected = h.copy()
    for t in range(T):
        chunk = t // 3 - causal
        expected[t] += o[chunk] if chunk >= 0 else 0
    close(layer(u), expected)
    close(layer(u, return_state=True)[0], expected)


def test_chunked_takes_any_callable():
    u = noise(6, 2, 4)
    layer = ChunkedSSM(lambda v: 2 * v, jnp.negative, chunk_size=2, pool="last")
    close(layer(u), 2 * u - 2 * jnp.repeat(u[1::2], 2, axis=0))
    for kwargs in ({"return_state": True}, {"lengths": jnp.array([6, 4])}, {"reset": jnp.zeros(6, bool)}):
        with pytest.raises(TypeError, match="inner is function"):
            layer(u, **kwargs)
    reversed_outer = ChunkedSSM(make("LRU"), make("LRU", reverse=True), chunk_size=2, causal=True)
    with pytest.raises(TypeError, match=r"outer is LRU\(reverse=True\)"):
        reversed_outer.initial_state(2)


def test_s5diag_stays_stable_for_any_parameters():
    layer = S5Diag(3, 5, rngs=nnx.Rngs(7))
    layer.A_re_raw.set_value(jnp.array([-100.0, -5, 0, 5, 100]))
    layer.log_dt.set_value(jnp.array([-20.0, 0, 5, -5, 3]))
    assert np.all(np.abs(layer._complex_matrices()[0]) <= 1)


def test_s5diag_finite_at_zero_eigenvalue():
    layer = S5Diag(3, 5, rngs=nnx.Rngs(7))
    layer.A_re_raw.set_value(jnp.full(5, -200.0))
    layer.A_im.set_value(jnp.zeros(5))
    grads = nnx.grad(lambda m: jnp.sum(m(noise(5, 2, 3)) ** 2))(layer)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def shapes(make_layer):
    state = nnx.state(nnx.eval_shape(make_layer))
    return {".".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def test_parameters_of_a_mamba_block():
    ssm = {"ssm.A_log": (6, 5), "ssm.D": (6,), "ssm.x_proj.kernel": (6, 14), "ssm.dt_proj.kernel": (4, 6)}
    expected = {
        "in_proj.kernel": (2, 12), "conv.kernel": (3, 1, 6), "conv.bias": (6,), "out_proj.kernel": (6, 2),
        "ssm.dt_proj.bias": (6,), **ssm,
    }  # fmt: skip
    assert shapes(lambda: MambaBlock(2, 5, 3, 3, dt_rank=4, rngs=nnx.Rngs(0))) == expected
    del expected["conv.bias"]
    expected |= {"in_proj.bias": (12,), "out_proj.bias": (2,)}
    options = {"dt_rank": 4, "bias": True, "conv_bias": False}
    assert shapes(lambda: MambaBlock(2, 5, 3, 3, **options, rngs=nnx.Rngs(0))) == expected
    for width, rank in ((1, 1), (16, 1), (17, 2)):
        assert shapes(lambda width=width: Mamba(width, rngs=nnx.Rngs(0)))["dt_proj.kernel"] == (rank, width)


def test_start_of_the_step_sizes():
    def start(**kwargs):
        layer = MambaBlock(8, expand=4, dt_rank=4, rngs=nnx.Rngs(0), **kwargs).ssm
        return layer.dt_proj.kernel[...], jax.nn.softplus(layer.dt_proj.bias[...])

    kernel, dt = start()
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 1e-1 * (1 + 1e-5)
    close(start(dt_scale=3.0)[0], 3 * kernel)
    close(start(dt_init="constant", dt_scale=3.0)[0], np.full(kernel.shape, 1.5))
    close(start(dt_init_floor=0.01)[1], np.maximum(dt, 0.01), 1e-6)
    np.testing.assert_array_equal(start(dt_init_floor=0.0)[1], dt)


@pytest.mark.parametrize("name", ["LRU", "S5Diag", "Mamba", "MambaBlock"])
def test_errors_name_layer_layout_and_what_came(name):
    layer, width = make(name), "d_inner" if name == "Mamba" else "d_model"
    with pytest.raises(ValueError, match=rf"{name} expects \[T, B, {width}\] with {width}=4; got shape \(9, 4\)"):
        layer(noise(9, 4))
    with pytest.raises(ValueError, match=rf"{width}=4; got shape \(9, 2, 3\)"):
        layer(noise(9, 2, 3))
    with pytest.raises(TypeError, match=rf"{name} expects real floating point.*int32"):
        layer(jnp.ones((9, 2, 4), jnp.int32))
    with pytest.raises(ValueError, match=rf"\[B, {width}\]"):
        layer.step(noise(9, 2, 4), layer.initial_state(2))
    with pytest.raises(ValueError, match="must have shape"):
        layer(noise(9, 2, 4), layer.initial_state(1))
    with pytest.raises(ValueError, match="must have shape"):
        layer.step(noise(2, 4), layer.initial_state(1))


@pytest.mark.parametrize("name", ALL)
def test_errors_of_masks(name):
    layer, u = make(name), noise(9, 2, 4)
    with pytest.raises(TypeError, match="lengths must be integers"):
        layer(u, lengths=jnp.ones(2))
    with pytest.raises(ValueError, match="lengths must have shape"):
        layer(u, lengths=jnp.ones(3, jnp.int32))
    with pytest.raises(TypeError, match="reset must be bool"):
        layer(u, reset=jnp.zeros((9, 2)))
    with pytest.raises(ValueError, match="reset must have shape"):
        layer(u, reset=jnp.zeros((2, 9), bool))


@pytest.mark.parametrize("name", ["MambaBlock", "ChunkedSSM", "ChunkedSSM-causal"])
def test_a_state_of_another_kind_is_refused(name):
    layer = make(name)
    with pytest.raises(TypeError, match=r"expects .*State.*got tuple"):
        layer(noise(9, 2, 4), tuple(layer.initial_state(2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda **k: LRU(3, 0, **k), "LRU: d_state must be a positive integer, got 0"),
        (lambda **k: S5Diag(2.5, **k), "S5Diag: d_model must be a positive integer, got 2.5"),
        (lambda **k: LRU(3, r_min=0.9, r_max=0.5, **k), "0 <= r_min <= r_max <= 1, got r_min=0.9, r_max=0.5"),
        (lambda **k: LRU(3, r_max=2.0, **k), "r_max=2.0"),
        (lambda **k: S5Diag(3, dt_min=0.0, **k), "S5Diag needs 0 < dt_min <= dt_max, got dt_min=0.0"),
        (lambda **k: Mamba(3, dt_min=0.2, **k), "Mamba needs 0 < dt_min <= dt_max, got dt_min=0.2, dt_max=0.1"),
        (lambda **k: Mamba(0, **k), "Mamba: d_inner must be a positive integer, got 0"),
        (lambda **k: Mamba(3, dt_rank=0, **k), "dt_rank must be a positive integer, got 0"),
        (lambda **k: MambaBlock(3, dt_init="ones", **k), r"dt_init must be one of .*, got 'ones'"),
        (lambda **k: MambaBlock(3, dt_scale=0.0, **k), "got dt_scale=0.0"),
        (lambda **k: MambaBlock(3, expand=1.5, **k), "MambaBlock: expand must be a positive integer, got 1.5"),
        (lambda **k: MambaBlock(3, d_conv=0, **k), "d_conv must be a positive integer, got 0"),
        (lambda rngs: ChunkedSSM(len, len, chunk_size=0), "chunk_size must be a positive integer, got 0"),
        (lambda rngs: ChunkedSSM(len, len, chunk_size=1, pool="max"), r"pool must be one of .*, got 'max'"),
        (lambda rngs: ChunkedSSM(LRU(3, rngs=rngs), Mamba(4, rngs=rngs), chunk_size=1), "inner has width 3, outer 4"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build(rngs=nnx.Rngs(0))


def test_chunked_needs_three_axes_and_callables():
    layer = make("ChunkedSSM")
    with pytest.raises(ValueError, match=r"ChunkedSSM expects \[T, B, d_model\] with d_model=4; got shape \(6, 3\)"):
        layer(noise(6, 3))
    with pytest.raises(ValueError, match=r"ChunkedSSM expects \[T, B, d_model\]; got shape \(6, 3\)"):
        ChunkedSSM(jnp.sin, jnp.sin, chunk_size=3)(noise(6, 3))
    with pytest.raises(TypeError, match="outer must be callable, got int"):
        ChunkedSSM(jnp.sin, 3, chunk_size=3)
