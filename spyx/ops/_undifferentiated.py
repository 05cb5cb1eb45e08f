"""Forward passes by the compiled kernels for CPU, of functions whose derivatives stay JAX's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax

from .dispatch import platform_primitive


def undifferentiated(name: str, plain: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """`f(static, values, rest)` that computes `plain`; on CPU by `native` where it is not differentiated.

    Where it is, forward and backward pass are those of `plain`, to any order.

    Args:
        name: of the primitive, as in `platform_primitive`.
        plain: the same in plain JAX.
        native: the same by the kernels of `spyx.ops.native`; it may call `plain` for what they do not take.

    `static` is hashable, values and outputs are pytrees of floating point arrays, `rest` one of others.
    """
    in_jax, in_kernel = (lambda *trees, static, f=f: f(static, *trees) for f in (plain, native))
    by_platform = platform_primitive(name, in_jax, native=in_kernel)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(static: Hashable, values: Any, rest: Any) -> Any:
        return by_platform(values, rest, static=static)

    def forward(static: Hashable, values: Any, rest: Any) -> tuple[Any, Any]:
        return jax.vjp(lambda values: plain(static, values, rest), values)

    def backward(static: Hashable, pull_back: Callable[[Any], tuple[Any]], cotangents: Any) -> tuple[Any, None]:
        return *pull_back(cotangents), None

    call.defvjp(forward, backward)
    return jax.jit(call, static_argnums=0)  # an eager call of a primitive traces its implementation
