"""compat_torch.models.original.s5: the definitions, streaming, masks, step scales, initial values, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layers
from oracles.layers import QUICK, WIDE, call, close, intervals, noise
from oracles.original_s5 import flax_s5, s5_block, s5_pytorch

from compat_torch import decode
from compat_torch.models.original.s5 import S5, S5SSM, S5Block
from spyx.ops.hippo import block_normal_form

FULL = pytest.mark.full


def make_ssm(H=3, P=8, seed=0, **kwargs):
    return S5SSM(H, P, dt_min=0.01, dt_max=0.5, **kwargs, rngs=nnx.Rngs(seed))


def make(width=3, state_width=4, seed=0, **kwargs):
    return S5(width, state_width, dt_min=0.01, dt_max=0.5, **kwargs, rngs=nnx.Rngs(seed))


def make_block(dim=3, state_dim=4, bidir=False, seed=0, **kwargs):
    return S5Block(dim, state_dim, bidir, **kwargs, rngs=nnx.Rngs(seed))


@partial(jax.jit, static_argnums=0)
def _with_state(graph, params, x, scale, state):
    return nnx.merge(graph, params)(x, scale, state, return_state=True)


def with_state(layer, x, scale=1.0, state=None):
    return _with_state(*nnx.split(layer), x, scale, state)


def ssm_options(layer):
    return {name: getattr(layer, name) for name in ("discretization", "conj_sym", "clip_eigs", "step_rescale")}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"discretization": "bilinear", "blocks": 2, "C_init": "lecun_normal"},
        {"conj_sym": False, "step_rescale": 2.5, "C_init": "complex_normal"},
        {"bidirectional": True, "discretization": "bilinear", "conj_sym": False, "clip_eigs": True},
        {"bidirectional": True, "C_init": "complex_normal", "blocks": 4, "clip_eigs": True},
    ],
)
def test_s5ssm_is_its_definition(kwargs):
    layer, x = make_ssm(**kwargs), noise(2, 17, 3)
    layer.Lambda_re.set_value(layer.Lambda_re[...].at[1].set(0.05))
    expected = flax_s5(layer.state_dict(), x, **ssm_options(layer))
    close(call(layer, x), expected)
    short = call(layer, x[1], lengths=9)
    close(short[:9], flax_s5(layer.state_dict(), x[1, :9], **ssm_options(layer)))
    np.testing.assert_array_equal(short[9:], 0)
    unclipped = {**ssm_options(layer), "clip_eigs": False}
    assert np.allclose(expected, flax_s5(layer.state_dict(), x, **unclipped)) != layer.clip_eigs


def scales(B, L):
    return {"number": 0.4, "row": intervals(B), "step": intervals(B, L)}


LIQUID = {"liquid": True}
FACTORIZED = {"bidir": True, "liquid": True, "factor_rank": 2}
BLOCKS = {"bidir": True, "block_count": 2, "bcInit": "complex_normal"}
POWER = {"degree": 2, "state_width": 3, "bcInit": "dense_columns"}


@pytest.mark.parametrize(
    ("kwargs", "scale"),
    [
        (LIQUID, "step"),
        (FACTORIZED, "step"),
        (BLOCKS, "row"),
        (POWER, "number"),
        *(
            pytest.param(kwargs, scale, marks=FULL)
            for kwargs in ({}, LIQUID, FACTORIZED, BLOCKS, POWER)
            for scale in ("number", "row", "step")
        ),
    ],
)
def test_s5_is_its_definition(kwargs, scale):
    layer, x, step_scale = make(**kwargs), noise(2, 11, 3), scales(2, 11)[scale]
    options = {"liquid": layer.liquid, "degree": layer.degree}
    expected, last = s5_pytorch(layer.state_dict(), x, step_scale, **options)
    close(call(layer, x, step_scale), expected)
    if layer.bidir:
        return
    first, rest = (step_scale[:, part] if scale == "step" else step_scale for part in (slice(4), slice(4, None)))
    y, state = with_state(layer, x[:, :4], first)
    y2, state = with_state(layer, x[:, 4:], rest, state)
    close(jnp.concatenate([y, y2], 1), expected)
    close(state, last)


def test_steps_take_a_scale_for_each_row():
    layer, x, scale = make(liquid=True), noise(2, 4, 3), intervals(2)
    expected, last = s5_pytorch(layer.state_dict(), x, scale, liquid=True)
    step = jax.jit(layer.step)
    cache = layer.allocate_inference_cache(2)
    for t in range(4):
        y, cache = step(x[:, t], cache, scale)
        close(y, expected[:, t])
    close(cache["lrnn_state"], last)


@pytest.mark.parametrize("kwargs", [{"glu": False, "ff_mult": 1.7}, {"bidir": True, "ff_mult": 0.5, "factor_rank": 1}])
def test_s5_block_is_its_definition(kwargs):
    layer, x = make_block(**kwargs), noise(2, 9, 3)
    for name in ("attn_norm", "ff_norm"):
        norm = getattr(layer, name)
        norm.scale.set_value(noise(3, seed=4)), norm.bias.set_value(noise(3, seed=5))
    close(call(layer, x), s5_block(layer.state_dict(), x))


@st.composite
def configurations(draw):
    B, L, H, half = (draw(st.integers(1, n)) for n in (3, 8, 5, 3))
    kind = draw(st.sampled_from(["ssm", "plain", "liquid", "factorized", "degree"]))
    seed, cut, event = draw(st.integers(0, 99)), draw(st.integers(0, 8)), draw(st.booleans())
    if kind == "ssm":
        options = {
            "discretization": draw(st.sampled_from(["zoh", "bilinear"])),
            "conj_sym": draw(st.booleans()),
            "clip_eigs": draw(st.booleans()),
        }
        return make_ssm(H, 2 * half, seed, **options), noise(B, L, H, seed=seed), cut, None
    options = {"liquid": {"liquid": True}, "factorized": {"factor_rank": 2}, "degree": {"degree": 2}}.get(kind, {})
    layer = make(H, H if kind == "degree" else half, seed, **options)
    return layer, noise(B, L, H, seed=seed), cut, intervals(B, L, seed=seed) if event else None


def check(configuration):
    layer, x, cut, timesteps = configuration
    if isinstance(layer, S5SSM):
        expected = flax_s5(layer.state_dict(), x, **ssm_options(layer))
    else:
        options = {"liquid": layer.liquid, "degree": layer.degree}
        expected = s5_pytorch(layer.state_dict(), x, 1.0 if timesteps is None else timesteps, **options)[0]
    layers.check_equivalence(layer, x, expected, cut, timesteps)


@settings(QUICK, max_examples=2)
@given(configurations())
def test_forward_pieces_and_steps_agree(configuration):
    check(configuration)


@pytest.mark.full
@WIDE
@given(configurations())
def test_forward_pieces_and_steps_agree_everywhere(configuration):
    check(configuration)


@pytest.mark.full
def test_forward_pieces_and_steps_of_a_block_agree():
    layer, x = make_block(liquid=True), noise(2, 5, 3)
    layers.check_equivalence(layer, x, s5_block(layer.state_dict(), x, liquid=True), 2)


def test_a_block_streams():
    layer, x = make_block(), noise(2, 5, 3)
    expected = s5_block(layer.state_dict(), x)
    y, cache = call(layer, x[:, :2], inference_cache=layer.allocate_inference_cache(2))
    close(y, expected[:, :2])
    close(decode(layer, x[:, 2:], cache)[0], expected[:, 2:])


BOTH_WAYS = {
    "S5SSM": partial(make_ssm, bidirectional=True),
    "S5": partial(make, bidir=True),
    "S5 liquid": partial(make, bidir=True, liquid=True),
    "S5Block": partial(make_block, bidir=True),
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_layers_in_both_directions_mask_and_have_no_state(name):
    layer = BOTH_WAYS[name]()
    x, lengths = noise(2, 6, 3), np.array([6, 2])
    padded = x.at[1, 2:].set(jnp.nan)
    y = call(layer, padded, lengths=lengths)
    close(y[1, :2], call(layer, x[1:, :2])[0])
    np.testing.assert_array_equal(y[1, 2:], 0)
    with pytest.raises(ValueError, match=r"there is no state|has no cache"):
        layer.allocate_inference_cache(2)
    cache = {"lrnn_state": jnp.zeros((2, 4), complex)}
    with pytest.raises(ValueError, match=r"there is no state|has no cache"):
        layer(x, inference_cache=cache)
    with pytest.raises(ValueError, match=r"there is no state|has no cache"):
        layer.step(x[:, 0], cache)
    if not isinstance(layer, S5SSM):
        with pytest.raises(ValueError, match="there is no state"):
            layer(x, return_state=True)


def test_padding_reaches_no_gradient():
    layers.check_padding_gradients(make(bidir=True), noise(2, 4, 3), intervals(2, 4).at[1, 2:].set(jnp.nan))


@pytest.mark.full
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_padding_reaches_no_gradient_anywhere(name):
    layers.check_padding_gradients(BOTH_WAYS[name](), noise(2, 6, 3))


LAYERS = {
    "S5SSM": (make_ssm, flax_s5),
    "S5": (lambda **kw: make(liquid=True, **kw), lambda w, x: s5_pytorch(w, x, liquid=True)[0]),
    "S5Block": (make_block, s5_block),
}


@pytest.mark.parametrize("name", ["S5", pytest.param("S5SSM", marks=FULL), pytest.param("S5Block", marks=FULL)])
def test_x64_jit_vmap_and_finite_differences(name):
    build, oracle = LAYERS[name]
    layers.check_x64(build, oracle, noise(2, 5, 3))
    layers.check_scanned_steps(build, noise(3, 2, 3))


@pytest.mark.parametrize("name", ["S5Block", pytest.param("S5SSM", marks=FULL), pytest.param("S5", marks=FULL)])
def test_bfloat16(name):
    build, oracle = LAYERS[name]
    layers.check_bfloat16(build(dtype=jnp.bfloat16), oracle, noise(2, 9, 3))


@pytest.mark.parametrize("name", ["S5Block", pytest.param("S5SSM", marks=FULL), pytest.param("S5", marks=FULL)])
def test_round_trip_and_sequences_without_steps(name):
    build, _ = LAYERS[name]
    layers.check_round_trip(build(seed=1), lambda: build(seed=2))
    layer = build()
    y, cache = call(layer, noise(2, 0, 3), inference_cache=layer.allocate_inference_cache(2))
    assert y.shape == (2, 0, 3)
    assert not cache["lrnn_state"].any()


def test_torch_tensors_in_and_out():
    import torch

    layer, x, scale = make(), noise(2, 5, 3), intervals(2, 5)
    y, state = layer(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(scale)), return_state=True)
    assert isinstance(y, torch.Tensor)
    assert isinstance(state, torch.Tensor)
    close(y.numpy(), with_state(layer, x, scale)[0])


def test_a_sequence_without_batch_streams():
    layer, x = make_ssm(), noise(7, 3)
    y, cache = call(layer, x[:4], inference_cache=layer.allocate_inference_cache(1))
    rest, _ = call(layer, x[4:], inference_cache=cache)
    close(jnp.concatenate([y, rest]), call(layer, x))


def test_a_step_scale_may_be_a_number_of_any_kind_and_a_state_zero():
    layer, x = make(), noise(2, 5, 3)
    close(call(layer, x, 2), call(layer, x, jnp.full((2, 5), 2.0)))
    close(with_state(layer, x, 1.0, layer.initial_state(2))[0], call(layer, x))
    assert layer.initial_state().shape == (4,)


@pytest.mark.parametrize(
    "build", [partial(make_ssm, bidirectional=True), partial(make_block, factor_rank=2, liquid=True)]
)
def test_every_float32_dot_is_highest(build):
    graph, params = nnx.split(build())

    def gradient(params, x):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x)), allow_int=True)(params)

    program = jax.jit(gradient).trace(params, noise(2, 9, 3)).lower(lowering_platforms=("tpu",)).as_text()
    lines = re.findall(r"stablehlo\.dot_general\b.*", program)
    assert lines
    assert [line for line in lines if "f32" in line and "[HIGHEST, HIGHEST]" not in line] == []


def test_dropout_needs_rngs_in_training_and_nothing_in_evaluation():
    layer, x = make_block(ff_dropout=0.5, attn_dropout=0.5), noise(2, 5, 3)
    with pytest.raises(ValueError, match=r"attn_dropout=0.5 in training mode needs rngs"):
        layer(x)
    dropped = nnx.jit(lambda layer, rngs: layer(x, rngs=rngs))
    a, b = (dropped(layer, nnx.Rngs(dropout=seed)) for seed in (0, 1))
    assert np.mean(np.asarray(a) == 0) > 0.2
    assert not np.array_equal(a, b)
    layer.eval()
    close(call(layer, x), s5_block(layer.state_dict(), x))


@pytest.mark.parametrize("conj_sym", [False, True])
def test_blocks_are_the_eigensystem_of_the_normal_part_of_hippo(conj_sym):
    eigenvalues, V = block_normal_form(12, 3, conj_sym=conj_sym)
    root = np.sqrt(2 * np.arange(4) + 1)
    normal = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(4) + 1) + np.outer(root, root) / 2
    np.testing.assert_allclose(np.kron(np.eye(3), normal) @ V, V * eigenvalues, atol=1e-12)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(6 if conj_sym else 12), atol=1e-12)
    assert not conj_sym or (eigenvalues.imag < 0).all()
    with pytest.raises(ValueError, match="cannot share 12 states"):
        block_normal_form(12, 5)


def parts(layer):
    return {name: (value.shape, str(value.dtype)) for name, value in layer.state_dict().items()}


def variance(value):
    return np.mean(np.abs(np.asarray(value)) ** 2)


def test_names_shapes_and_initial_values_of_s5ssm():
    H, P = 60, 32
    layer = S5SSM(H, P, blocks=2, dt_min=0.01, dt_max=0.2, rngs=nnx.Rngs(0))
    shapes = {name: shape for name, (shape, _) in parts(layer).items()}
    assert shapes == {
        "Lambda_re": (16,), "Lambda_im": (16,), "B": (16, H, 2), "C": (H, 16, 2), "D": (H,), "log_step": (16, 1),
    }  # fmt: skip
    eigenvalues, _ = block_normal_form(P, 2, conj_sym=True)
    close(layer.Lambda_re[...] + 1j * layer.Lambda_im[...], eigenvalues)
    dt = np.exp(layer.log_step[...])
    assert 0.01 <= dt.min() < 0.05 < dt.max() <= 0.2001
    np.testing.assert_allclose([variance(layer.B[...]), variance(layer.C[...])], [1 / P / 2, 1 / P], rtol=0.15)


@pytest.mark.full
def test_other_initial_values_of_s5ssm():
    H, P = 60, 32
    lecun = S5SSM(H, P, "lecun_normal", bidirectional=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose([variance(lecun.C1[...]), variance(lecun.C2[...])], 1 / H / P, rtol=0.15)
    assert not np.array_equal(lecun.C1[...], lecun.C2[...])
    normal = S5SSM(H, P, "complex_normal", bidirectional=True, conj_sym=False, rngs=nnx.Rngs(0))
    assert normal.C.shape == (H, 2 * P, 2)
    np.testing.assert_allclose([variance(normal.C[...]), variance(normal.D[...])], [0.5, 1], rtol=0.3)


@pytest.mark.parametrize("conj_sym", [False, True])
def test_s5ssm_takes_the_references_own_initial_values(conj_sym):
    eigenvalues, V = block_normal_form(8, 2, conj_sym=conj_sym)
    n = len(eigenvalues)
    start = {"Lambda_re_init": eigenvalues.real, "Lambda_im_init": eigenvalues.imag, "V": V, "Vinv": V.conj().T}
    layer = S5SSM(H=3, P=n, conj_sym=conj_sym, **start, rngs=nnx.Rngs(5))
    same = S5SSM(H=3, P=8, conj_sym=conj_sym, blocks=2, rngs=nnx.Rngs(5))
    for name, value in same.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)
    with pytest.raises(ValueError, match="go together, got no"):
        S5SSM(3, n, V=V)
    with pytest.raises(ValueError, match="blocks must be 1, got 2"):
        S5SSM(3, n, conj_sym=conj_sym, blocks=2, **start)
    with pytest.raises(ValueError, match=r"Lambda_re_init must have shape"):
        S5SSM(3, 2 * n, conj_sym=conj_sym, **start)


def test_names_shapes_and_initial_values_of_s5():
    H, P = 60, 32
    layer, shrink = S5(H, P, bidir=True, rngs=nnx.Rngs(0)), 0.774**2
    kinds = {
        "seq.Lambda": ((P,), "complex64"), "seq.C": ((H, 2 * P), "complex64"), "seq.B": ((P, H, 2), "float32"),
        "seq.D": ((H,), "float32"), "seq.log_step": ((P,), "float32"),
    }  # fmt: skip
    assert parts(layer) == kinds
    w = layer.state_dict()
    close(w["seq.Lambda"], block_normal_form(P)[0])
    measured = [2 * variance(w["seq.B"]), variance(w["seq.C"])]
    np.testing.assert_allclose(measured, [shrink / P, 2 * shrink / H / P], rtol=0.15)
    assert 0 <= w["seq.D"].min() < 0.3 < 0.7 < w["seq.D"].max() <= 1
    gates = {name: shape for name, (shape, _) in parts(make_block(ff_mult=2.0)).items() if name.startswith("ff_")}
    assert gates == {
        "ff_enc.weight": (12, 3), "ff_dec.weight": (3, 6), "ff_norm.weight": (3,), "ff_norm.bias": (3,),
    }  # fmt: skip


@pytest.mark.full
def test_other_initial_values_of_s5():
    H, P, shrink = 60, 32, 0.774**2
    columns = S5(H, P, bcInit="dense_columns", rngs=nnx.Rngs(0)).state_dict()
    np.testing.assert_allclose(variance(columns["seq.C"]), shrink / H, rtol=0.15)
    np.testing.assert_allclose(
        variance(S5(H, P, bcInit="complex_normal", rngs=nnx.Rngs(0)).state_dict()["seq.C"]), 0.5, rtol=0.15
    )
    factors = S5(H, P, 5, bidir=True, bcInit="factorized", rngs=nnx.Rngs(0)).state_dict()
    sizes = {"BH": ((H, 5), H), "BP": ((P, 5), P), "CH": ((5, H), 5), "CP": ((5, 2 * P), 5)}
    assert {name: factors[f"seq.{name}"].shape for name in sizes} == {name: shape for name, (shape, _) in sizes.items()}
    for name, (_, fan_in) in sizes.items():
        np.testing.assert_allclose(variance(factors[f"seq.{name}"]), shrink / fan_in, rtol=0.3)
    assert S5(4).state_width == 4
    assert not np.array_equal(S5(4).seq.B[...], S5(4).seq.B[...])


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [
        (S5SSM, {"H": 3, "P": 8, "C_init": "normal"}, "C_init must be one of"),
        (S5SSM, {"H": 3, "P": 8, "discretization": "dirac"}, "discretization must be one of"),
        (S5SSM, {"H": 3, "P": 6, "blocks": 2}, "2 blocks of conjugate pairs cannot share 6 states"),
        (S5SSM, {"H": 3, "P": 8, "step_rescale": 0}, "step_rescale must be positive"),
        (S5SSM, {"H": 3, "P": 8, "dt_min": 1}, "0 < dt_min <= dt_max"),
        (S5SSM, {"H": 0, "P": 8}, "H must be a positive integer"),
        (S5, {"width": 3, "bcInit": "sparse"}, "bcInit must be one of"),
        (S5, {"width": 3, "bcInit": "factorized"}, "factor_rank and bcInit='factorized' go together"),
        (S5, {"width": 3, "factor_rank": 2, "bcInit": "dense"}, "go together"),
        (S5, {"width": 3, "state_width": 4, "degree": 2}, "degree=2 needs state_width == width"),
        (S5, {"width": 3, "block_count": 2}, "block_count must divide state_width"),
        (S5, {"width": 3, "degree": 0}, "degree must be a positive integer"),
        (S5Block, {"dim": 3, "state_dim": 4, "bidir": False, "ff_mult": 0.1}, "at least 1"),
        (S5Block, {"dim": 3, "state_dim": 4, "bidir": False, "ff_dropout": 1.5}, r"ff_dropout must be in \[0, 1\]"),
    ],
)
def test_arguments_they_cannot_honour_raise(build, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_inputs_that_do_not_fit_raise():
    layer, x = make(), noise(2, 4, 3)
    cache = layer.allocate_inference_cache(2)
    with pytest.raises(ValueError, match=r"expects input \(B, L, H\) with H = 3, got shape \(2, 4, 5\)"):
        layer(noise(2, 4, 5))
    with pytest.raises(ValueError, match="step_scale must have one of the shapes"):
        layer(x, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="step_scale must be real"):
        layer(x, jnp.ones((2, 4), complex))
    with pytest.raises(ValueError, match=r"state must have shape \(2, 4\)"):
        layer(x, state=jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="pass inference_cache, or state"):
        layer(x, return_state=True, inference_cache=cache)
    with pytest.raises(ValueError, match="must have the key 'lrnn_state'"):
        layer.step(x[:, 0], {})
    with pytest.raises(TypeError, match="bandlimit"):
        make(bandlimit=0.5)
    with pytest.raises(ValueError, match="time-invariant"):
        make_ssm()(x, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"lrnn_state must have shape \(1, 4\)"):
        make_ssm()(x[0], inference_cache=make_ssm().allocate_inference_cache(2))
