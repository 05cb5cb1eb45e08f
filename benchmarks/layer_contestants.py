"""Who runs in the layer benchmark: compat_torch's classes and lrnnx's of the same name and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from contestants import Case, Prepared, _import_lrnnx, _jax_prepared, _lrnnx_ref, _noise, _torch_prepared, _with_threads

DECODE_STEPS = 128
LAYERS: dict[str, dict[str, Any]] = {
    "S5": {"module": "lti", "discretization": "zoh"},
    "LRU": {"module": "lti"},
    "S4D": {"module": "lti", "transposed": False},
    "S4": {"module": "lti", "transposed": False},
    "Mamba": {"module": "ltv"},
}


def _arguments(case: Case) -> tuple[str, dict[str, Any]]:
    _, _, H, N = case["shape"]
    kwargs = {"d_model": H, "d_state": N, **LAYERS[case["family"]]}
    return kwargs.pop("module"), kwargs


def _input(case: Case):
    B, L, H, _ = case["shape"]
    return _noise(case, x=(B, L, H))["x"]


def _ours(case: Case) -> Prepared:
    import importlib

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from compat_torch import decode

    package, kwargs = _arguments(case)
    cls = getattr(importlib.import_module(f"compat_torch.models.{package}"), case["family"])
    layer, x = cls(**kwargs, rngs=nnx.Rngs(case["seed"])), jnp.asarray(_input(case))
    layer.eval()
    graph, params = nnx.split(layer, ...)

    def forward(params, x):
        y = nnx.merge(graph, params)(x)
        return y[0] if isinstance(y, tuple) else y

    prepared = _jax_prepared(forward, (params, x))
    cache, steps = layer.allocate_inference_cache(x.shape[0]), x[:, :DECODE_STEPS]
    prepared.run["decode"] = lambda: jax.block_until_ready(decode(layer, steps, cache))
    return prepared


def _lrnnx(case: Case, threads: int) -> Prepared:
    import importlib

    import torch

    _import_lrnnx()
    package, kwargs = _arguments(case)
    name = case["family"]
    module = importlib.import_module(f"lrnnx.models.{package}.{name.lower()}")
    if name == "Mamba":
        vars(module).update(selective_scan_fn=_lrnnx_ref(), selective_state_update=None)
        kwargs["use_fast_path"] = False
    torch.manual_seed(case["seed"])
    layer, x = getattr(module, name)(**kwargs), torch.from_numpy(_input(case))
    layer.eval()
    if hasattr(layer, "setup_step"):
        layer.setup_step()

    def forward(x):
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def decode():
        with torch.no_grad():
            cache = layer.allocate_inference_cache(x.shape[0], *([1] if package == "ltv" else []))
            for t in range(DECODE_STEPS):
                _, cache = layer.step(x[:, t : t + 1] if package == "ltv" else x[:, t], cache)

    prepared = _torch_prepared(forward, [x], list(layer.parameters()), threads)
    prepared.run["decode"] = decode
    return prepared


LAYER_CONTESTANTS: dict[str, dict[str, Callable[[Case], Prepared]]] = {
    name: {"ours": _ours, **_with_threads(_lrnnx, "lrnnx")} for name in LAYERS
}
