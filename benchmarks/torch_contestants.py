"""Who runs in the benchmark of the torch backend: the classes of compat_torch.nn, lrnnx's, and the bridge alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from contestants import Case, Prepared, _torch_prepared, _with_threads
from layer_contestants import DECODE_STEPS, LAYERS, _build, _input, _lrnnx, is_varying

TWINS = {f"torch {name}": name for name in LAYERS}
BRIDGE = "torch bridge"
CALLS = 1000
"""Calls of the bridge of which the median is taken."""


def _of_layer(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
    return lambda case, *args: prepare({**case, "family": TWINS[case["family"]]}, *args)


def _twin(case: Case) -> Prepared:
    """The class of compat_torch.nn, used as lrnnx's is: its threads are JAX's."""
    import torch

    from compat_torch import to_torch

    layer, x = to_torch(_build(case, "compat_torch")).eval(), torch.from_numpy(_input(case))
    varying = is_varying(case["family"])

    def forward(x):
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def decode():
        with torch.no_grad():
            cache = layer.allocate_inference_cache(x.shape[0])
            for t in range(DECODE_STEPS):
                layer.step(x[:, t : t + 1] if varying else x[:, t], cache)

    prepared = _torch_prepared(forward, [x], list(layer.parameters()), 1)
    prepared.run["decode"] = decode
    return prepared


def _bridge(case: Case) -> Prepared:
    """Microseconds of one call of a layer that does next to nothing, and of the same function called from JAX."""
    import jax
    import jax.numpy as jnp
    import torch
    from flax import nnx

    from compat_torch.nn import wrap

    class Scale(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return x * self.scale[...]

    layer, x = wrap(Scale()), torch.randn(2, 8)
    alone, arrays = jax.jit(jnp.multiply), (jnp.ones(8), jnp.ones((2, 8)))

    def forward():
        with torch.no_grad():
            layer(x)

    facts = {
        "forward_us": _median_us(forward),
        "both_us": _median_us(lambda: layer(x).sum().backward()),
        "jax_us": _median_us(lambda: alone(*arrays).block_until_ready()),
        "torch_both_us": _median_us(lambda: (x * layer.scale).sum().backward()),
    }
    return Prepared({}, facts)


def _median_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(CALLS + CALLS // 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[CALLS // 10 :]) * 1e6


TORCH_CONTESTANTS: dict[str, dict[str, Callable[[Case], Prepared]]] = {
    **{family: {"ours": _of_layer(_twin), **_with_threads(_of_layer(_lrnnx), "lrnnx")} for family in TWINS},
    BRIDGE: {"ours": _bridge},
}
