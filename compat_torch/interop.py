"""torch tensors <-> JAX arrays, through DLPack where the memory can be shared.

The only module of compat_torch, besides `nn`, that imports torch, and only once a torch tensor has come in.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spyx.ops.dtypes import x64_enabled

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")

_WIDE = ("torch.float64", "torch.complex128")


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A torch tensor as a JAX array of the same shape and dtype, sharing memory when it is contiguous.

    Integers become int32 while jax_enable_x64 is off.

    Raises:
        ValueError: it requires grad while grad mode is on; it is 64-bit floating point while
            jax_enable_x64 is off; it is sparse, or on a device that JAX does not have.
    """
    import torch

    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "got a torch tensor that requires grad: no gradient would flow back through JAX. Call under "
            "torch.no_grad(), or pass tensor.detach(); for gradients use jax.grad on JAX arrays"
        )
    tensor = _resolved(tensor)
    if str(tensor.dtype) in _WIDE and not x64_enabled():
        raise ValueError(
            f"got a {tensor.dtype} tensor, but 64-bit values are off in JAX: call "
            'jax.config.update("jax_enable_x64", True) first, or pass tensor.float()'
        )
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype is torch.bool):
        if not x64_enabled():
            tensor = tensor.to(torch.int32)
        return jnp.array(tensor.cpu().numpy())
    if tensor.dtype is torch.bool or tensor.numel() == 0:
        return jnp.array(to_numpy(tensor))
    if tensor.device.type != "cpu" and not _jax_has(tensor.device.type):
        raise ValueError(
            f"got a tensor on {tensor.device}, a device this JAX does not have (it has "
            f"{sorted({d.platform for d in jax.devices()})}): pass tensor.cpu(), or install jax for that device"
        )
    return jnp.from_dlpack(tensor.contiguous())


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values of a torch tensor as a NumPy array of the same shape and dtype (bfloat16 through ml_dtypes).

    Raises:
        ValueError: it is sparse.
    """
    import torch

    tensor = _resolved(tensor).cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def to_torch(array: jax.Array) -> torch.Tensor:
    """A JAX array as a torch tensor of the same shape and dtype; the memory is shared, so do not edit the
    tensor in place while the array is in use."""
    import torch

    if array.size == 0 or array.dtype == jnp.bool_:
        host = np.array(array)
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(host)
    return torch.from_dlpack(array)


def torch_in_torch_out(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method on JAX arrays take torch tensors anywhere in its arguments.

    If there is at least one, every array of the result comes back as a torch tensor, and the computation
    is complete, so that the caller may overwrite his tensors. Arguments are never changed.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(is_torch, jax.tree.leaves((args[1:], kwargs)))):
            return method(*args, **kwargs)
        given: dict[int, Any] = {}

        def enter(leaf):
            if not is_torch(leaf):
                return leaf
            array = to_jax(leaf)
            given[id(array)] = (array, leaf)
            return array

        rest, named = jax.tree.map(enter, (args[1:], kwargs))
        result = jax.block_until_ready(method(args[0], *rest, **named))  # type: ignore[call-arg]
        untouched = {id(leaf) for leaf in jax.tree.leaves((args[1:], kwargs)) if isinstance(leaf, jax.Array)}

        def leave(leaf):
            if not isinstance(leaf, jax.Array):
                return leaf
            if id(leaf) in given:
                return given[id(leaf)][1]
            return to_torch(jnp.copy(leaf) if id(leaf) in untouched else leaf)

        return jax.tree.map(leave, result)

    return wrapper


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.layout is not torch.strided:
        raise ValueError(f"got a {tensor.layout} tensor: only strided tensors are supported, pass tensor.to_dense()")
    return tensor.detach().resolve_conj().resolve_neg()


def _jax_has(torch_device: str) -> bool:
    wanted = {"cuda": ("gpu", "cuda", "rocm")}.get(torch_device, (torch_device,))
    return any(device.platform in wanted for device in jax.devices())
