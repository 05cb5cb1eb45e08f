import jax
import numpy as np
from flax import nnx

from compat_torch.models.ltv import Mamba
from compat_torch.random import OneKey, alike


def test_layers_of_one_kind_are_drawn_one_by_one():
    rngs = nnx.Rngs(0)
    first, second = alike(2, lambda: Mamba(8, 4, rngs=rngs), rngs)
    assert np.abs(first.in_proj.kernel[...] - second.in_proj.kernel[...]).max() > 0.01


def test_shapes_of_layers_of_one_kind_are_found_once():
    """Copies share no variable, and keep what is attached to each."""
    made = []

    def model(rngs):
        return nnx.List(alike(3, lambda: made.append(Mamba(8, 4, rngs=rngs)) or made[-1], rngs))

    layers = nnx.eval_shape(lambda: model(OneKey(jax.random.key(0))))
    assert len(made) == 1
    variables = [jax.tree.leaves(nnx.state(layer), is_leaf=lambda v: isinstance(v, nnx.Variable)) for layer in layers]
    assert len({id(v) for row in variables for v in row}) == 3 * len(variables[0]) > 0
    expected = nnx.state(nnx.eval_shape(lambda: Mamba(8, 4, rngs=nnx.Rngs(0))))
    for layer in layers:
        jax.tree.map(
            lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), nnx.state(layer), expected
        )
        assert layer.A_log.get_metadata()["no_weight_decay"]
        assert layer.dt_proj.bias.get_metadata()["no_reinit"]
    layers[0].D.set_value(np.ones(16))
    assert isinstance(layers[1].D.get_value(), jax.ShapeDtypeStruct)
