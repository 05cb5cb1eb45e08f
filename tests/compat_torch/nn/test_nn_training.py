"""What people do around a torch module when they train it."""

import copy
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from oracles import torch_models
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from compat_torch import optim
from compat_torch.nn.architectures.classifier import Classifier
from compat_torch.nn.lti import LRU, S4D, CentaurusNeck
from compat_torch.nn.ltv import Mamba


class Residual(torch.nn.Module):
    """A program of torch with one layer of ours inside."""

    def __init__(self, layer):
        super().__init__()
        self.enter, self.layer, self.leave = torch.nn.Linear(2, 3), layer, torch.nn.Linear(3, 1)

    def forward(self, x):
        h = self.enter(x)
        return self.leave(h + torch.relu_(self.layer(h)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Residual(LRU(3, 4))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    x = torch.randn(4, 7, 2)
    return x, x.cumsum(1)[..., :1].tanh()


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_autocast(model, batch):
    layer, x = Mamba(3, d_state=2, d_conv=2), torch.randn(2, 5, 3)
    with torch.no_grad():
        y, cache = layer(x), layer.allocate_inference_cache(2)
        with torch.autocast("cpu", torch.bfloat16):
            low, _ = layer(x, inference_cache=cache)
    assert low.dtype == torch.bfloat16
    assert cache["lrnn_state"].dtype == torch.float32
    torch.testing.assert_close(low.float(), y, atol=2e-2, rtol=5e-2)
    loss_of(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    for name, found in gradients(model).items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[name], atol=2e-2, rtol=0)


def test_gradient_accumulation_and_clipping(model, batch):
    loss_of(model, batch).backward()
    whole = gradients(model)
    model.zero_grad()
    for half in range(2):
        (loss_of(model, tuple(part[2 * half : 2 * half + 2] for part in batch)) / 2).backward()
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, whole[name], atol=1e-6, rtol=1e-4)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([g.square().sum() for g in gradients(model).values()]).sum().sqrt()
    torch.testing.assert_close(total, 1e-3 * norm / (norm + 1e-6), rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_checkpoint_recomputes_instead_of_keeping(model, batch):
    layer, x = S4D(3, d_state=4, dropout=0.5, transposed=False), torch.randn(2, 5, 3)

    def run(recompute):
        torch.manual_seed(2)
        layer.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if recompute else layer(x)[0]
        y.square().sum().backward()
        return len(kept), y.detach(), gradients(layer)

    many, y, expected = run(recompute=False)
    few, again, found = run(recompute=True)
    assert few < many
    assert torch.equal(again, y)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_average_of_weights_by_deepcopy(model, batch):
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.5)
    assert not torch.equal(average.layer.D, model.layer.D)
    assert not torch.equal(average.layer.D, start["layer.D"])
    swa = torch.optim.swa_utils.AveragedModel(model)
    swa.update_parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(swa(batch[0]), model(batch[0]))


def test_adam_with_two_parameter_groups(batch):
    """The reference's recipe: parameters with `_optim` have a group of their own."""
    torch.manual_seed(0)
    model = Residual(_Output(S4D(3, d_state=4, lr=0.01, transposed=False)))
    special = [p for p in model.parameters() if hasattr(p, "_optim")]
    others = [p for p in model.parameters() if not hasattr(p, "_optim")]
    assert special
    assert others
    groups = [{"params": others}, *({"params": [p], **p._optim} for p in special)]
    optimizer = torch.optim.AdamW(groups, lr=0.03)
    first = loss_of(model, batch).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)


class _Output(torch.nn.Module):
    """S4D without its state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile_breaks_the_graph_and_agrees(model, batch):
    """torch itself looks at `.grad` of what goes into the second graph, and hides the warning unless it is an error."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    loss_of(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    loss = loss_of(compiled, batch)
    loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name])
    assert torch._dynamo.explain(model)(batch[0]).graph_break_count >= 1


def test_data_loader_with_workers(model, batch):
    """forkserver: workers that are forked from a process with JAX's threads are unsafe, and JAX warns."""
    loader = DataLoader(TensorDataset(*batch), batch_size=2, num_workers=2, multiprocessing_context="forkserver")
    losses = [loss_of(model, part).item() for part in loader]
    assert len(losses) == 2


_DDP = """
import sys, torch, torch.distributed as dist
from compat_torch.nn.lti import CentaurusNeck
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(CentaurusNeck(2, 3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(7)
x = torch.randn(4, 5, 2)
for _ in range(2):
    optimizer.zero_grad()
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimizer.step()
torch.save(model.module.state_dict(), out)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """Both end with the same weights, those of one process that sees the whole batch."""
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    commands = [[sys.executable, "-c", _DDP, str(rank), str(tmp_path / "store"), str(files[rank])] for rank in range(2)]
    running = [
        subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
        for command in commands
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (torch.load(file) for file in files)
    torch.manual_seed(0)
    model = CentaurusNeck(2, 3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    x = torch.randn(4, 5, 2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-4)


STEPS = 50


def _train_torch(forward, parameters, x, labels):
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def test_fifty_steps_follow_the_reference():
    """The definition in torch, our torch module, and the JAX class under optax: one curve."""
    torch.manual_seed(0)
    ours = Classifier(2, 3, d_model=4, d_state=4, n_layers=1, lrnn_cls=LRU, dropout=0.0, pooling="mean")
    theirs = torch_models.Classifier(2, 3, 4, 4, 1)
    theirs.load_state_dict(ours.state_dict())
    module = ours.to_jax()
    x, labels = torch.randn(6, 7, 2), torch.randint(3, (6,))
    lengths = [7] * 6
    by_definition = partial(theirs, lengths=lengths, pooling="mean", windows=[("none", 1)], reference="lrnnx")
    expected = _train_torch(by_definition, theirs.parameters(), x, labels)
    found = _train_torch(ours, ours.parameters(), x, labels)
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    optimizer = nnx.Optimizer(module, optim.grouped(optax.adamw, module, 0.01), wrt=nnx.Param)
    inputs, targets = jnp.asarray(x.numpy()), jnp.asarray(labels.numpy())

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(inputs), targets).mean()

        value, gradient = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradient)
        return value

    in_jax = np.array([float(step(module, optimizer)) for _ in range(STEPS)])
    np.testing.assert_allclose(in_jax, expected, rtol=1e-4)
    assert jax.tree.all(jax.tree.map(lambda value: bool(jnp.isfinite(value).all()), nnx.state(module, nnx.Param)))
