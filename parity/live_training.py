"""Fifty steps of training, three times: `python -m parity.live_training [--seed 1]`

The installed lrnnx trained by torch, our torch module by torch, and our JAX module by optax, from the same weights on
the same data with Adam: the three loss curves must agree, at every step, within 1e-4 of the loss.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from .compare import Row, Scores
from .live_from_torch import options, report
from .live_run import ReferenceMissingError, import_class

STEPS, RATE, LIMIT = 50, 0.01, 1e-4
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lru": ("lrnnx.models.lti.lru:LRU", {}),
    "s5": ("lrnnx.models.lti.s5:S5", {"discretization": "zoh"}),
    "s4d": ("lrnnx.models.lti.s4d:S4D", {"transposed": False, "verbose": False}),
    "centaurusneck": ("lrnnx.models.lti.centaurus:CentaurusNeck", {"sub_state_dim": 2}),
    "mamba": ("lrnnx.models.ltv.mamba:Mamba", {"discretization": "zoh"}),
    "s5_ltv": ("lrnnx.models.ltv.s5:S5", {"discretization": "zoh"}),
    "s7": ("lrnnx.models.ltv.s7:S7", {"use_fast_path": False}),
}
B, L, H, N = 3, 11, 4, 6


def check(name: str, seed: int) -> list[Row]:
    """One row for our torch module and one for the JAX module; "forward" is the largest relative distance of losses."""
    import torch

    from compat_torch import from_torch, to_torch

    cls, arguments = LAYERS[name]
    torch.manual_seed(seed)
    reference = import_class(cls)(d_model=H, d_state=N, **arguments).train()
    module = from_torch(reference)
    twin = to_torch(module)
    x = torch.randn(B, L, H)
    target = x.cumsum(1).tanh()
    expected = _by_torch(copy.deepcopy(reference), x, target)
    if not expected[-1] < expected[0]:
        raise RuntimeError(f"{name} did not learn: {expected[0]} -> {expected[-1]}")
    curves = {
        f"compat_torch.nn.{type(twin).__name__}": _by_torch(twin, x, target),
        f"compat_torch.{type(module).__name__}, optax": _by_optax(module, x.numpy(), target.numpy()),
    }
    rows = []
    for subject, losses in curves.items():
        scores = Scores()
        scores.add("forward", float(np.max(np.abs(losses - expected) / expected)), LIMIT, "losses")
        remark = f"loss {expected[0]:.3g} -> {expected[-1]:.3g} in {STEPS} steps"
        rows.append(scores.row(f"train_{name}", subject, remark))
    return rows


def _by_torch(module: Any, x: Any, target: Any) -> np.ndarray:
    import torch

    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = module(x)
        loss = torch.nn.functional.mse_loss(y[0] if isinstance(y, tuple) else y, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def _by_optax(module: Any, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    import jax.numpy as jnp
    import optax
    from flax import nnx

    optimizer = nnx.Optimizer(module, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            y = module(x)
            return jnp.mean(jnp.square((y[0] if isinstance(y, tuple) else y) - target))

        value, gradient = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradient)
        return value

    return np.array([float(step(module, optimizer)) for _ in range(STEPS)])


def main() -> int:
    """Train every layer; the exit status, 2 if lrnnx is not installed."""
    args = options(__doc__)
    try:
        return report([row for i, name in enumerate(LAYERS) if args.k in name for row in check(name, args.seed + i)])
    except ReferenceMissingError as err:
        print(err)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
