"""Who runs in the layer benchmark: compat_torch's classes and lrnnx's of the same name and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from contestants import (
    Case,
    Prepared,
    _gemm_floor,
    _import_lrnnx,
    _jax_prepared,
    _noise,
    _torch_prepared,
    _with_threads,
)

DECODE_STEPS = 128
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "S5": ("lti.s5:S5", {"discretization": "zoh"}),
    "LRU": ("lti.lru:LRU", {}),
    "S4D": ("lti.s4d:S4D", {"transposed": False, "verbose": False}),
    "S4": ("lti.s4:S4", {"transposed": False, "verbose": False}),
    "Centaurus": ("lti.centaurus:CentaurusNeck", {"sub_state_dim": 4}),
    "Mamba": ("ltv.mamba:Mamba", {"use_fast_path": False}),
    "event S5": ("ltv.s5:S5", {"use_fast_path": False}),
    "RGLRU": ("ltv.rglru:RGLRU", {"use_fast_path": False}),
    "S7": ("ltv.s7:S7", {"use_fast_path": False}),
}


def is_varying(name: str) -> bool:
    """Whether the class is one of models.ltv."""
    return LAYERS[name][0].startswith("ltv.")


def _build(case: Case, package: str, **more: Any):
    """The layer of `package`, "compat_torch" or "lrnnx", that a case asks for."""
    import importlib

    _, _, H, N = case["shape"]
    path, kwargs = LAYERS[case["family"]]
    module_name, cls = path.split(":")
    module = importlib.import_module(f"{package}.models.{module_name}")
    if package == "lrnnx":
        for name in list(vars(module)):
            if name.endswith("_scan_fn"):
                scans = importlib.import_module(f"lrnnx.ops.{name.removesuffix('_fn')}")
                setattr(module, name, getattr(scans, name.replace("_fn", "_ref")))
            elif name.endswith("_state_update"):
                setattr(module, name, None)
    sizes = {"d_model": H} if case["family"] == "RGLRU" else {"d_model": H, "d_state": N}
    return getattr(module, cls)(**sizes, **kwargs, **more)


def _input(case: Case):
    B, L, H, _ = case["shape"]
    return _noise(case, x=(B, L, H))["x"]


def _ours(case: Case) -> Prepared:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from compat_torch import decode

    layer, x = _build(case, "compat_torch", rngs=nnx.Rngs(case["seed"])), jnp.asarray(_input(case))
    layer.eval()
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    # as plain arrays: taking an nnx.State apart at every call costs 0.03 ms
    leaves, tree = jax.tree.flatten(params)

    def forward(leaves, x):
        y = nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)(x)
        return y[0] if isinstance(y, tuple) else y

    prepared = _jax_prepared(forward, (leaves, x))
    cache, steps = layer.allocate_inference_cache(x.shape[0]), x[:, :DECODE_STEPS]
    prepared.run["decode"] = lambda: jax.block_until_ready(decode(layer, steps, cache))
    return prepared


def _lrnnx(case: Case, threads: int) -> Prepared:
    import torch

    _import_lrnnx()
    torch.manual_seed(case["seed"])
    layer, x = _build(case, "lrnnx"), torch.from_numpy(_input(case))
    varying = is_varying(case["family"])
    layer.eval()
    if hasattr(layer, "setup_step"):
        layer.setup_step()

    def forward(x):
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def decode():
        with torch.no_grad():
            cache = layer.allocate_inference_cache(x.shape[0], *([1] if varying else []))
            for t in range(DECODE_STEPS):
                _, cache = layer.step(x[:, t : t + 1] if varying else x[:, t], cache)

    prepared = _torch_prepared(forward, [x], list(layer.parameters()), threads)
    prepared.run["decode"] = decode
    return prepared


def _rglru_products(case: Case) -> Prepared:
    """Only the matrix products of RGLRU."""
    import jax.numpy as jnp

    B, L, H, _ = case["shape"]
    v = _noise(case, x=(L * B, H), gate=(H, H), inner=(H, H), recurrent=(H, H), input=(H, H), out=(H, H))

    def products(x, gate, inner, recurrent, input, out):
        u = x @ inner
        return (x @ gate + u @ recurrent + u @ input) @ out

    return _jax_prepared(products, tuple(map(jnp.asarray, v.values())))


def _s7_products(case: Case) -> Prepared:
    """Only the matrix products of S7, those of the made matrices with vectors left out."""
    import jax.numpy as jnp

    B, L, H, N = case["shape"]
    v = _noise(case, x=(L * B, H), inner=(H, H), gate=(H, H), made=(H, 2 * N + 2 * H * N + H))
    return _jax_prepared(lambda x, inner, gate, made: ((x @ inner) @ gate) @ made, tuple(map(jnp.asarray, v.values())))


def _event_s5_products(case: Case) -> Prepared:
    B, L, H, N = case["shape"]
    return _gemm_floor({**case, "shape": (L, B, H, N)})


PRODUCTS = {"RGLRU": _rglru_products, "S7": _s7_products, "event S5": _event_s5_products}
"""Floors: a layer can hardly be faster in XLA than its matrix products."""
LAYER_CONTESTANTS: dict[str, dict[str, Callable[[Case], Prepared]]] = {
    name: {
        "ours": _ours,
        **_with_threads(_lrnnx, "lrnnx"),
        **({"products": PRODUCTS[name]} if name in PRODUCTS else {}),
    }
    for name in LAYERS
}
