"""Who runs in the scan benchmark: ours, its peers, and the floors. Each is one process, `worker.py NAME`.

A contestant is a function `case -> Prepared`; libraries are imported inside it, so that a process holds only its own.
All get the same inputs, made from the case's seed with NumPy. Thread counts of PyTorch are part of the name.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Case = dict[str, Any]


@dataclass
class Prepared:
    """Blocking callables by kind ("forward", "both"), and facts such as XLA's temporary bytes."""

    run: dict[str, Callable[[], Any]]
    facts: dict[str, float]


def _noise(case: Case, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(case["seed"])
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _selective_inputs(case: Case) -> dict[str, np.ndarray]:
    B, L, D, N = case["shape"]
    values = _noise(case, u=(L, B, D), dt=(L, B, D), B=(L, B, N), C=(L, B, N), D=(D,))
    values["dt"] = np.log1p(np.exp(values["dt"] - 3))
    values["A"] = -np.tile(np.arange(1, N + 1, dtype=np.float32), (D, 1))
    return values


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of some loss with respect to outputs of this shape."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _jax_prepared(function: Callable, args: tuple[Any, ...]) -> Prepared:
    """Compile `function(*args)`, and its outputs with the gradients of every argument from a given cotangent."""
    import time

    import jax
    import jax.numpy as jnp

    def both(cotangent, *args):
        outputs, pull_back = jax.vjp(function, *args)
        return outputs, pull_back(cotangent)

    cotangent = jnp.asarray(_cotangent(jax.eval_shape(function, *args).shape))
    run, facts = {}, {}
    for kind, program, operands in (("forward", function, args), ("both", both, (cotangent, *args))):
        start = time.perf_counter()
        compiled = jax.jit(program).lower(*operands).compile()
        facts[f"{kind}_compile_s"] = time.perf_counter() - start
        facts[f"{kind}_temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        run[kind] = lambda compiled=compiled, operands=operands: jax.block_until_ready(compiled(*operands))
    facts["checksum"] = float(jnp.sum(jnp.abs(run["forward"]())))
    return Prepared(run, facts)


def _torch_prepared(function: Callable, inputs: list[Any], parameters: list[Any], threads: int) -> Prepared:
    import torch

    torch.set_num_threads(threads)

    def forward():
        with torch.no_grad():
            return function(*inputs)

    cotangent = torch.from_numpy(_cotangent(tuple(forward().shape)))

    def both():
        leaves = [value.detach().requires_grad_() for value in inputs]
        for parameter in parameters:
            parameter.grad = None
        function(*leaves).backward(cotangent)

    return Prepared({"forward": forward, "both": both}, {"checksum": float(forward().abs().sum())})


def _module(layer: Any, u: np.ndarray) -> Prepared:
    """An NNX layer as a pure function of (parameters, input)."""
    import jax.numpy as jnp
    from flax import nnx

    graph, params = nnx.split(layer)
    return _jax_prepared(lambda params, u: nnx.merge(graph, params)(u), (params, jnp.asarray(u)))


def _lru(case: Case) -> Prepared:
    """spyx.ssm.LRU of whichever spyx this process imports."""
    from flax import nnx

    from spyx.ssm import LRU

    T, B, H, N = case["shape"]
    return _module(LRU(H, N, rngs=nnx.Rngs(case["seed"])), _noise(case, u=(T, B, H))["u"])


def _gemm_floor(case: Case) -> Prepared:
    """Only the matrix products of a diagonal layer: u -> Re and Im of B u, and back by C."""
    import jax.numpy as jnp

    T, B, H, N = case["shape"]
    v = {k: jnp.asarray(x) for k, x in _noise(case, u=(T, B, H), Br=(N, H), Bi=(N, H), Cr=(H, N), Ci=(H, N)).items()}

    def products(u, Br, Bi, Cr, Ci):
        return (u @ Br.T) @ Cr.T - (u @ Bi.T) @ Ci.T

    return _jax_prepared(products, tuple(v.values()))


def _ours_selective(case: Case) -> Prepared:
    import jax.numpy as jnp

    from spyx.ops import selective_scan

    v = {k: jnp.asarray(x) for k, x in _selective_inputs(case).items()}
    return _jax_prepared(selective_scan, (v["u"], v["dt"], v["A"], v["B"], v["C"], v["D"]))


def _upstream(prepare: Callable[[Case], Prepared]) -> Callable[[Case], Prepared]:
    """Upstream's layers alone: its package also imports data loaders that it needs for nothing here."""

    def prepare_upstream(case: Case) -> Prepared:
        package = types.ModuleType("spyx")
        package.__path__ = [f"{os.environ['UPSTREAM']}/spyx"]
        sys.modules["spyx"] = package
        return prepare(case)

    return prepare_upstream


def _upstream_selective(case: Case) -> Prepared:
    """Upstream's scan over the (T, B, D, N) tensors that its Mamba layer builds."""
    import jax.numpy as jnp

    from spyx.ssm import _selective_scan  # type: ignore[attr-defined]

    v = {k: jnp.asarray(x) for k, x in _selective_inputs(case).items()}

    def layer(u, dt, A, B, C, D):
        drive = (dt[..., None] * B[:, :, None, :]) * u[..., None]
        states = _selective_scan(jnp.exp(jnp.einsum("tbd,ds->tbds", dt, A)), drive)
        return jnp.einsum("tbs,tbds->tbd", C, states) + D * u

    return _jax_prepared(layer, (v["u"], v["dt"], v["A"], v["B"], v["C"], v["D"]))


def _exp_floor(case: Case) -> Prepared:
    """Only the exponentials exp(dt A), streamed over time."""
    import jax
    import jax.numpy as jnp

    v = _selective_inputs(case)
    A = jnp.asarray(v["A"].T)

    def exponentials(dt):
        def step(total, dt_t):
            return total + jnp.exp(dt_t[:, None, :] * A), None

        return jax.lax.scan(step, jnp.zeros((dt.shape[1], *A.shape)), dt)[0]

    return _jax_prepared(exponentials, (jnp.asarray(v["dt"]),))


def _dual_inputs(case: Case) -> tuple[np.ndarray, ...]:
    """x, dt, A, B, C, D of the state-space dual scan, time first, with one group."""
    B, L, H, P, N = case["shape"]
    v = _noise(case, x=(L, B, H, P), dt=(L, B, H), B=(L, B, 1, N), C=(L, B, 1, N), D=(H,))
    dt, A = np.log1p(np.exp(v["dt"] - 3)), -np.arange(1, H + 1, dtype=np.float32)
    return v["x"], dt, A, v["B"], v["C"], v["D"]


def _ours_dual(case: Case) -> Prepared:
    import jax.numpy as jnp

    from spyx.ops import ssd

    return _jax_prepared(ssd, tuple(map(jnp.asarray, _dual_inputs(case))))


def _dual_loop(case: Case) -> Prepared:
    """The recurrence as one lax.scan over time, differentiated by JAX."""
    import jax
    import jax.numpy as jnp

    def loop(x, dt, A, B, C, D):
        def step(h, inputs):
            x, dt, B, C = inputs
            h = jnp.exp(dt * A)[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]
            return h, jnp.einsum("bhpn,bgn->bhp", h, C)

        h0 = jnp.zeros((*x.shape[1:], B.shape[-1]))
        return jax.lax.scan(step, h0, (x, dt, B, C))[1] + D[:, None] * x

    return _jax_prepared(loop, tuple(map(jnp.asarray, _dual_inputs(case))))


def _block_sizes(case: Case) -> tuple[int, int, int, int]:
    B, L, D, N = case["shape"]
    return B, L, D // 2, N


def _ours_block(case: Case) -> Prepared:
    """A Mamba block on spyx.ops, parameters as arrays."""
    import jax
    import jax.numpy as jnp

    from spyx.ops import causal_conv1d, selective_scan

    B, L, H, N = _block_sizes(case)
    D, R = 2 * H, -(-H // 16)
    v = _noise(
        case, x=(L, B, H), inp=(H, 2 * D), conv=(D, 4), bias=(D,), xp=(D, R + 2 * N), dtp=(R, D), dtb=(D,),
        D=(D,), out=(D, H),
    )  # fmt: skip
    v = {k: jnp.asarray(x if k == "x" else 0.1 * x) for k, x in v.items()}
    v["A_log"] = jnp.log(jnp.tile(jnp.arange(1.0, N + 1), (D, 1)))

    def block(v):
        x, z = jnp.split(v["x"] @ v["inp"], 2, -1)
        x = causal_conv1d(x, v["conv"], v["bias"], activation="silu")
        dt, Bm, Cm = jnp.split(x @ v["xp"], (R, R + N), -1)
        dt = jax.nn.softplus(dt @ v["dtp"] + v["dtb"])
        return selective_scan(x, dt, -jnp.exp(v["A_log"]), Bm, Cm, v["D"], z) @ v["out"]

    return _jax_prepared(block, (v,))


def _torch_tensors(case: Case) -> list[Any]:
    import torch

    v = _selective_inputs(case)

    def batch_first(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x.transpose(1, 2, 0)))

    return [*(batch_first(v[k]) for k in ("u", "dt")), torch.from_numpy(v["A"]), batch_first(v["B"]),
            batch_first(v["C"]), torch.from_numpy(v["D"])]  # fmt: skip


def _import_lrnnx() -> None:
    for extension in ("selective_scan_cuda", "simplified_scan_cuda"):
        sys.modules.setdefault(extension, types.ModuleType(extension))


def _lrnnx(case: Case, threads: int) -> Prepared:
    import torch

    _import_lrnnx()
    torch.manual_seed(case["seed"])
    if case["family"] == "lti":
        from lrnnx.models.lti import S5

        T, B, H, N = case["shape"]
        layer = S5(H, N, "zoh")
        return _torch_prepared(layer, [torch.randn(B, T, H)], list(layer.parameters()), threads)
    if case["family"] == "selective":
        from lrnnx.ops.selective_scan import selective_scan_ref

        prepared = _torch_prepared(selective_scan_ref, _torch_tensors(case), [], threads)
        del prepared.run["both"]  # minutes a call
        return prepared
    import lrnnx.models.ltv.mamba as mamba

    for name in ("selective_scan_fn", "selective_state_update"):
        setattr(mamba, name, {"selective_scan_fn": _lrnnx_ref()}.get(name))
    B, L, H, N = _block_sizes(case)
    layer = mamba.Mamba(H, N, use_fast_path=False)
    return _torch_prepared(layer, [torch.randn(B, L, H)], list(layer.parameters()), threads)


def _lrnnx_ref() -> Callable:
    from lrnnx.ops.selective_scan import selective_scan_ref

    return selective_scan_ref


def _transformers(case: Case, threads: int) -> Prepared:
    import torch
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    if case["family"] == "ssd":
        x, dt, A, Bm, Cm, D = (
            torch.from_numpy(v.swapaxes(0, 1).copy() if v.ndim > 1 else v) for v in _dual_inputs(case)
        )
        chunk = Mamba2Config().chunk_size

        def scan(x, dt, A, B, C, D):
            return mamba2_chunk_scan(x, dt, A, B, C, chunk, D)

        return _torch_prepared(scan, [x, dt, A, Bm, Cm, D], [], threads)
    B, L, H, N = _block_sizes(case)
    config = MambaConfig(hidden_size=H, state_size=N, expand=2, num_hidden_layers=1, vocab_size=8)
    layer = MambaMixer(config, layer_idx=0)
    return _torch_prepared(layer, [torch.randn(B, L, H)], list(layer.parameters()), threads)


def _mambapy(case: Case, threads: int) -> Prepared:
    import torch
    from mambapy.mamba import MambaBlock, MambaConfig

    B, L, H, N = _block_sizes(case)
    layer = MambaBlock(MambaConfig(d_model=H, n_layers=1, d_state=N))
    return _torch_prepared(layer, [torch.randn(B, L, H)], list(layer.parameters()), threads)


def _with_threads(prepare: Callable[[Case, int], Prepared], name: str) -> dict[str, Callable[[Case], Prepared]]:
    return {f"{name}@{n}": lambda case, n=n: prepare(case, n) for n in (1, 2)}


CONTESTANTS: dict[str, dict[str, Callable[[Case], Prepared]]] = {
    "lti": {"ours": _lru, "spyx 1.0.0": _upstream(_lru), "gemm floor": _gemm_floor, **_with_threads(_lrnnx, "lrnnx")},
    "selective": {
        "ours": _ours_selective,
        "spyx 1.0.0": _upstream(_upstream_selective),
        "exp floor": _exp_floor,
        **_with_threads(_lrnnx, "lrnnx"),
    },
    "ssd": {"ours": _ours_dual, "lax.scan": _dual_loop, **_with_threads(_transformers, "transformers")},
    "block": {
        "ours": _ours_block,
        **_with_threads(_lrnnx, "lrnnx"),
        **_with_threads(_transformers, "transformers"),
        **_with_threads(_mambapy, "mambapy"),
    },
}
