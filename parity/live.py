"""Cases made on the spot by an installed lrnnx, with fresh random weights and inputs."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from .case import Case, Run

LRNNX = "lrnnx==1.0.0.post1"
INSTALL = f"""pip install torch
pip install --no-build-isolation --no-deps {LRNNX}
pip install einops opt-einsum triton"""

_DISCRETIZATIONS = ("zoh", "bilinear", "dirac")
_SHAPES = ((1, 1, 1, 1), (2, 17, 4, 8), (3, 31, 5, 3), (2, 23, 2, 16), (1, 200, 7, 6))


class ReferenceMissingError(ImportError):
    """The reference library is not installed; the message says how to install it."""


def configurations() -> list[tuple[str, dict[str, Any], tuple[int, int, int]]]:
    """(reference class, constructor arguments, shape (B, L, H) of the input) of every live case."""
    found: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = []
    for B, L, H, N in _SHAPES:
        sizes = {"d_model": H, "d_state": N}
        found.append(("lrnnx.models.lti.lru:LRU", sizes, (B, L, H)))
        for discretization in _DISCRETIZATIONS:
            found.append(("lrnnx.models.lti.s5:S5", {**sizes, "discretization": discretization}, (B, L, H)))
    sizes = {"d_model": 3, "d_state": 4, "discretization": "no_discretization"}
    found.append(("lrnnx.models.lti.s5:S5", sizes, (2, 7, 3)))
    return found


def live_cases(seed: int) -> Iterator[Case]:
    """Run the installed reference on every configuration.

    Args:
        seed: of weights and inputs.

    Raises:
        ReferenceMissingError: lrnnx cannot be imported.
    """
    for index, (cls, kwargs, shape) in enumerate(configurations()):
        yield _make_case(_import_class(cls), cls, kwargs, shape, seed + index)


def _import_class(cls: str) -> Any:
    module, name = cls.split(":")
    for extension in ("selective_scan_cuda", "simplified_scan_cuda"):
        sys.modules.setdefault(extension, types.ModuleType(extension))
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as err:
        raise ReferenceMissingError(
            f"the reference cannot be imported ({err}); in an environment of its own, install it with\n{INSTALL}"
        ) from err


def _make_case(reference: Any, cls: str, kwargs: dict[str, Any], shape: tuple[int, int, int], seed: int) -> Case:
    import torch

    torch.manual_seed(seed)
    model = reference(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    x, w = torch.randn(shape), torch.randn(shape)

    inputs = x.clone().requires_grad_()
    y = model(inputs)
    (y * w).sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    (grads["x"],) = (p.grad.numpy() for p in [inputs] if p.grad is not None)
    with torch.no_grad():
        cache, steps = model.allocate_inference_cache(shape[0]), []
        for t in range(shape[1]):
            y_t, cache = model.step(x[:, t], cache)
            steps.append(y_t.clone())
        with _everything_in_64_bits():
            model64 = reference(**kwargs)
            model64.load_state_dict(model.state_dict())
            y64 = model64.double()(x.double())
    run = Run(
        name=f"L={shape[1]}", x=x.numpy(), y=y.detach().numpy(), y64=y64.numpy(),
        w=w.numpy(), grads=grads, step=torch.stack(steps, 1).numpy(),
    )  # fmt: skip
    sizes = "x".join(map(str, (*shape, kwargs["d_state"])))
    name = "_".join([cls.split(":")[1].lower(), *filter(None, [kwargs.get("discretization")]), sizes])
    return Case(name, cls, kwargs, weights, (run,))


@contextlib.contextmanager
def _everything_in_64_bits() -> Iterator[None]:
    """While it runs, the 32-bit dtypes and casts that the reference names are their 64-bit versions."""
    import torch

    wide: list[tuple[Any, str, Any]] = [
        (torch, "float32", torch.float64),
        (torch, "float", torch.float64),
        (torch, "complex64", torch.complex128),
        (torch.Tensor, "float", torch.Tensor.double),
        (torch.Tensor, "cfloat", lambda tensor: tensor.to(torch.complex128)),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in wide]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for owner, name, value in wide:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        torch.set_default_dtype(default)


def versions() -> dict[str, str]:
    """Versions of the reference and its torch, for the report."""
    return {name: metadata.version(name) for name in ("lrnnx", "torch")}
