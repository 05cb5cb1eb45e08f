"""The S4 layers and the whole model of state-spaces/s4."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import original_s4 as oracle
from safetensors.numpy import load_file

from compat_torch import decode, optim
from compat_torch.architectures.original import S4Model
from compat_torch.core.variables import Buffer
from compat_torch.models.original import S4D, S4Block
from compat_torch.state import entries
from parity.case import GOLDEN, read_case
from parity.compare import check
from parity.subjects import subjects_of

UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # every attempt compiles anew
QUICK = settings(
    max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=UNSHRUNK
)
WIDE = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
STEP_MODES = ["dense", "linear", "diagonal"]
TRANSFORMS = ("none", "exp", "relu", "softplus")
ACTS = (None, "id", "gelu", "glu", "silu", "tanh", "sigmoid", "relu")


def make(cls=S4Block, **kwargs):
    kwargs = {"d_model": 4, "d_state": 4, "transposed": False, "rngs": nnx.Rngs(3), **kwargs}
    return cls(**kwargs)


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def values(layer):
    return {name: np.asarray(value) for name, value in layer.state_dict().items()}


def shapes(layer):
    return {entry.name: entry.expected.shape for entry in entries(layer)}


@st.composite
def blocks(draw, mode):
    H = draw(st.sampled_from([1, 2, 4]))
    bottleneck = draw(st.sampled_from([None, 1, 2]))
    is_real = draw(st.booleans()) if mode == "diag" else False
    inits = ["legs", "diag-lin", "diag-inv", "diag-real", "diag-rand"]
    init = draw(st.sampled_from(inits if mode == "diag" else [*inits, "legt", "dplr-lin"]))
    kwargs = {
        "d_model": H * (bottleneck or 1),
        "bottleneck": bottleneck,
        "gate": draw(st.sampled_from([None, 1, 2])),
        "gate_act": draw(st.sampled_from(ACTS)),
        "mult_act": draw(st.sampled_from([None, "gelu", "tanh"])),
        "final_act": draw(st.sampled_from(ACTS)),
        "activation": draw(st.sampled_from(ACTS)),
        "transposed": draw(st.booleans()),
        "l_max": draw(st.sampled_from([None, 1, 3, 8])),
        "channels": draw(st.sampled_from([1, 2])),
        "swap_channels": draw(st.booleans()),
        "bidirectional": draw(st.sampled_from([False, False, True])),
        "mode": mode,
        "d_state": draw(st.sampled_from([2, 3, 4, 6])),
        "is_real": is_real,
        "bandlimit": None if is_real else draw(st.sampled_from([None, 0.02, 0.2])),
        "dt_tie": draw(st.booleans()),
        "dt_transform": draw(st.sampled_from([*TRANSFORMS, "sigmoid"])),
        "dt_fast": draw(st.booleans()),
        "real_transform": draw(st.sampled_from(TRANSFORMS)),
        "imag_transform": draw(st.sampled_from(TRANSFORMS)),
        "rank": 2 if init == "legt" else draw(st.sampled_from([1, 2, 3])),
        "n_ssm": draw(st.sampled_from([None, 1])),
        "init": init,
    }
    if mode == "diag":
        kwargs["disc"] = draw(st.sampled_from([None, "zoh", "bilinear"]))
    return kwargs


def check_block(kwargs, L, seed, step_mode):
    with jax.enable_x64(True):
        layer = S4Block(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        x = noise(2, L, layer.d_model, seed=seed + 1, dtype=jnp.float64)
        turn = (lambda v: jnp.swapaxes(v, 1, 2)) if layer.transposed else (lambda v: v)
        limit = {"atol": 1e-8, "rtol": 1e-7}
        p = oracle.parameters(layer)

        y, state = layer(turn(x))
        expected = oracle.block(kwargs, p, np.asarray(x))
        assert state is None
        assert y.shape == turn(expected).shape
        assert layer.d_output == expected.shape[-1]
        np.testing.assert_allclose(turn(y), expected, **limit)

        lengths = jnp.array([L // 2, L])
        valid = (jnp.arange(L) < lengths[:, None])[..., None]
        padded = turn(jnp.where(valid, x, jnp.nan))
        masked, _ = layer(padded, lengths)
        np.testing.assert_allclose(turn(masked)[1], expected[1], **limit)
        np.testing.assert_allclose(turn(masked)[0, L // 2 :], 0, atol=0)
        short = oracle.block(kwargs, p, np.asarray(x[:1, : max(L // 2, 1)]))
        np.testing.assert_allclose(turn(masked)[0, : L // 2], short[0, : L // 2], **limit)
        if layer.bidirectional:
            return

        whole = oracle.block(kwargs, p, np.asarray(x), whole=True)
        mode = {} if kwargs["mode"] == "diag" else {"mode": step_mode}
        before = layer.allocate_inference_cache(2, **mode)
        cut = seed % (L + 1)
        first, cache = layer(turn(x[:, :cut]), inference_cache=before)
        second, cache = layer(turn(x[:, cut:]), inference_cache=cache)
        np.testing.assert_allclose(np.concatenate([turn(first), turn(second)], 1), whole, **limit)
        _, after = layer(padded, lengths, inference_cache=before)
        np.testing.assert_allclose(after["lrnn_state"][1], cache["lrnn_state"][1], atol=1e-6, rtol=1e-6)

        stepped = oracle.block(kwargs, p, np.asarray(x), step=True)
        y, by_steps = decode(layer, turn(x), before)
        np.testing.assert_allclose(turn(y), stepped, **limit)
        np.testing.assert_allclose(by_steps["lrnn_state"], cache["lrnn_state"], atol=1e-6, rtol=1e-6)
        last, _ = layer.step(x[:, -1], cache)
        assert last.shape == (2, layer.d_output)
        assert not np.any(before["lrnn_state"])


LENGTHS = st.sampled_from([1, 2, 5, 7])
GIVEN = (LENGTHS, st.integers(0, 99), st.sampled_from(STEP_MODES))


@pytest.mark.parametrize("mode", ["diag", "dplr"])
def test_block_is_its_definition(mode):
    QUICK(given(blocks(mode), *GIVEN)(check_block))()


@pytest.mark.full
@pytest.mark.parametrize("mode", ["diag", "dplr"])
def test_block_is_its_definition_wide(mode):
    WIDE(given(blocks(mode), *GIVEN)(check_block))()


def test_names_and_shapes():
    layer = make(channels=2, gate=3, gate_act="glu", bottleneck=2, n_ssm=1, rank=2, init="legt", activation="glu")
    assert shapes(layer) == {
        "layer.D": (4, 2),
        "layer.kernel.inv_dt": (2, 1),
        "layer.kernel.C": (4, 2, 2, 2),
        "layer.kernel.B": (1, 1, 2, 2),
        "layer.kernel.A_real": (1, 2),
        "layer.kernel.A_imag": (1, 2),
        "layer.kernel.P": (2, 1, 2, 2),
        "layer.kernel.l_kernel": (),
        "input_linear.weight": (2, 4),
        "input_linear.bias": (2,),
        "input_gate.0.weight": (12, 4),
        "input_gate.0.bias": (12,),
        "output_gate.weight": (6, 4),
        "output_gate.bias": (6,),
        "output_linear.0.weight": (8, 6),
        "output_linear.0.bias": (8,),
    }
    assert "input_gate.weight" in shapes(make(gate=1))
    real = shapes(make(mode="diag", is_real=True, init="diag-real"))
    assert real["layer.kernel.C"] == (1, 4, 4)
    assert "layer.kernel.A_imag" not in real
    assert shapes(make(bidirectional=True, activation="glu"))["layer.kernel.C"] == (4, 4, 2, 2)
    for path in sorted(GOLDEN.glob("s4repo_*")):
        meta = json.loads((path / "case.json").read_text())
        cls = {"S4Block": S4Block, "S4D": S4D}.get(meta["cls"].split(":")[1])
        weights = {name: value.shape for name, value in load_file(path / "weights.safetensors").items()}
        if cls is not None and meta.get("kind") != "digits":
            assert shapes(nnx.eval_shape(lambda cls=cls, meta=meta: cls(**meta["kwargs"]))) == weights


@pytest.mark.parametrize("case", ["block_dplr_step_diagonal", "block_diag_bidir", "s4d_lr0_buffers"])
def test_golden(case):
    case = read_case(GOLDEN / f"s4repo_{case}")
    (subject,) = subjects_of(case.cls)
    row = check(case, subject)
    assert row.verdict == "identical", row.note


def test_digits_accuracy_and_cross_entropy():
    folder = GOLDEN / "s4repo_digits_trained"
    meta, io = json.loads((folder / "case.json").read_text()), load_file(folder / "io.safetensors")
    kwargs = {name: value for name, value in meta["kwargs"].items() if name != "seed"}
    model = S4Model(**kwargs)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    model.eval()
    logits = np.asarray(nnx.jit(lambda m, x: m(x))(model, io["x"]), np.float64)
    labels = io["labels"]
    assert 100 * np.mean(logits.argmax(-1) == labels) == pytest.approx(meta["accuracy"], abs=1e-4)
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    cross_entropy = np.mean(log_sum - logits[np.arange(len(labels)), labels])
    assert cross_entropy == pytest.approx(meta["cross_entropy"], abs=1e-5)


def test_step_modes_and_their_caches():
    layer, x = make(l_max=16, d_state=8, channels=2), noise(2, 9, 4)
    whole = layer(x)[0]
    expected = {
        "linear": {"lrnn_state": (2, 4, 8), "dC": (2, 4, 4)},
        "dense": {"lrnn_state": (2, 4, 8), "dA": (4, 8, 8), "dB": (4, 8), "dC": (2, 4, 8)},
        "diagonal": {
            "lrnn_state": (2, 4, 8, 4), "dA": (4, 8, 4), "dB": (4, 8, 4), "dC": (2, 4, 8, 4),
            "V": (4, 8, 8, 4), "V_inv": (4, 8, 8, 4),
        },
    }  # fmt: skip
    for mode in STEP_MODES:
        cache = layer.allocate_inference_cache(2, mode=mode)
        assert {name: value.shape for name, value in cache.items()} == expected[mode]
        first, cache = layer(x[:, :4], inference_cache=cache)
        rest, _ = decode(layer, x[:, 4:], cache)
        np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=3e-6, err_msg=mode)
        grad = jax.grad(lambda x, c=cache: jnp.sum(decode(layer, x, c)[0] ** 2))(x[:, 4:])
        assert np.isfinite(grad).all()
    assert layer.allocate_inference_cache(2).keys() == expected["dense"].keys()
    jitted = nnx.jit(lambda m: m.allocate_inference_cache(2, mode="diagonal"))(layer)
    assert jitted.keys() == expected["diagonal"].keys()
    assert layer.default_state(2).shape == (2, 4, 8)


@pytest.mark.full
def test_diagonal_steps_of_many_states_and_eigenvectors_that_do_not_exist():
    many, x = make(d_state=64, d_model=2, n_ssm=1), noise(1, 40, 2)
    y, _ = decode(many, x, many.allocate_inference_cache(1, mode="diagonal"))
    np.testing.assert_allclose(y, many(x)[0], atol=3e-6)
    many.layer.kernel.inv_dt.set_value(jnp.full((2, 1), jnp.nan))
    with pytest.raises(ValueError, match=r'mode="diagonal" needs eigenvectors of A_bar that can be inverted'):
        many.allocate_inference_cache(1, mode="diagonal")


def test_modes_that_are_none():
    layer = make()
    with pytest.raises(ValueError, match="mode of the cache must be one of"):
        layer.allocate_inference_cache(1, mode="quick")
    with pytest.raises(ValueError, match="mode of the cache must be one of"):
        make(mode="diag").allocate_inference_cache(1, mode="dense")


def test_state_chains_as_in_the_reference():
    for kwargs in ({}, {"mode": "diag"}):
        layer, x = make(**kwargs), noise(2, 9, 4)
        first, state = layer(x[:, :5], state=layer.default_state(2))
        second, _ = layer(x[:, 5:], state=state)
        np.testing.assert_allclose(np.concatenate([first, second], 1), layer(x)[0], atol=3e-6)


def test_a_forward_changes_nothing_and_both_forms_of_c_are_the_same():
    layer, x = make(), noise(2, 6, 4)
    y = layer(x)[0]
    for M in (6, 40, 0):
        layer.set_kernel_length(M)
        before = values(layer)
        np.testing.assert_allclose(layer(x)[0], y, atol=3e-5)
        np.testing.assert_equal(values(layer), before)
    assert int(values(make(l_max=7))["layer.kernel.l_kernel"]) == 7
    for kwargs in ({"mode": "diag"}, {"bandlimit": 0.5}):
        with pytest.raises(ValueError, match="set_kernel_length is for mode='dplr' without bandlimit"):
            make(**kwargs).set_kernel_length(3)


def test_a_bidirectional_block_has_no_step():
    layer, x = make(bidirectional=True), noise(2, 5, 4)
    calls = (
        lambda: layer.allocate_inference_cache(2),
        lambda: layer.step(x[:, 0], {"lrnn_state": noise(2, 4, 4)}),
        lambda: layer(x, state=noise(2, 4, 4)),
        lambda: layer(x, inference_cache={"lrnn_state": noise(2, 4, 4), "dA": noise(4, 4, 4)}),
        lambda: layer.default_state(2),
    )
    for call in calls:
        with pytest.raises(ValueError, match="bidirectional=True needs the whole sequence"):
            call()


def test_standalone_is_its_definition():
    with jax.enable_x64(True):
        layer, x = make(S4D, param_dtype=jnp.float64, dt_max=0.5), noise(3, 9, 4, dtype=jnp.float64)
        p, limit = oracle.parameters(layer), {"atol": 1e-10}
        expected = oracle.s4d(p, np.asarray(x))
        y, state = layer(x)
        assert state is None
        np.testing.assert_allclose(y, expected, **limit)
        transposed = make(S4D, param_dtype=jnp.float64, transposed=True)
        transposed.load_state_dict(layer.state_dict())
        np.testing.assert_allclose(jnp.swapaxes(transposed(jnp.swapaxes(x, 1, 2))[0], 1, 2), expected, **limit)
        lengths = jnp.array([0, 4, 9])
        valid = (jnp.arange(9) < lengths[:, None])[..., None]
        y, cache = layer(jnp.where(valid, x, jnp.nan), lengths, inference_cache=layer.allocate_inference_cache(3))
        np.testing.assert_allclose(y, np.where(valid, expected, 0), **limit)
        y, _ = layer(x[1:2, 4:], inference_cache={"lrnn_state": cache["lrnn_state"][1:2]})
        np.testing.assert_allclose(y, expected[1:2, 4:], **limit)
        y, cache = decode(layer, x, layer.allocate_inference_cache(3))
        np.testing.assert_allclose(y, expected, **limit)


@pytest.mark.parametrize("prenorm", [False, True])
def test_model_is_its_definition(prenorm):
    with jax.enable_x64(True):
        model = S4Model(3, 5, 4, 2, prenorm=prenorm, d_state=4, dropout=0.0, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
        x = noise(2, 7, 3, dtype=jnp.float64)
        p = oracle.parameters(model)
        np.testing.assert_allclose(model(x), oracle.model(p, np.asarray(x), 2, prenorm), atol=1e-10)
        lengths = jnp.array([4, 7])
        padded = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], x, jnp.nan)
        short = oracle.model(p, np.asarray(x[:1, :4]), 2, prenorm)
        np.testing.assert_allclose(model(padded, lengths)[:1], short, atol=1e-10)


def test_model_in_training_and_its_errors():
    model, x = S4Model(3, 5, 4, 1, dropout=0.5, d_state=4, rngs=nnx.Rngs(1)), noise(2, 7, 3)
    with pytest.raises(ValueError, match=r"dropout=0.5 in training mode needs rngs"):
        model(x)
    assert not np.allclose(model(x, rngs=nnx.Rngs(dropout=1)), model(x, rngs=nnx.Rngs(dropout=2)))
    model.eval()
    assert model(x).shape == (2, 5)
    assert model(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    names = {"encoder.weight", "s4_layers.0.kernel.log_dt", "s4_layers.0.output_linear.0.weight", "norms.0.bias"}
    assert names < set(model.state_dict())
    assert "s4_layers.0.D" in model.state_dict()
    with pytest.raises(ValueError, match=r"expects input \(B, L, 3\), got shape \(2, 7, 4\)"):
        model(noise(2, 7, 4))
    with pytest.raises(TypeError, match="int32"):
        model(jnp.ones((2, 7, 3), jnp.int32))
    with pytest.raises(ValueError, match="n_layers must be a positive integer, got 0"):
        S4Model(3, n_layers=0)
    with pytest.raises(ValueError, match=r"S4Model: dropout must be in \[0, 1\], got '0.2'"):
        S4Model(3, dropout="0.2")


def test_dropout_is_before_and_after_the_activation():
    x, full = noise(2, 50, 4) + 3, {"final_act": None, "activation": None, "mode": "diag"}
    layer = make(dropout=0.5, **full)
    with pytest.raises(ValueError, match=r"dropout=0.5 in training mode needs rngs"):
        layer(x)
    dropped = layer(x, rngs=nnx.Rngs(dropout=1))[0]
    layer.eval()
    kept = dropped != 0
    assert 0.15 < kept.mean() < 0.35
    np.testing.assert_allclose(dropped[kept], 4 * layer(x)[0][kept], rtol=1e-5)
    tied = np.asarray(make(dropout=0.5, tie_dropout=True, **full)(x, rngs=nnx.Rngs(dropout=3))[0] != 0)
    np.testing.assert_array_equal(tied, np.broadcast_to(tied[:, :1], tied.shape))
    both = make(drop_kernel=0.5, bidirectional=True)
    assert not np.allclose(both(x, rngs=nnx.Rngs(dropout=1))[0], both(x, rngs=nnx.Rngs(dropout=2))[0])
    kernel = make(drop_kernel=0.5)
    for mode in ("dense", "linear"):
        with pytest.raises(ValueError, match="drop_kernel in training mode needs a call without state"):
            kernel(x, inference_cache=kernel.allocate_inference_cache(2, mode=mode), rngs=nnx.Rngs(dropout=1))


def test_learning_rates_and_decay():
    layer = make(lr={"dt": 1e-4, "A": 0.0, "C": 1e-3}, wd=0.25)
    kernel = layer.layer.kernel
    assert isinstance(kernel.A_real, Buffer)
    assert isinstance(kernel.P, Buffer)
    wishes = {name: dict(getattr(kernel, name).get_metadata().get("optim") or {}) for name in ("inv_dt", "B", "C")}
    assert wishes == {"inv_dt": {"lr": 1e-4, "weight_decay": 0.25}, "B": {"weight_decay": 0.25}, "C": {"lr": 1e-3}}
    assert {"lr": 1e-4, "weight_decay": 0.25} in optim.groups(layer).values()
    frozen = make(lr=0.0, l_max=5).layer.kernel
    assert all(isinstance(getattr(frozen, name), Buffer) for name in ("inv_dt", "A_real", "A_imag", "B", "C", "P"))
    assert isinstance(make(wd=None).layer.kernel.B, nnx.Param)
    with pytest.raises(ValueError, match=r"lr may name 'dt', 'A', 'B' and 'C', got \['D'\]"):
        make(lr={"D": 1.0})
    with pytest.raises(ValueError, match=r"wd may name 'dt', 'A' and 'B', got \['C'\]"):
        make(wd={"C": 1.0})
    alone = make(S4D, lr=0.0)
    assert all(isinstance(getattr(alone.kernel, name), Buffer) for name in ("log_dt", "log_A_real", "A_imag"))
    assert type(alone.kernel.C) is type(alone.D) is nnx.Param
    assert set(alone.state_dict()) == set(make(S4D).state_dict())
    assert dict(make(S4D, lr=0.1).kernel.log_dt.get_metadata()["optim"]) == {"lr": 0.1, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "make_layer",
    [pytest.param(make, marks=pytest.mark.full), lambda **k: make(mode="diag", **k), lambda **k: make(S4D, **k)],
)
def test_transforms_dtypes_and_empty_inputs(make_layer):
    layer, x = make_layer(), noise(2, 5, 4)
    y = layer.forward(x)[0]
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x)[0])(layer, x), y, atol=1e-6)
    graph, state = nnx.split(layer)
    by_rows = jax.vmap(lambda row: nnx.merge(graph, state)(row[None])[0][0])(x)
    np.testing.assert_allclose(by_rows, y, atol=1e-6)
    grads = nnx.grad(lambda m: jnp.sum(m(x)[0] ** 2))(layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert layer(noise(2, 0, 4))[0].shape == (2, 0, 4)
    assert layer(noise(0, 3, 4))[0].shape == (0, 3, 4)
    cache = layer.allocate_inference_cache(1)
    empty, after = layer(noise(1, 0, 4), inference_cache=cache)
    assert empty.shape == (1, 0, 4)
    np.testing.assert_array_equal(after["lrnn_state"], cache["lrnn_state"])
    small = make_layer(dtype=jnp.bfloat16)
    y, cache = small(x, inference_cache=small.allocate_inference_cache(2))
    assert (y.dtype, cache["lrnn_state"].dtype) == (jnp.bfloat16, jnp.complex64)
    y, _ = small.step(x[:, 0], cache)
    assert y.dtype == jnp.bfloat16


def test_same_rates_as_the_reference():
    layer, x = make(mode="diag", l_max=8, bandlimit=0.1), noise(1, 8, 4)
    p = oracle.parameters(layer)
    slower = {**p, "layer.kernel.inv_dt": p["layer.kernel.inv_dt"] + np.log(2.0)}
    expected = oracle.block({"mode": "diag", "l_max": 4, "bandlimit": 0.2}, slower, np.asarray(x))
    np.testing.assert_allclose(layer(x, rate=2.0)[0], expected, atol=3e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"initializer": "uniform"}, "initializer must be None and weight_norm False"),
        ({"weight_norm": True}, "initializer must be None and weight_norm False"),
        ({"mode": "dense"}, r"mode must be one of .*got 'dense'"),
        ({"kernel": "s4d"}, "pass one of mode and its other name kernel"),
        ({"mode": None}, "pass one of mode and its other name kernel"),
        ({"measure": "legs"}, "pass one of init and its other name measure"),
        ({"disc": "zoh"}, "is always disc=\"bilinear\", got disc='zoh'"),
        ({"mode": "diag", "disc": "euler"}, "disc must be one of"),
        ({"bandlimit": 0}, "bandlimit must be positive, got 0"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"activation": "gleu"}, r"activation must be one of .*got 'gleu'"),
        ({"gate_act": "gleu"}, r"gate_act must be one of .*got 'gleu'"),
        ({"mult_act": "glu"}, r"mult_act must be one of .*got 'glu'"),
        ({"final_act": "gleu"}, r"final_act must be one of .*got 'gleu'"),
        ({"postact": "glu"}, "postact is an older name of final_act"),
        ({"bottleneck": 3}, "bottleneck must divide d_model, got 3 and 4"),
        ({"n_ssm": 3}, "n_ssm must divide the width 4, got 3"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"d_state": 1}, "d_state must be at least 2"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"dt_min": 0.2}, "need 0 < dt_min <= dt_max"),
        ({"dt_transform": "log"}, "dt_transform must be one of"),
        ({"unknown": 1}, r"init 'legs' takes \['B_clip'\], got \['unknown'\]"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_other_names_of_arguments():
    assert shapes(make(mode=None, kernel="s4d")) == shapes(make(mode="diag"))
    assert make(init=None, measure="legt", rank=2).init == "legt"
    dt = jnp.exp(make(deterministic=True).layer.kernel.inv_dt[...])
    np.testing.assert_allclose(dt, np.exp(np.geomspace(0.001, 0.1, 4))[:, None], rtol=1e-5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        make(S4D, channels=2)
    with pytest.raises(ValueError, match="d_state must be at least 2"):
        make(S4D, d_state=1)


def test_dss_has_no_steps_and_bad_inputs_raise():
    layer, x = make(mode="diag", disc="dss"), noise(2, 5, 4)
    assert layer(x)[0].shape == (2, 5, 4)
    with pytest.raises(ValueError, match="no step, state or cache"):
        layer.allocate_inference_cache(2)
    block = make()
    with pytest.raises(ValueError, match=r"\(B, L, H\) with H = 4, got shape \(2, 5, 3\)"):
        block(noise(2, 5, 3))
    with pytest.raises(ValueError, match="must have the keys"):
        block.step(x[:, 0], {})
    cache = block.allocate_inference_cache(2)
    with pytest.raises(ValueError, match="dA must have shape"):
        block.step(x[:, 0], {**cache, "dA": cache["dA"][:, :1]})
    with pytest.raises(ValueError, match="time-invariant"):
        block(x, integration_timesteps=jnp.ones((2, 5)))
