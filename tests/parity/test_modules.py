"""`parity.compare_modules` on modules that are alike, and on ones that are not quite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles.transformers_models import reference

import compat_torch
from compat_torch.nn import ltv
from parity import assert_identical, compare_modules


class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 4)
        self.layer = layer

    def forward(self, x, scale=None):
        x = torch.tanh(self.encoder(x))
        y = self.layer(x)
        return y if scale is None else y * scale[..., None]


class Cell(torch.nn.Module):
    """h_t = tanh(W x_t + a h_{t-1}), in PyTorch."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.decay = torch.nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        h, ys = torch.zeros(x.shape[0], 4, dtype=x.dtype), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.decay * h)
            ys.append(h)
        return torch.stack(ys, 1)


class JaxCell(nnx.Module):
    """The same in JAX, under other names."""

    def __init__(self, cell: Cell):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.linear.kernel.set_value(jnp.asarray(cell.inner.weight.detach().numpy().T))
        self.linear.bias.set_value(jnp.asarray(cell.inner.bias.detach().numpy()))
        self.rate = nnx.Param(jnp.asarray(cell.decay.detach().numpy()))

    def __call__(self, x):
        def step(h, u):
            h = jnp.tanh(u + self.rate[...] * h)
            return h, h

        u = jnp.swapaxes(self.linear(x), 0, 1)
        return jnp.swapaxes(jax.lax.scan(step, jnp.zeros(u.shape[1:]), u)[1], 0, 1)


RENAME = [("^inner", "linear"), ("^decay$", "rate")]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_live_model_of_transformers():
    sizes = {"hidden_size": 8, "state_size": 3, "vocab_size": 19, "num_hidden_layers": 2, "time_step_rank": 2}
    theirs = reference("Mamba", **sizes)
    ids = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, 7))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    theirs.train()
    row = assert_identical(theirs, ids)
    assert (row.case, row.subject) == ("MambaForCausalLM", "compat_torch.MambaLMHeadModel")
    assert row.gradient > 0
    assert row.relative <= 2
    assert theirs.training
    assert all(value.grad is None for value in theirs.parameters())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_module_that_somebody_wrote():
    theirs = Cell()
    ours = JaxCell(theirs)
    row = assert_identical(theirs, noise(2, 5, 4), ours, rename=RENAME)
    assert row.subject == "tests.JaxCell"
    assert row.gradient > 0


def test_weights_that_differ_are_named():
    theirs = Cell()
    ours = JaxCell(theirs)
    ours.rate.set_value(ours.rate[...] * 1.001)
    row = compare_modules(theirs, noise(2, 5, 4), ours, rename=RENAME)
    assert row.verdict == "differs"
    assert "forward" in row.note
    with pytest.raises(AssertionError, match=r"Cell and tests.JaxCell differ: .*forward"):
        assert_identical(theirs, noise(2, 5, 4), ours, rename=RENAME)


def test_gradients_that_differ_are_named():
    class Stopped(JaxCell):
        def __call__(self, x):
            return super().__call__(x) + 0 * self.rate[...] + jax.lax.stop_gradient(x) - x

    theirs = Cell()
    row = compare_modules(theirs, noise(2, 5, 4), Stopped(theirs), rename=RENAME)
    assert row.note.startswith("grad.x: gradient")
    frozen = Cell()
    frozen.decay.requires_grad_(False)
    row = compare_modules(frozen, noise(2, 5, 4), JaxCell(frozen), rename=RENAME)
    assert row.note == "ours has a gradient for 'rate', theirs trains no such parameter"


class Detached(Cell):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("turned", [False, True])
def test_an_input_that_only_one_of_them_reaches(turned):
    theirs = Cell()
    ours = Detached()
    ours.load_state_dict(theirs.state_dict())
    pair = (ours, theirs) if turned else (theirs, ours)
    row = compare_modules(pair[0], noise(2, 5, 4), pair[1])
    assert row.verdict == "differs"
    assert row.note.startswith("grad.x: gradient")


def test_names_that_do_not_fit_are_told():
    theirs = Cell()
    row = compare_modules(theirs, noise(1, 3, 4), JaxCell(theirs), rename=[*RENAME[1:], ("^inner", "lnear")])
    assert "ours has no parameter 'lnear.weight', but 'linear.weight'" in row.note
    assert "ours has a gradient for 'linear.weight'" in row.note


def test_a_torch_program_with_our_layers_inside():
    """One import changed: the parameters have the same names, further inputs pass through, and so do tied weights."""
    layer = ltv.Mamba(4, 2)
    theirs = Net(layer)
    ours = Net(compat_torch.to_torch(compat_torch.from_torch(layer)))
    ours.encoder = theirs.encoder
    row = assert_identical(theirs, noise(2, 6, 3), ours, inputs={"scale": np.ones((2, 6), np.float32)})
    assert row.gradient < 1e-6
    assert row.relative is not None


def test_steps():
    def steps(model):
        cache, ys = model.allocate_inference_cache(2), []
        for t in range(5):
            y, cache = model.step(x[:, t : t + 1], cache)
            ys.append(y)
        return torch.cat(ys, 1)

    layer, x = ltv.S7(4, 2), noise(2, 5, 4)
    row = assert_identical(layer, x, compat_torch.from_torch(layer), steps=steps)
    assert row.step < 1e-6


def test_what_does_not_run_in_float64_is_compared_in_float32():
    class Narrow(Cell):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("no such kernel")
            return super().forward(x)

    theirs = Narrow()
    row = assert_identical(theirs, noise(2, 5, 4), JaxCell(theirs), rename=RENAME)
    assert "judged without float64, in which the torch module does not run (RuntimeError: no such kernel)" in row.note
    ours = JaxCell(theirs)
    ours.rate.set_value(ours.rate[...] * 1.001)
    assert compare_modules(theirs, noise(2, 5, 4), ours, rename=RENAME).verdict == "differs"


def test_wrong_arguments():
    theirs, x = Cell(), noise(2, 5, 4)
    ours = JaxCell(theirs)
    with pytest.raises(
        TypeError, match=r"theirs must be a torch\.nn\.Module, got JaxCell; the JAX module goes to ours"
    ):
        compare_modules(ours, x, theirs)
    with pytest.raises(TypeError, match=r"ours must be an nnx.Module or a torch.nn.Module, got int"):
        compare_modules(theirs, x, 3)
    with pytest.raises(TypeError, match=r"from_torch does not know"):
        compare_modules(theirs, x)
    with pytest.raises(ValueError, match=r"x must be float32 or complex64 for this comparison, got torch.float64"):
        compare_modules(theirs, x.double(), ours)
    with pytest.raises(ValueError, match=r"decay of theirs must be float32 or complex64"):
        compare_modules(Cell().bfloat16(), x, ours)
    with pytest.raises(ValueError, match=r"theirs gives shape \(2, 5, 4\), ours \(4,\); output= picks one of several"):
        compare_modules(theirs, x, ours, rename=RENAME, output=lambda y: y if y.grad_fn is None else y[0, 0])
