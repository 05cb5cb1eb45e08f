"""Running a torch module on a CPU: its output, in float64, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def output_of(result: Any) -> Any:
    """The tensor that is compared: the logits of a result that has some, the first of several results."""
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple | list) else result


def in_float64(
    model: Any, x: Any, extra: dict[str, Any], w: Any, output: Callable[[Any], Any] = output_of
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs of the reference in float64, and the gradients of sum(y * w) by name; `model` is changed to float64."""
    import torch

    with everything_in_64_bits():
        inputs = _wide(x).detach().clone().requires_grad_(x.is_floating_point())
        for parameter in model.double().parameters():
            if parameter.is_complex():
                parameter.data = parameter.data.to(torch.complex128)
        y = output(model(inputs, **{name: _wide(value) for name, value in extra.items()}))
        return y.detach().numpy(), gradients(model, inputs, y, w.double())


def gradients(model: Any, x: Any, y: Any, w: Any) -> dict[str, np.ndarray]:
    """Of sum(y * w), by parameter name, and of the input under "x"; a complex one as (re, im) on a trailing axis."""
    import torch

    (y * w).sum().backward()
    named = {**dict(model.named_parameters()), "x": x}
    grads = {name: value.grad.resolve_conj() for name, value in named.items() if value.grad is not None}
    return {name: (torch.view_as_real(g) if g.is_complex() else g).numpy() for name, g in grads.items()}


@contextlib.contextmanager
def everything_in_64_bits() -> Iterator[None]:
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


def _wide(value: Any) -> Any:
    return value.double() if value.is_floating_point() else value
