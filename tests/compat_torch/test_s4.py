"""S4 and S4D: C and C~, streaming, both arithmetics, dropout, hints, dtypes, errors."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import s4 as oracle
from safetensors.numpy import load_file

from compat_torch import decode, optim
from compat_torch.core.variables import Buffer
from compat_torch.errors import StateDictMismatchError
from compat_torch.models.lti import S4, S4D
from compat_torch.models.lti import _s4_dplr as dplr
from parity.case import GOLDEN

BOTH = [S4D, S4]


def make(cls=S4D, **kwargs):
    kwargs = {"d_model": 4, "d_state": 8, "transposed": False, "rngs": nnx.Rngs(3), **kwargs}
    return cls(**kwargs)


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def values(layer):
    return {name: np.asarray(value) for name, value in layer.state_dict().items()}


def test_names_shapes_and_ties():
    layer = make(S4, channels=2, gate=3, bottleneck=2, n_ssm=1, rank=2, init="legt")
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    system = {
        "inv_dt": (2, 1), "C": (2, 2, 4, 2), "B": (1, 1, 4, 2), "A_real": (1, 4), "A_imag": (1, 4), "P": (2, 1, 4, 2),
    }  # fmt: skip
    dense = {"input_linear": (2, 4), "input_gate.0": (6, 4), "output_gate": (6, 4), "output_linear.0": (4, 6)}
    assert shapes == {
        **system,
        **{f"layer.kernel.{name}": shape for name, shape in system.items()},
        "layer.kernel.l_kernel": (),
        "D": (2, 2),
        **{f"{name}.weight": shape for name, shape in dense.items()},
        **{f"{name}.bias": shape[:1] for name, shape in dense.items()},
    }
    assert layer.layer.kernel.C is layer.C
    grads = nnx.grad(lambda m: jnp.sum(m(noise(1, 3, 4))[0]))(layer)
    names = set(dict(nnx.to_flat_state(grads)))
    assert ("C",) in names
    assert not any(name[0] == "layer" for name in names)


@pytest.mark.parametrize("cls", BOTH)
def test_arguments_are_the_references(cls):
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    expected = [
        "d_model", "bottleneck", "gate", "final_act", "postact", "dropout", "tie_dropout", "transposed", "l_max",
        "channels", "d_state", "dt_min", "dt_max", "dt_tie", "dt_transform", "dt_fast", "rank", "n_ssm", "init",
        "deterministic", "real_transform", "imag_transform", "is_real", "lr", "wd", "verbose",
        *(["disc"] if cls is S4D else []),
    ]  # fmt: skip
    assert names[: len(expected)] == expected
    layer = cls(4, d_state=4, verbose=True)
    assert layer(noise(2, 4, 7))[0].shape == (2, 4, 7)
    assert (layer.n_ssm, layer.channels, layer.l_max) == (4, 1, None)


@pytest.mark.parametrize("cls", BOTH)
def test_a_list_of_inits_decodes(cls):
    layer, x = make(cls, init=["legs", "diag-inv"]), noise(2, 3, 4)
    y, _ = decode(layer, x, layer.allocate_inference_cache(2))
    np.testing.assert_allclose(y, layer(x)[0], atol=3e-6)


def test_loading_before_and_after_the_references_first_forward_is_the_same():
    folder = GOLDEN / "lrnnx_s4_n_ssm"
    io = load_file(folder / "io.safetensors")
    layer, outputs = S4(4, d_state=8, n_ssm=2, l_max=32, transposed=False), []
    for name in ("weights_init", "weights"):
        weights = load_file(folder / f"{name}.safetensors")
        layer.load_state_dict(weights)
        outputs.append(layer(io["x"])[0])
        after = values(layer)
        assert after.keys() == weights.keys()
        for key, value in weights.items():
            np.testing.assert_array_equal(after[key], value)
    np.testing.assert_allclose(*outputs, atol=2e-6)
    broken = {**weights, "layer.kernel.C": weights["C"] + 1}
    with pytest.raises(StateDictMismatchError, match="one parameter, but their values differ"):
        layer.load_state_dict(broken)


def test_kernel_length_changes_c_and_nothing_else():
    layer, x = make(S4, n_ssm=2), noise(2, 6, 4)
    assert layer.state_dict()["layer.kernel.l_kernel"] == 0
    readout, y = layer.state_dict()["C"], layer(x)[0]
    for M in (6, 64, 3, 0):
        layer.set_kernel_length(M)
        assert int(layer.state_dict()["layer.kernel.l_kernel"]) == M
        np.testing.assert_allclose(layer(x)[0], y, atol=3e-5)
        np.testing.assert_allclose(layer.allocate_inference_cache(1)["dC"].real, readout[..., 0], atol=2e-3)
    before = values(layer)
    nnx.jit(lambda m: m(noise(1, 200, 4))[0])(layer)
    for name, value in values(layer).items():
        np.testing.assert_array_equal(value, before[name])
    assert int(make(S4, l_max=7).state_dict()["layer.kernel.l_kernel"]) == 7
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="M must be an integer"):
            layer.set_kernel_length(bad)
    with pytest.raises(ValueError, match="not real"):
        make(S4, is_real=True).set_kernel_length(3)


@pytest.mark.parametrize("cls", BOTH)
def test_streams_agree_in_float32(cls):
    layer, x = make(cls), noise(2, 70, 4)
    whole, state = layer(x)
    assert state is None
    zero = layer.default_state(2)
    first, state = layer(x[:, :31], state=zero)
    second, state = layer(x[:, 31:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=3e-6)
    by_steps, cache = decode(layer, x, layer.allocate_inference_cache(2))
    np.testing.assert_allclose(by_steps, whole, atol=3e-6)
    np.testing.assert_allclose(cache["lrnn_state"], state, atol=3e-6)
    transposed = make(cls, transposed=True)
    transposed.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(transposed(jnp.swapaxes(x, 1, 2))[0], jnp.swapaxes(whole, 1, 2), atol=1e-6)
    if cls is S4:
        half = layer(x[:, :31], state=zero[..., :4])[1]
        assert half.shape == (2, 4, 4)
        assert state.shape == (2, 4, 8)


@pytest.mark.full
@pytest.mark.parametrize("cls", BOTH)
def test_gradients_through_a_state_are_those_of_the_whole(cls):
    layer, x = make(cls), noise(2, 9, 4)

    def whole(m):
        return jnp.sum(m(x)[0] ** 2)

    def parts(m):
        first, state = m(x[:, :4], state=m.default_state(2))
        return jnp.sum(first**2) + jnp.sum(m(x[:, 4:], state=state)[0] ** 2)

    for a, b in zip(jax.tree.leaves(nnx.grad(whole)(layer)), jax.tree.leaves(nnx.grad(parts)(layer)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("cls", BOTH)
def test_lengths(cls):
    layer, x = make(cls, bottleneck=2, gate=2), noise(3, 9, 4)
    whole, valid = layer(x)[0], (jnp.arange(9) < jnp.array([0, 3, 9])[:, None])[..., None]
    padded = jnp.where(valid, x, jnp.nan)
    y, _ = layer(padded, jnp.array([0, 3, 9]))
    np.testing.assert_allclose(y, jnp.where(valid, whole, 0), atol=2e-6)
    grads = nnx.grad(lambda m, x: jnp.sum(m(x, jnp.array([0, 3, 9]))[0]), argnums=(0, 1))(layer, padded)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(jnp.where(valid, 0, grads[1]), 0)
    for same in (4, jnp.array([4])):
        np.testing.assert_allclose(layer(x, same)[0], whole * (jnp.arange(9) < 4)[:, None], atol=2e-6)


@pytest.mark.parametrize("cls", BOTH)
def test_empty_inputs(cls):
    layer = make(cls)
    cache = layer.allocate_inference_cache(2)
    assert layer(noise(2, 0, 4))[0].shape == (2, 0, 4)
    assert layer(noise(0, 3, 4))[0].shape == (0, 3, 4)
    y, after = layer(noise(2, 0, 4), inference_cache=cache)
    assert y.shape == (2, 0, 4)
    np.testing.assert_array_equal(after["lrnn_state"], cache["lrnn_state"])


def test_the_two_arithmetics():
    x = noise(2, 9, 4)
    for act, function in (("id", lambda v: v), ("tanh", np.tanh), ("relu", lambda v: np.maximum(v, 0))):
        layer = make(final_act=act, reference="paper")
        np.testing.assert_allclose(layer(x)[0], oracle.forward(layer, np.asarray(x), activation=function), atol=3e-6)
        layer = make(final_act=None, postact=act)
        np.testing.assert_allclose(layer(x)[0], oracle.forward(layer, np.asarray(x)), atol=3e-6)
    assert make(reference="paper").state_dict()["output_linear.0.weight"].shape == (8, 4)
    dt = {r: jnp.exp(make(deterministic=True, reference=r).inv_dt[...]) for r in ("lrnnx", "paper")}
    np.testing.assert_allclose(dt["paper"], np.geomspace(0.001, 0.1, 4)[:, None], rtol=1e-5)
    np.testing.assert_allclose(dt["lrnnx"], np.exp(np.geomspace(0.001, 0.1, 4))[:, None], rtol=1e-5)
    cut, full = (make(l_max=3, reference=r, final_act=None) for r in ("lrnnx", "paper"))
    impulse = jnp.zeros((1, 9, 4)).at[:, 0].set(1.0)
    np.testing.assert_allclose(cut(impulse)[0][:, 3:], 0, atol=1e-9)
    assert np.abs(full(impulse)[0][:, 3:]).max() > 1e-4


@pytest.mark.parametrize("cls", BOTH)
def test_sampling_rate(cls):
    layer, x = make(cls, l_max=None if cls is S4 else 8), noise(1, 8, 4)
    kernel_at_two = oracle.forward(layer, np.asarray(x), rate=2.0)
    np.testing.assert_allclose(layer(x, rate=2.0)[0], kernel_at_two, atol=2e-2 if cls is S4 else 2e-6)
    with pytest.raises(ValueError, match=r"rate=2.0 needs a call without"):
        layer(x, rate=2.0, inference_cache=layer.allocate_inference_cache(1))


def test_dss_is_its_definition_and_has_no_steps():
    layer, x = make(disc="dss", real_transform="none", final_act=None, l_max=6), noise(2, 6, 4)
    layer.A_real.set_value(layer.A_real[...].at[:, 0].set(-0.3))
    p, L = oracle.parameters(layer), 6
    A, B, C = -p["A_real"] - 1j * p["A_imag"], *(p[k][0][..., 0] + 1j * p[k][0][..., 1] for k in ("B", "C"))
    z = np.exp(p["inv_dt"]) * A
    grows, steps = A.real > 0, np.arange(L)
    falling = np.where(grows, -z, z)
    total = np.expm1(L * falling) * A
    weights = B * C * np.expm1(falling) * np.conj(total) / (np.abs(total) ** 2 + 1e-7)
    rows = np.exp(falling[..., None] * np.where(grows[..., None], L - 1 - steps, steps))
    kernel = np.einsum("hn,hnl->hl", weights, rows).real
    u, y = np.asarray(x), np.zeros((2, L, 1, 4))
    for t in range(L):
        y[:, t, 0] = sum(kernel[:, s] * u[:, t - s] for s in range(t + 1))
    np.testing.assert_allclose(layer(x)[0], oracle.leave(layer, y, u, u), atol=2e-5)
    for call in (lambda: layer.allocate_inference_cache(2), lambda: layer(x, state=noise(2, 4, 4))):
        with pytest.raises(ValueError, match="no step, state or cache"):
            call()


def test_dropout():
    layer, x, key = make(dropout=0.5, final_act=None), noise(2, 50, 4) + 3, nnx.Rngs(dropout=1)
    with pytest.raises(ValueError, match=r"dropout=0.5 in training mode needs rngs"):
        layer(x)
    dropped = layer(x, rngs=key)[0]
    assert not np.allclose(dropped, layer(x, rngs=key)[0])
    layer.eval()
    full = layer(x)[0]
    kept = dropped != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(dropped[kept], 2 * full[kept], rtol=1e-5)
    tied = make(dropout=0.5, tie_dropout=True, final_act=None)
    masks = tied(x, rngs=nnx.Rngs(dropout=1))[0] != 0
    shown = np.broadcast_to(masks.any(1, keepdims=True), masks.shape)
    np.testing.assert_allclose(tied(x, rngs=nnx.Rngs(dropout=1))[0], np.where(shown, 2 * full, 0), atol=1e-5)
    assert 0 < shown.mean() < 1
    kernel = make(drop_kernel=0.5)
    assert not np.allclose(kernel(x, rngs=key)[0], kernel(x, rngs=key)[0])
    recurrent = make(S4, drop_kernel=0.5)
    with pytest.raises(ValueError, match="drop_kernel in training mode needs a call without state"):
        recurrent(x, inference_cache=recurrent.allocate_inference_cache(2), rngs=key)


def test_learning_rates_and_decay():
    layer = make(S4, lr={"dt": 1e-4, "A": 0.0}, wd=0.25)
    assert isinstance(layer.A_real, Buffer)
    assert isinstance(layer.P, Buffer)
    assert isinstance(layer.B, nnx.Param)
    assert set(layer.state_dict()) == set(make(S4).state_dict())
    wishes = {name: dict(getattr(layer, name).get_metadata()["optim"]) for name in ("inv_dt", "B", "C")}
    assert wishes == {
        "inv_dt": {"lr": 1e-4, "weight_decay": 0.25}, "B": {"weight_decay": 0.25}, "C": {"weight_decay": 0.0},
    }  # fmt: skip
    assert "optim" not in make(S4, reference="paper").C.get_metadata()
    assert {"lr": 1e-4, "weight_decay": 0.25} in optim.groups(layer).values()
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(noise(1, 5, 4))[0])))(layer)
    assert "A_real" not in grads
    with pytest.raises(ValueError, match=r"lr may name 'dt', 'A' and 'B', got \['C'\]"):
        make(lr={"C": 1.0})


@pytest.mark.parametrize("cls", BOTH)
def test_dtypes(cls):
    x, single = noise(2, 9, 4), make(cls, l_max=16)
    small = make(cls, l_max=16, dtype=jnp.bfloat16)
    y, cache = small(x, inference_cache=small.allocate_inference_cache(2))
    assert (y.dtype, cache["lrnn_state"].dtype) == (jnp.bfloat16, jnp.complex64)
    assert small.state_dict()["C"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        layer = make(cls, l_max=16, param_dtype=jnp.float64)
        layer.load_state_dict(single.state_dict(), dtype=jnp.float64)
        exact, cache = layer(noise(2, 9, 4, dtype=jnp.float64), inference_cache=layer.allocate_inference_cache(2))
        assert (exact.dtype, cache["lrnn_state"].dtype) == (jnp.float64, jnp.complex128)
        exact = layer(jnp.asarray(x, jnp.float64))[0]
    np.testing.assert_allclose(single(x)[0], exact, atol=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("init", ["fourier", "legt", "legs"])
@pytest.mark.parametrize("cls", BOTH)
def test_float32_gradients_are_near_float64_where_poles_meet_nodes(cls, init):
    layer, x, w = make(cls, init=init, rank=2, l_max=40, d_state=16), noise(1, 40, 4), noise(1, 40, 4, seed=1)

    def loss(m, x):
        return jnp.sum(m(x)[0] * w.astype(x.dtype))

    single = nnx.grad(loss)(layer, x)
    with jax.enable_x64(True):
        layer.load_state_dict(values(layer), dtype=jnp.float64)
        double = nnx.grad(loss)(layer, x.astype(jnp.float64))
    for name, a in dict(nnx.to_flat_state(single)).items():
        b = np.asarray(dict(nnx.to_flat_state(double))[name][...])
        np.testing.assert_allclose(a[...], b, atol=3e-5 * max(1, np.abs(b).max()), err_msg=str(name))


@pytest.mark.parametrize("cls", BOTH)
def test_memory_does_not_grow_with_the_states(cls):
    def peak(N):
        layer = nnx.eval_shape(lambda: make(cls, d_model=2, d_state=N, l_max=2048))
        graph, state = nnx.split(layer, nnx.Param, ...)[0], nnx.split(layer, nnx.Param, ...)[1:]
        x = jax.ShapeDtypeStruct((1, 2048, 2), jnp.float32)

        def loss(params, rest, x):
            layer = nnx.merge(graph, params, rest)
            if cls is S4:  # without the conversion of C, whose dense matrices are not in use when l_kernel is l_max
                system, C = layer.layer.kernel.continuous()
                return jnp.sum(dplr.kernel(system, C, 2048, 2048, "highest") ** 2)
            return jnp.sum(layer(x)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(*state, x).compile().memory_analysis().temp_size_in_bytes

    few, many = peak(16), peak(128)
    whole = 2 * 64 * 2048 * 8
    assert many < few + whole // 2


def test_big_layers_are_described_without_being_built():
    layer = nnx.eval_shape(lambda: S4(4096, d_state=256, l_max=4096))
    assert isinstance(layer.C.get_value(), jax.ShapeDtypeStruct)


def test_layers_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(S4, verbose=True, init="fourier", l_max=5)(noise(1, 5, 4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"disc": "euler"}, r"disc must be one of .*got 'euler'"),
        ({"final_act": "gleu"}, r"final_act must be one of .*got 'gleu'"),
        ({"postact": "glu"}, "postact is an older name of final_act"),
        ({"bottleneck": 3}, "bottleneck must divide d_model, got 3 and 4"),
        ({"n_ssm": 3}, "n_ssm must divide the width 4, got 3"),
        ({"gate": 0}, "gate must be a positive integer, got 0"),
        ({"d_state": 1}, "d_state must be at least 2"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"dt_min": 0.2}, "need 0 < dt_min <= dt_max"),
        ({"dt_transform": "log"}, "dt_transform must be one of"),
        ({"real_transform": "square"}, "real_transform must be one of"),
        ({"imag_transform": "sigmoid"}, "stores numbers below 1"),
        ({"deterministic": True, "dt_tie": False}, "deterministic=True needs dt_tie=True"),
        ({"init": "legt"}, "legt needs rank >= 2"),
        ({"init": "diag-lin", "imag_scale": -1.0}, "Re > 0 or Im > 0"),
        ({"B_init": "random"}, r"init 'legs' takes \['B_clip'\]"),
        ({"kernel": "s4"}, r"got \['kernel'\]"),
        ({"reference": "other"}, "reference must be one of"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
    with pytest.raises(ValueError, match=r"got \['disc'\]"):
        make(S4, disc="zoh")


@pytest.mark.parametrize("cls", BOTH)
def test_bad_inputs(cls):
    layer = make(cls)
    x, cache = noise(2, 5, 4), layer.allocate_inference_cache(2)
    with pytest.raises(ValueError, match=r"\(B, L, H\) with H = 4, got shape \(2, 5, 3\)"):
        layer(noise(2, 5, 3))
    with pytest.raises(ValueError, match=r"\(B, H, L\) with H = 4, got shape \(2, 5, 4\); transposed=False"):
        make(cls, transposed=True)(x)
    with pytest.raises(TypeError, match="int32"):
        layer(jnp.ones((2, 5, 4), jnp.int32))
    with pytest.raises(ValueError, match="not both"):
        layer(x, state=cache["lrnn_state"], inference_cache=cache)
    with pytest.raises(ValueError, match="lrnn_state must have shape"):
        layer(x, state=noise(3, 4, 4))
    with pytest.raises(ValueError, match="must have the keys"):
        layer.step(x[:, 0], {})
    with pytest.raises(ValueError, match="time-invariant"):
        layer(x, integration_timesteps=jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="rate must be positive"):
        layer(x, rate=0)
    with pytest.raises(ValueError, match="lengths must have shape"):
        layer(x, jnp.ones((3,), jnp.int32))
    with pytest.raises(TypeError, match="lengths must be integers"):
        layer(x, jnp.ones((2,)))
