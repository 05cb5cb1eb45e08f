"""spyx.quant: figures, exact arithmetic, what stays float, every kind of layer, rules, reports, errors."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from oracles.lti import diagonal_layer

from compat_torch.models.ltv import Mamba as CompatMamba
from spyx import nn, quant, ssm

MODES = ["qat", "ptq"]


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


class Model(nnx.Module):
    def __init__(self, middle, width=16, use_bias=False, seed=0):
        rngs = nnx.Rngs(seed)
        self.encoder = nnx.Linear(4, width, use_bias=use_bias, rngs=rngs)
        self.middle = middle(rngs)
        self.head = nnx.Linear(width, 3, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        return self.head(self.middle(self.encoder(x)))


def published():
    return Model(lambda rngs: ssm.LRU(16, d_state=8, rngs=rngs))


def noise(*shape, seed=7):
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


@nnx.jit
def call(model, x):
    return model(x)


@nnx.jit
def gradient(model, x):
    return nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)


def largest(a, b):
    return float(jnp.abs(a - b).max())


def rounded(x, bits, axes):
    """x on qwix's symmetric integer grid, a scale for each index of all axes but `axes`."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axes, keepdims=True) / np.float32(2 ** (bits - 1) - 0.5)
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def peaked(x, axes):
    """x with signs such that the largest magnitude is positive: at minus that, the code is a tie of -128 and -127."""
    return x * jnp.where(x.max(axes, keepdims=True) < -x.min(axes, keepdims=True), -1, 1)


def peak(layer, names, axes):
    for name in names:
        param = getattr(layer, name)
        param.set_value(peaked(param[...], axes))
    return layer


@pytest.mark.parametrize("mode", MODES)
def test_published_figures(mode):
    model, x = published(), noise(8, 2, 4)
    y = call(model, x)
    for rules, figure in (
        (None, "0.046"),
        (quant.linear_only_rules(), "0.046"),
        (quant.bitnet_ternary_rules(), "1.314"),
    ):
        quantized = quant.quantize(model, x, rules=rules, mode=mode)
        assert f"{largest(call(quantized, x), y):.3f}" == figure
    np.testing.assert_array_equal(call(model, x), y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weight", "act"), [("int8", "int8"), ("int4", None), ("int2", "int8"), (jnp.int8, None)])
def test_linear_against_numpy(mode, weight, act):
    layer, x = peak(nnx.Linear(6, 5, rngs=nnx.Rngs(1)), ["kernel"], 0), peaked(noise(3, 2, 6), -1)
    quantized = quant.quantize(layer, x, rules=quant.linear_only_rules(weight, act), mode=mode)
    bits = int((weight if isinstance(weight, str) else "int8")[3:])
    inputs = np.asarray(x) if act is None else rounded(x, 8, -1)
    expected = inputs @ rounded(layer.kernel[...], bits, 0) + layer.bias[...]
    np.testing.assert_allclose(call(quantized, x), expected, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weight", "act"), [("int8", "int8"), ("int8", None), ("int4", "int8")])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_against_numpy(mode, weight, act, groups):
    conv = nnx.Conv(4, 6, (3,), feature_group_count=groups, padding="VALID", rngs=nnx.Rngs(1))
    conv, x = peak(conv, ["kernel"], (0, 1)), peaked(noise(2, 7, 4), (1, 2))
    quantized = quant.quantize(conv, x, rules=quant.linear_only_rules(weight, act), mode=mode)
    inputs = np.asarray(x) if act is None else rounded(x, 8, (1, 2))
    kernel = rounded(conv.kernel[...], int(weight[3:]), (0, 1))
    windows = np.stack([inputs[:, k : k + 5] for k in range(3)], 2)
    parts = zip(np.split(windows, groups, -1), np.split(kernel, groups, -1), strict=True)
    expected = np.concatenate([np.einsum("btkc,kcd->btd", w, k) for w, k in parts], -1)
    np.testing.assert_allclose(call(quantized, x), expected, atol=2e-5)


def test_conv_gradient_passes_straight_through():
    conv, x = nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=nnx.Rngs(1)), noise(2, 7, 4)
    quantized = quant.quantize(conv, x)
    gradients, exact = (nnx.to_pure_dict(nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(m)) for m in (quantized, conv))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max()), gradients, exact)


MIDDLES = {
    "lru": lambda rngs: ssm.LRU(16, 4, rngs=rngs),
    "s5diag": lambda rngs: ssm.S5Diag(16, 4, rngs=rngs),
    "mamba": lambda rngs: ssm.Mamba(16, 4, rngs=rngs),
    "mamba_block": lambda rngs: ssm.MambaBlock(16, 4, expand=1, rngs=rngs),
    "chunked": lambda rngs: ssm.ChunkedSSM(ssm.LRU(16, 4, rngs=rngs), ssm.S5Diag(16, 4, rngs=rngs), chunk_size=3),
}


@pytest.mark.parametrize("name", ["lru", full("mamba_block"), full("s5diag"), full("mamba"), full("chunked")])
def test_forward_gradient_jit_and_modes_agree(name):
    model, x = Model(MIDDLES[name]), noise(6, 2, 4)
    y = call(model, x)
    qat, ptq = (quant.quantize(model, x, mode=mode) for mode in MODES)
    np.testing.assert_allclose(call(qat, x), call(ptq, x), atol=1e-5)
    assert 0 < largest(call(qat, x), y) < 0.1 * float(jnp.abs(y).max())
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(ptq, x), call(ptq, x), atol=1e-5)
    gradients, exact = (gradient(m, x) for m in (qat, model))
    assert jax.tree.structure(nnx.to_pure_dict(exact)) == jax.tree.structure(nnx.to_pure_dict(gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=0.3 * float(jnp.abs(b).max()) + 1e-4)
    np.testing.assert_array_equal(call(model, x), y)


@pytest.mark.parametrize("name", ["lru", full("s5diag")])
def test_recurrence_stays_float_even_if_first_traced_inside(name):
    model = Model(MIDDLES[name])
    quantized = quant.quantize(model, noise(5, 2, 4))
    u, x = noise(11, 2, 16, seed=1), noise(11, 2, 4)
    gradient(quantized, x)
    inside = quantized(x)
    np.testing.assert_array_equal(quantized.middle(u), model.middle(u))
    np.testing.assert_array_equal(inside, quantized.head(model.middle(quantized.encoder(x))))
    np.testing.assert_array_equal(model(x), model.head(model.middle(model.encoder(x))))
    middle = model.middle
    expected, _ = diagonal_layer(u, *middle._complex_matrices(), middle.D[...])
    np.testing.assert_allclose(middle(u), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("rules", "mode"), [("int8", "qat"), full("int8", "ptq"), ("ternary", "ptq"), full("weights", "qat")]
)
def test_mamba_block_steps_equal_the_sequence(rules, mode):
    rules = {"int8": None, "ternary": quant.bitnet_ternary_rules(), "weights": quant.weights_only_rules()}[rules]
    block, u = ssm.MambaBlock(4, 3, rngs=nnx.Rngs(1)), noise(5, 2, 4)
    quantized = quant.quantize(block, u, rules=rules, mode=mode)
    y, last = nnx.jit(lambda m, u: m(u, return_state=True))(quantized, u)
    assert largest(y, call(block, u)) > 1e-4
    assert quantized.conv.quantization.mode == mode
    step, state = nnx.jit(lambda m, u_t, state: m.step(u_t, state)), quantized.initial_state(2)
    for t, u_t in enumerate(u):
        y_t, state = step(quantized, u_t, state)
        np.testing.assert_allclose(y_t, y[t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


@pytest.mark.parametrize("mode", [full("qat"), "ptq"])
def test_compat_mamba(mode):
    layer, x = CompatMamba(8, 4, rngs=nnx.Rngs(1)), noise(2, 5, 8)
    quantized = quant.quantize(layer, x, mode=mode)
    y = call(quantized, x)
    assert 0 < largest(y, call(layer, x)) < 0.1 * float(jnp.abs(call(layer, x)).max())
    done = {path[-1] for path, m in nnx.iter_modules(quantized) if hasattr(m, "quantization")}
    assert done == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    with pytest.raises(ValueError, match=r"'conv1d' \(Conv\).*no method traced does"):
        quant.quantize(layer, x, rules=quant.weights_only_rules(module_path="conv1d"), mode=mode)


def spiking(seed=0):
    rngs = nnx.Rngs(seed)
    return nn.Sequential(
        nnx.Linear(6, 8, use_bias=False, rngs=rngs), nn.LIF((8,), rngs=rngs),
        nnx.Linear(8, 5, use_bias=False, rngs=rngs), nn.LI((5,), rngs=rngs),
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_spiking_network(mode):
    model = spiking()
    for k in (0, 2):
        peak(model.layers[k], ["kernel"], 0)
    x = (noise(9, 3, 6) > 0).astype(jnp.float32)
    state = model.initial_state(3)
    quantized = quant.quantize(model, x[0], state, rules=quant.spiking_feedforward_rules(), mode=mode)
    reference = spiking()
    for k in (0, 2):
        kernel = rounded(model.layers[k].kernel[...], 8, 0)
        reference.layers[k].kernel.set_value(jnp.asarray(kernel, jnp.float32))
    run = nnx.jit(lambda m, x: nn.run(m, x)[0])
    y = run(quantized, x)
    np.testing.assert_allclose(y, run(reference, x), atol=1e-5)
    assert largest(y, run(model, x)) > 1e-4
    if mode == "qat":
        gradients = nnx.jit(nnx.grad(lambda m: jnp.sum(nn.run(m, x)[0] ** 2)))(quantized)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        assert np.abs(gradients["layers"][0]["kernel"][...]).max() > 0


def test_training_moves_the_float_weights():
    model, x = published(), noise(8, 2, 4)
    rules = quant.linear_only_rules("int4") + quant.projection_rules()
    quantized = quant.quantize(model, x, rules=rules)
    before = quantized.middle.B_re.get_raw_value()
    np.testing.assert_array_equal(before, model.middle.B_re[...])
    optimizer = nnx.Optimizer(quantized, optax.sgd(1e-5), wrt=nnx.Param)
    gradients = gradient(quantized, x)
    optimizer.update(quantized, gradients)
    after = before - 1e-5 * gradients["middle"]["B_re"].get_raw_value()
    np.testing.assert_allclose(quantized.middle.B_re.get_raw_value(), after, rtol=1e-6)
    assert largest(after, before) > 0

    optimizer = nnx.Optimizer(quantized, optax.adam(1e-2), wrt=nnx.Param)
    target = noise(8, 2, 3, seed=3)

    @nnx.jit
    def train_step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(train_step(quantized, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    stored = quant.quantize(quantized, x, rules=rules, mode="ptq")
    np.testing.assert_allclose(call(stored, x), call(quantized, x), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [ssm.LRU, full(ssm.S5Diag)])
def test_projections(cls, mode):
    names = ["B_re", "B_im", "C_re", "C_im"]
    layer, u = peak(cls(6, 4, rngs=nnx.Rngs(2)), names, 1), noise(7, 2, 6)
    quantized = quant.quantize(layer, u, rules=quant.projection_rules("int4"), mode=mode)
    expected = cls(6, 4, rngs=nnx.Rngs(2))
    for name in names:
        getattr(expected, name).set_value(jnp.asarray(rounded(getattr(layer, name)[...], 4, 1), jnp.float32))
        np.testing.assert_allclose(getattr(quantized, name)[...], getattr(expected, name)[...], atol=1e-6)
    np.testing.assert_allclose(call(quantized, u), call(expected, u), atol=1e-5)
    assert largest(call(quantized, u), call(layer, u)) > 1e-3
    y, _ = quantized.step(u[0], quantized.initial_state(2))
    np.testing.assert_allclose(y, call(quantized, u)[0], atol=1e-5)
    graphdef, values = nnx.split(nnx.clone(quantized))
    np.testing.assert_allclose(
        jax.jit(lambda v, u: nnx.merge(graphdef, v)(u))(values, u), call(quantized, u), atol=1e-5
    )
    if mode == "qat":
        gradients, exact = (gradient(m, u) for m in (quantized, expected))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            jax.tree.leaves(gradients), jax.tree.leaves(exact),
        )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("qtype", "tile", "bound"), [("nvfp4", 16, 0.6), full("mxfp4", 32, 0.9), full("mxfp8", 32, 0.2)]
)
def test_microscaled_formats(mode, qtype, tile, bound):
    layer, x = nnx.Linear(64, 3, rngs=nnx.Rngs(1)), noise(5, 64)
    for rules in (quant.weights_only_rules(qtype), quant.linear_only_rules(qtype, qtype)):
        assert rules[0].tile_size == tile
        assert 1e-3 < largest(quant.quantize(layer, x, rules=rules, mode=mode)(x), call(layer, x)) < bound


@pytest.mark.parametrize("mode", [full("qat"), "ptq"])
def test_tiles_that_do_not_fit(mode):
    rules = quant.weights_only_rules("mxfp4")
    with pytest.raises(
        ValueError, match=r"'' \(Linear\): 'mxfp4' shares a scale among 32 inputs, and 4 \(in_features\)"
    ):
        quant.quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(1)), noise(2, 4), rules=rules, mode=mode)
    with pytest.raises(ValueError, match=r"'' \(Conv\): a convolution has no tiles"):
        quant.quantize(nnx.Conv(32, 3, (3,), rngs=nnx.Rngs(1)), noise(1, 5, 32), rules=rules, mode=mode)
    lru, u = ssm.LRU(32, 16, rngs=nnx.Rngs(1)), noise(3, 1, 32)
    with pytest.raises(ValueError, match=r"'' \(LRU\).* and 16 \(C\)"):
        quant.quantize(lru, u, rules=quant.projection_rules("mxfp4"), mode=mode)
    quantized = quant.quantize(lru, u, rules=quant.projection_rules("nvfp4"), mode=mode)
    assert 0 < largest(call(quantized, u), call(lru, u)) < 1


def test_formats_and_names_are_checked():
    for build in (quant.linear_only_rules, quant.weights_only_rules, quant.spiking_feedforward_rules):
        for qtype in ("int9", "fp8", "float32", "bool", None, 3):
            with pytest.raises(ValueError, match="weight_qtype must be one of"):
                build(qtype)
    with pytest.raises(ValueError, match="act_qtype must be one of"):
        quant.bitnet_ternary_rules(act_qtype="int16")
    with pytest.raises(ValueError, match=r"need tiles of \[16\], got tile_size=32"):
        quant.weights_only_rules("nvfp4", tile_size=32)
    with pytest.raises(ValueError, match="equal tiles"):
        quant.linear_only_rules("nvfp4", "mxfp8")
    with pytest.raises(ValueError, match=r"op names must be some of .* got .*'conv'"):
        quant.linear_only_rules(extra_op_names=("conv",))
    with pytest.raises(ValueError, match="op names"):
        quant.weights_only_rules(op_names=())
    assert quant.linear_only_rules("float8_e4m3fn")[0].weight_qtype == "float8_e4m3fn"
    assert quant.bitnet_ternary_rules(None)[0].act_qtype is None
    assert quant.linear_only_rules(tile_size=8)[0].tile_size == 8


def test_rules_that_match_nothing_say_what_could():
    lru, u = ssm.LRU(4, 3, rngs=nnx.Rngs(0)), noise(5, 2, 4)
    with pytest.raises(ValueError, match=r"LRU: rules matched by no layer.*'' \(LRU\) by 'ssm_projection'"):
        quant.quantize(lru, u)
    model, x = published(), noise(8, 2, 4)
    with pytest.raises(ValueError, match=r"module_path='enc'.*'encoder' \(Linear\) by 'dot_general', 'head'"):
        quant.quantize(model, x, rules=quant.weights_only_rules(module_path="enc"))
    with pytest.raises(ValueError, match=r"module_path='middle'"):
        quant.quantize(model, x, rules=[*quant.linear_only_rules(), qwix.QuantizationRule(module_path="middle")])
    with pytest.raises(ValueError, match="without a weight_qtype"):
        quant.quantize(model, x, rules=[qwix.QuantizationRule()])
    with pytest.raises(ValueError, match="without a weight_qtype"):
        quant.quantize(model, x, rules=[])
    with pytest.raises(ValueError, match="only the weights of a projection"):
        quant.quantize(model, x, rules=quant.linear_only_rules(extra_op_names=("ssm_projection",)))


def test_first_rule_counts():
    model, x = published(), noise(8, 2, 4)
    rules = [qwix.QuantizationRule(module_path="head"), *quant.linear_only_rules("int4", None)]
    quantized = quant.quantize(model, x, rules=rules)
    assert not hasattr(quantized.head, "quantization")
    assert quantized.encoder.quantization == ("qat", "int4", None)
    everything = [qwix.QuantizationRule(weight_qtype="int8")]
    assert not hasattr(quant.quantize(model, x, rules=everything).middle, "quantization")


def test_quantise_again():
    model, x = published(), noise(8, 2, 4)
    ternary = quant.quantize(model, x, rules=quant.bitnet_ternary_rules() + quant.projection_rules())
    again = quant.quantize(ternary, x)
    np.testing.assert_array_equal(call(again, x), quant.quantize(model, x)(x))
    block, u = ssm.MambaBlock(4, 3, rngs=nnx.Rngs(1)), noise(5, 2, 4)
    only_in = quant.weights_only_rules(module_path="in_proj")
    again = quant.quantize(quant.quantize(block, u), u, rules=only_in)
    np.testing.assert_array_equal(call(again, u), quant.quantize(block, u, rules=only_in)(u))
    stored = quant.quantize(model, x, mode="ptq")
    with pytest.raises(ValueError, match=r"'encoder' \(Linear\) already holds int8 weights"):
        quant.quantize(stored, x)


@pytest.mark.parametrize("mode", ["qat", full("ptq")])
@pytest.mark.parametrize("shape", [(4, 4), (4,), (2, 8), (3, 2, 4)])
def test_inputs_that_look_like_weights(mode, shape):
    layer, x = peak(nnx.Linear(4, 4, rngs=nnx.Rngs(1)), ["kernel"], 0), jnp.abs(noise(*shape))
    quantized = quant.quantize(layer, noise(2, 4), mode=mode)

    def run(m, x):
        return m(x.reshape(-1, 4) if x.shape == (2, 8) else x)

    flat = np.asarray(x).reshape(*(x.shape if x.shape[-1] == 4 else (4, 4)))
    expected = rounded(flat, 8, -1) @ rounded(layer.kernel[...], 8, 0) + np.asarray(layer.bias[...])
    for call in (run, jax.jit(run)):
        np.testing.assert_allclose(call(quantized, x), expected, atol=2e-5)
    if mode == "qat":
        gradients = nnx.jit(nnx.grad(lambda m, x: jnp.sum(run(m, x))))(quantized, x)
        assert np.isfinite(gradients["kernel"][...]).all()


class OwnCall(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs) + inputs @ self.kernel[...]


def test_kinds_of_layers():
    x = noise(2, 5, 8)
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    quantized = quant.quantize(attention, x)
    assert 0 < largest(call(quantized, x), call(attention, x)) < 0.05
    done = {path[0] for path, m in nnx.iter_modules(quantized) if hasattr(m, "quantization")}
    assert done == {"query", "key", "value", "out"}
    einsum = peak(nnx.Einsum("bti,ij->btj", (8, 3), rngs=nnx.Rngs(0)), ["kernel"], 0)
    with pytest.raises(ValueError, match=r"\(Einsum\) by 'einsum'"):
        quant.quantize(einsum, x)
    for mode in MODES:
        quantized = quant.quantize(einsum, x, rules=quant.weights_only_rules(op_names=("einsum",)), mode=mode)
        expected = np.asarray(x) @ rounded(einsum.kernel[...], 8, 0)
        np.testing.assert_allclose(call(quantized, x), expected, atol=2e-5)
    with pytest.raises(ValueError, match="Layers that rules can match: none"):
        quant.quantize(OwnCall(8, 8, rngs=nnx.Rngs(0)), x)


@pytest.mark.filterwarnings("ignore:'.value' setter is now deprecated:DeprecationWarning")
def test_static_scales_of_inputs():
    layer, x = nnx.Linear(4, 3, rngs=nnx.Rngs(1)), noise(6, 4)
    x = x / jnp.abs(x).max(-1, keepdims=True)
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    quantized = quant.quantize(layer, x, rules=[rule])
    assert nnx.state(quantized, qwix.QuantStat)
    assert largest(call(quantized, x), call(layer, x)) < 0.1
    assert largest(quant.quantize(quantized, x, rules=[rule], mode="ptq")(x), call(layer, x)) < 0.1
    conv = nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"act_static_scale.*not supported for a convolution in 'qat'"):
        quant.quantize(conv, noise(1, 5, 4), rules=[rule])


def test_arguments_are_checked():
    model, x = published(), noise(8, 2, 4)
    with pytest.raises(ValueError, match="mode must be 'qat' or 'ptq', got 'int8'"):
        quant.quantize(model, x, mode="int8")
    with pytest.raises(ValueError, match="methods must name at least one"):
        quant.quantize(model, x, methods=())
    block, u = ssm.MambaBlock(4, 3, rngs=nnx.Rngs(1)), noise(2, 4)
    stepped = quant.quantize(block, u, block.initial_state(2), methods=("step",))
    np.testing.assert_array_equal(stepped(u[None])[0], quant.quantize(block, u[None])(u[None])[0])


def test_report():
    model, x = published(), noise(8, 2, 4)
    rules = quant.linear_only_rules("int4", "int8")
    stored = quant.report(model, quant.quantize(model, x, rules=rules, mode="ptq"))
    rows = {row.path: row for row in stored.rows}
    assert rows["encoder"] == ("encoder", "Linear", "int4", "int8", 32, 4, 4 * 64, 64 // 2 + 4 * 16)
    assert rows["head"] == ("head", "Linear", "int4", "int8", 32, 4, 4 * 48, 48 // 2 + 4 * 3)
    count = 2 * 8 + 4 * 8 * 16 + 16
    assert rows["middle"] == ("middle", "LRU", "float32", None, 32, 32, 4 * count, 4 * count)
    assert stored.bytes_before == 4 * (64 + 48 + count)
    assert stored.bytes_after == 32 + 64 + 24 + 12 + 4 * count
    training = quant.report(model, quant.quantize(model, x, rules=rules))
    assert training.bytes_after == training.bytes_before == stored.bytes_before
    lines = str(stored).splitlines()
    assert lines[0].split() == ["path", "layer", "weight", "act", "bits", "bytes"]
    assert lines[1].split() == ["encoder", "Linear", "int4", "int8", "32", "->", "4", "256", "->", "96"]
    assert lines[-1].split() == ["total", str(stored.bytes_before), "->", str(stored.bytes_after)]
    projected = quant.report(model, quant.quantize(model, x, rules=quant.projection_rules(), mode="ptq"))
    row = next(row for row in projected.rows if row.path == "middle")
    assert (row.weight, row.bits_after) == ("int8", 8)
    assert row.bytes_after == 4 * 8 * 16 + 4 * (2 * 8 + 2 * 16) + 4 * (2 * 8 + 16)
    with pytest.raises(ValueError, match="in one only"):
        quant.report(model, ssm.LRU(16, 8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("qtype", ["int8", "int4", "int2"])
def test_spikes_are_exact(qtype):
    spikes = np.random.default_rng(0).integers(0, 2, (7, 3, 5))
    assert quant.binary_activation_error(spikes, weight_qtype=qtype) == 0.0
    assert quant.binary_activation_error(np.zeros((2, 3)), weight_qtype=qtype) == 0.0
    assert quant.binary_activation_error(np.zeros((0, 3)), weight_qtype=qtype) == 0.0
    graded = np.random.default_rng(0).uniform(0, 1, 100)
    step = graded.max() / (2 ** (int(qtype[3:]) - 1) - 1)
    assert 0.4 * step < quant.binary_activation_error(graded, weight_qtype=qtype) <= 0.5 * step + 1e-6
    for wrong in ("int1", "float8", "int"):
        with pytest.raises(ValueError, match="weight_qtype must be"):
            quant.binary_activation_error(spikes, weight_qtype=wrong)


def test_without_qwix(monkeypatch):
    assert quant.available()
    model, x = published(), noise(8, 2, 4)
    monkeypatch.setitem(sys.modules, "qwix", None)
    assert not quant.available()
    builders = (
        quant.linear_only_rules, quant.weights_only_rules, quant.spiking_feedforward_rules,
        quant.bitnet_ternary_rules, quant.projection_rules, lambda: quant.quantize(model, x, rules=[]),
    )  # fmt: skip
    for build in builders:
        with pytest.raises(ImportError, match=r"pip install 'spyx-torch\[quant\]'"):
            build()
    assert quant.binary_activation_error(np.ones(3)) == 0.0


def test_importing_needs_no_qwix():
    code = "import sys; sys.modules['qwix'] = None; import spyx.quant; assert not spyx.quant.available()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    code = "import sys, spyx.quant; assert spyx.quant.available() and 'qwix' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
