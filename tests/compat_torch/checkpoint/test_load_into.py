"""`load_into`: a user's own module around our layers and Flax's, against the same module in PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file

import compat_torch
from compat_torch.checkpoint import LoadReport, load_into
from compat_torch.errors import CheckpointError, StateDictMismatchError
from compat_torch.models.lti import LRU

W = 4


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, W)
        self.conv = torch.nn.Conv1d(W, 6, 3)
        self.image = torch.nn.Conv2d(2, 3, (2, 5), bias=False)
        self.depthwise = torch.nn.Conv1d(W, W, 2, groups=W)
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(W), torch.nn.GroupNorm(2, W)])
        self.batch = torch.nn.BatchNorm1d(W)
        self.head = torch.nn.Linear(W, 5)
        for parameter in [*self.parameters(), self.batch.running_mean, self.batch.running_var]:
            parameter.data.uniform_(0.2, 1.5)

    def forward(self, ids, picture):
        x = self.depthwise(self.norms[0](self.embed(ids)).mT)
        x = self.batch(self.norms[1](x))
        return self.conv(x), self.head(x.mT), self.image(picture)


class Ours(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, W, rngs=rngs)
        self.conv = nnx.Conv(W, 6, 3, padding="VALID", rngs=rngs)
        self.image = nnx.Conv(2, 3, (2, 5), padding="VALID", use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(W, W, 2, feature_group_count=W, padding="VALID", rngs=rngs)
        self.norms = nnx.List(
            [
                nnx.LayerNorm(W, epsilon=1e-5, use_fast_variance=False, rngs=rngs),
                nnx.GroupNorm(W, num_groups=2, epsilon=1e-5, use_fast_variance=False, rngs=rngs),
            ]
        )
        self.batch = nnx.BatchNorm(W, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(W, 5, rngs=rngs)

    def __call__(self, ids, picture):
        x = self.depthwise(self.norms[0](self.embed(ids)))
        x = self.batch(self.norms[1](x))
        return self.conv(x).mT, self.head(x), jnp.moveaxis(self.image(jnp.moveaxis(picture, 1, -1)), -1, 1)


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return Theirs().eval()


def test_flax_layers_compute_what_torch_does(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = Ours()
    report = load_into(ours, tmp_path / "w.pt")
    assert report.complete
    assert set(report.loaded) == {name for name in theirs.state_dict() if "num_batches" not in name}
    ids, picture = torch.randint(0, 7, (2, 9)), torch.randn(2, 2, 6, 8)
    with torch.no_grad():
        expected = theirs(ids, picture)
    for got, want in zip(ours(jnp.asarray(ids), jnp.asarray(picture)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


class Block(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(1)
        self.lrnn, self.out = LRU(W, 3, rngs=rngs), nnx.Linear(W, W, rngs=rngs)


class Net(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])
        self.tied = self.blocks[0].out


def weights_of(net) -> dict[str, np.ndarray]:
    """Fresh random values under the names of the module."""
    rng = np.random.default_rng(3)
    names = compat_torch.state_dict(net)
    fresh = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in names.items()}
    return fresh | {f"tied.{leaf}": fresh[f"blocks.0.out.{leaf}"] for leaf in ("weight", "bias")}


def assert_holds(net, weights) -> None:
    for name, value in compat_torch.state_dict(net).items():
        np.testing.assert_array_equal(value, weights[name])


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_our_layers_anywhere(tmp_path, ending):
    net = Net()
    weights = weights_of(net)
    if ending == "safetensors":
        save_file(weights, tmp_path / f"w.{ending}")
    else:
        tensors = {f"model.{name}": torch.tensor(value) for name, value in weights.items()}
        torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / f"w.{ending}")
    report = load_into(net, tmp_path / f"w.{ending}")
    assert isinstance(report, LoadReport)
    assert report.complete
    assert (report.skipped, report.nearest) == ((), {})
    assert_holds(net, weights)
    x = jnp.linspace(-1, 1, 2 * 5 * W).reshape(2, 5, W)
    alone = LRU(W, 3)
    alone.load_state_dict({n.removeprefix("blocks.1.lrnn."): v for n, v in weights.items() if "blocks.1.lrnn" in n})
    np.testing.assert_array_equal(net.blocks[1].lrnn(x), alone(x))


def test_one_name_of_a_tied_parameter_is_enough(tmp_path):
    net = Net()
    weights = weights_of(net)
    save_file({n: v for n, v in weights.items() if not n.startswith("blocks.0.out")}, tmp_path / "w.safetensors")
    assert load_into(net, tmp_path / "w.safetensors").complete
    assert_holds(net, weights)
    save_file(weights | {"tied.bias": weights["tied.bias"] + 1}, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="are one parameter, but their values differ"):
        load_into(net, tmp_path / "v.safetensors")
    assert_holds(net, weights)


def test_prefix_rename_and_ignore(tmp_path):
    net = Net()
    weights = weights_of(net)
    other = {f"net.encoder.{n.replace('blocks', 'layers').replace('lrnn', 'ssm')}": v for n, v in weights.items()}
    other |= {"net.encoder.aux.weight": np.ones(3, np.float32), "optimizer.x": np.ones(1, np.float32)}
    save_file(other, tmp_path / "w.safetensors")
    report = load_into(
        net, tmp_path / "w.safetensors", prefix="net.encoder",
        rename=[(r"^layers\.", "blocks."), (r"\.ssm\.", ".lrnn.")],
        ignore=[r"^aux\.", r"blocks\.1\.out\.bias", r"layers\.1\.out\.bias"],
    )  # fmt: skip
    assert report.complete
    assert set(report.skipped) == {"aux.weight", "layers.1.out.bias", "blocks.1.out.bias"}
    state = compat_torch.state_dict(net)
    np.testing.assert_array_equal(state["blocks.1.lrnn.nu_log"], weights["blocks.1.lrnn.nu_log"])
    assert not np.array_equal(state["blocks.1.out.bias"], weights["blocks.1.out.bias"])


def test_all_that_does_not_fit_is_listed_and_nothing_changed(tmp_path):
    net = Net()
    before = {name: np.array(value) for name, value in compat_torch.state_dict(net).items()}
    weights = weights_of(net)
    weights["blocks.1.lrnn.nu_lgo"] = weights.pop("blocks.1.lrnn.nu_log")
    weights["blocks.0.lrnn.D"] = np.ones(9, np.float32)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(StateDictMismatchError) as caught:
        load_into(net, tmp_path / "w.safetensors")
    assert caught.value.missing == ["blocks.1.lrnn.nu_log"]
    assert caught.value.unexpected == ["blocks.1.lrnn.nu_lgo"]
    assert caught.value.mismatched == ["blocks.0.lrnn.D: expected float32[4], got float32[9]"]
    assert "did you mean 'blocks.1.lrnn.nu_log'" in str(caught.value)
    assert_holds(net, before)

    report = load_into(net, tmp_path / "w.safetensors", strict=False)
    assert not report.complete
    assert (report.missing, report.unused) == (("blocks.1.lrnn.nu_log",), ("blocks.1.lrnn.nu_lgo",))
    assert report.mis_shaped == ("blocks.0.lrnn.D: expected float32[4], got float32[9]",)
    assert report.nearest["blocks.1.lrnn.nu_lgo"] == "blocks.1.lrnn.nu_log"
    assert report.nearest["blocks.1.lrnn.nu_log"] == "blocks.1.lrnn.nu_lgo"
    left = ("blocks.1.lrnn.nu_log", "blocks.0.lrnn.D")
    assert not set(left) & set(report.loaded)
    assert_holds(net, weights | {name: before[name] for name in left})


def test_bad_values(tmp_path):
    net = Net()
    weights = weights_of(net)
    weights["blocks.0.lrnn.D"][1] = np.nan
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*blocks\.0\.lrnn\.D \(1 of 4\)"):
        load_into(net, tmp_path / "w.safetensors")
    assert load_into(net, tmp_path / "w.safetensors", allow_nonfinite=True).complete
    save_file({name: value.astype(np.float64) for name, value in weights.items()}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        load_into(net, tmp_path / "d.safetensors", allow_nonfinite=True)
    load_into(net, tmp_path / "d.safetensors", allow_nonfinite=True, dtype=jnp.float32)
    assert_holds(net, weights)


def test_layers_without_a_counterpart(tmp_path):
    class Up(nnx.Module):
        def __init__(self):
            self.up = nnx.ConvTranspose(2, 3, 2, rngs=nnx.Rngs(0))

    save_file({"up.bias": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="up is a ConvTranspose"):
        load_into(Up(), tmp_path / "w.safetensors")


def test_old_s4_layers_are_converted(tmp_path):
    S4Block = pytest.importorskip("compat_torch.models.original.s4").S4Block

    class Model(nnx.Module):
        def __init__(self):
            self.encoder, self.layers = (
                nnx.Linear(2, 4, rngs=nnx.Rngs(0)),
                nnx.List([S4Block(4, d_state=4, mode="diag")]),
            )

    model = Model()
    rng = np.random.default_rng(0)
    shapes = {name: value.shape for name, value in compat_torch.state_dict(model).items()}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    old = {}
    for name, value in weights.items():
        name = name.replace("layer.kernel.", "kernel.kernel.").replace("layer.D", "D")
        name = name.replace("inv_dt", "log_dt").replace("A_real", "log_w_real")
        value = value[:, 0] if name.endswith("log_dt") else -value if name.endswith("A_imag") else value
        old[name.replace("A_imag", "w_imag")] = value
    save_file({name: np.ascontiguousarray(value) for name, value in old.items()}, tmp_path / "w.safetensors")
    assert load_into(model, tmp_path / "w.safetensors").complete
    assert_holds(model, weights)
