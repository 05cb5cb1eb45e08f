"""spyx.quant in use: inputs without rows, calls by keyword, saving, abstract and stacked models, wrong arguments."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx

from spyx import quant, ssm

MODES = ["qat", "ptq"]


class Kinds(nnx.Module):
    """One layer of each kind; the first two are called with keywords."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.dense = nnx.Linear(6, 5, rngs=rngs)
        self.einsum = nnx.Einsum("bti,ij->btj", (5, 4), rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), padding="CAUSAL", rngs=rngs)

    def __call__(self, x):
        return self.conv(self.einsum(self.dense(inputs=x), einsum_str="bti,ij->btj"))


def noise(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape)


RULES = {
    "int8": lambda: quant.linear_only_rules(extra_op_names=("einsum",)),
    "int4": lambda: quant.linear_only_rules("int4", extra_op_names=("einsum",)),
    "weights": lambda: quant.spiking_feedforward_rules(extra_op_names=("einsum",)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "rules", [pytest.param(name, marks=[pytest.mark.full] * (name == "weights")) for name in RULES]
)
def test_inputs_without_rows(rules, mode):
    model, x = Kinds(), noise(2, 5, 6)
    quantized = quant.quantize(model, x, rules=RULES[rules](), mode=mode)
    for empty in (x[:0], x[:, :0]):
        y = quantized(empty)
        assert (y.shape, y.dtype) == ((*empty.shape[:2], 4), jnp.float32)
        assert nnx.jit(lambda m, x: m(x))(quantized, empty).shape == y.shape
    if mode == "qat":
        gradients = nnx.grad(lambda m: jnp.sum(m(x[:0])))(quantized)
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))
    traced_on_nothing = quant.quantize(model, x[:, :0], rules=RULES[rules](), mode=mode)
    np.testing.assert_array_equal(traced_on_nothing(x), quantized(x))
    assert all(row.weight != "float32" for row in quant.report(model, traced_on_nothing).rows)


@pytest.mark.parametrize("mode", [pytest.param("qat", marks=pytest.mark.full), "ptq"])
def test_streams_without_steps(mode):
    block, u = ssm.MambaBlock(3, 2, rngs=nnx.Rngs(1)), noise(5, 2, 3)
    quantized = quant.quantize(block, u, mode=mode)
    y, state = quantized(u[:0], return_state=True)
    assert y.shape == (0, 2, 3)
    fresh = quantized.initial_state(2)
    jax.tree.map(np.testing.assert_array_equal, state, fresh)


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_put_back(mode, tmp_path):
    x = noise(2, 5, 6)
    rules = [*RULES["int8"](), *quant.projection_rules()]

    def made(seed):
        class Model(nnx.Module):
            def __init__(self):
                self.kinds, self.lru = Kinds(seed), ssm.LRU(4, 3, rngs=nnx.Rngs(seed))

            def __call__(self, x):
                return self.lru(self.kinds(x))

        return quant.quantize(Model(), x, rules=rules, mode=mode)

    quantized, abstract = made(0), nnx.eval_shape(lambda: made(1))
    y = quantized(x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", nnx.state(quantized))
        checkpointer.wait_until_finished()
        nnx.update(abstract, checkpointer.restore(tmp_path / "saved", nnx.state(abstract)))
    np.testing.assert_array_equal(abstract(x), y)
    if mode == "ptq":
        assert abstract.kinds.dense.kernel.array.qvalue.dtype == jnp.int8
    np.testing.assert_array_equal(copy.deepcopy(quantized)(x), y)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(quantized))(x), y)


def test_a_model_without_weights():
    abstract, x = nnx.eval_shape(Kinds), noise(2, 5, 6)
    with pytest.raises(ValueError, match=r"'conv' \(Conv\) has shapes but no weights .* nnx.eval_shape"):
        quant.quantize(abstract, x, mode="ptq")
    quantized, loaded = quant.quantize(abstract, x), quant.quantize(Kinds(), x)
    nnx.update(quantized, nnx.state(loaded))
    np.testing.assert_array_equal(quantized(x), loaded(x))


class Stacked(nnx.Module):
    def __init__(self):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers():
    model, x = Stacked(), noise(2, 4)
    quantized = quant.quantize(model, x, rules=quant.weights_only_rules())
    kernel = model.layers.kernel[...]
    scale = jnp.abs(kernel).max(1, keepdims=True) / 127.5
    expected = x
    for k, bias in zip(jnp.clip(jnp.round(kernel / scale), -128, 127) * scale, model.layers.bias[...], strict=True):
        expected = expected @ k + bias
    np.testing.assert_allclose(quantized(x), expected, atol=2e-5)
    with pytest.raises(ValueError, match=r"'layers' \(Linear\) holds weights \(3, 4, 4\) and is called with \(4, 4\)"):
        quant.quantize(model, x, mode="ptq")


def test_wrong_kinds_of_arguments():
    layer, x, rules = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), noise(3, 6), quant.linear_only_rules()
    for wrong in ("int8", rules[0], [1], [*rules, "int8"], 7):
        with pytest.raises(TypeError, match=r"rules must be a list of qwix\.QuantizationRule"):
            quant.quantize(layer, x, rules=wrong)
    with pytest.raises(TypeError, match=r"rules are given by name, rules="):
        quant.quantize(layer, x, rules)
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module, got function"):
        quant.quantize(lambda x: x, x)
    with pytest.raises(TypeError, match=r"methods must be a sequence of names, got '__call__'"):
        quant.quantize(layer, x, methods="__call__")
    with pytest.raises(ValueError, match="Linear has no method 'step'"):
        quant.quantize(layer, x, methods=("step",))
    with pytest.raises(TypeError, match=r"qmodel must be an nnx\.Module, got list"):
        quant.report(layer, [])
    with pytest.raises(ValueError, match=r"weight_qtype must be 'int2', .* got 8"):
        quant.binary_activation_error(x, weight_qtype=8)


@pytest.mark.parametrize("wrong", [0, -1, True, 0.0, 1.5, float("nan"), "8"])
def test_tile_sizes(wrong):
    with pytest.raises(ValueError, match="tile_size must be a number of inputs"):
        quant.weights_only_rules(tile_size=wrong)
    rule = qwix.QuantizationRule(weight_qtype="int8", tile_size=wrong)
    with pytest.raises(ValueError, match="tile_size must be a number of inputs"):
        quant.quantize(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), noise(3, 6), rules=[rule], mode="ptq")


@pytest.mark.parametrize("mode", MODES)
def test_tiles_by_their_number(mode):
    x = noise(3, 6)
    halves = quant.weights_only_rules(tile_size=0.5)
    threes = quant.weights_only_rules(tile_size=3)
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    y = [quant.quantize(layer, x, rules=rules, mode=mode)(x) for rules in (halves, threes)]
    np.testing.assert_array_equal(*y)
    for width, found in ((7, 4), (1, 0)):
        with pytest.raises(ValueError, match=rf"among {found} inputs, and {width} \(in_features\).* leave it out by"):
            quant.quantize(nnx.Linear(width, 5, rngs=nnx.Rngs(0)), noise(3, width), rules=halves, mode=mode)


def test_types_that_cannot_hold_weights():
    layer, x = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), noise(3, 6)
    for qtype in ("int1", "float8_e8m0fnu", "float6_e2m3fn", "uint8", "int16"):
        with pytest.raises(ValueError, match="weight_qtype must be one of"):
            quant.weights_only_rules(qtype)
        with pytest.raises(ValueError, match="weight_qtype must be one of"):
            quant.quantize(layer, x, rules=[qwix.QuantizationRule(weight_qtype=qtype)])
    with pytest.raises(ValueError, match="act_qtype must be one of"):
        quant.quantize(layer, x, rules=[qwix.QuantizationRule(weight_qtype="int8", act_qtype="float8_e8m0fnu")])


def test_paths_and_names():
    with pytest.raises(ValueError, match=r"module_path='\(' is no regular expression: missing \)"):
        quant.weights_only_rules(module_path="(")
    with pytest.raises(TypeError, match="module_path must be a regular expression, got None"):
        quant.projection_rules(module_path=None)
    for build in (
        lambda: quant.weights_only_rules(op_names="dot_general"),
        lambda: quant.linear_only_rules(extra_op_names="einsum"),
        lambda: quant.spiking_feedforward_rules(extra_op_names="einsum"),
    ):
        with pytest.raises(TypeError, match="op names must be a sequence of names, got '"):
            build()
