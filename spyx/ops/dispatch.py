"""One primitive, one implementation per platform, chosen when the program is lowered.

`jax.lax.platform_dependent` with a Pallas branch cannot be exported for several platforms at once, because
every branch is lowered for every platform. A primitive with a lowering rule per platform can.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@cache
def native_kernels() -> bool:
    """Whether CPUs run the kernels of `spyx.ops.native`: numba is installed, SPYX_NATIVE is not 0."""
    return os.environ.get("SPYX_NATIVE", "1") != "0" and importlib.util.find_spec("numba") is not None


def platform_primitive(
    name: str,
    default: Callable[..., Any],
    *,
    cpu: Callable[..., Any] | None = None,
    native: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    tpu: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A function that computes `default`, or what is given for the platform it is lowered for.

    Every implementation has the signature `f(*trees, **static) -> tree`: pytrees of arrays (None is
    one) in and out. All of them give the same structure, shapes and dtypes as `default`, which is plain JAX:
    it stands for the platforms not named (ROCm, ...) and for abstract evaluation. An implementation may look
    at shapes and dtypes and call `default` itself where its kernel does not fit.

    The result works eagerly, under jit, vmap, scan, checkpoint, shard_map and export for several platforms at
    once. vmap is applied to each platform's own implementation. Derivatives are those of `default`, which keep all
    that JAX keeps: put the function into a `jax.custom_vjp`. What is left for them are derivatives of a derivative
    where JAX drops such rules (in the loops of `lax.scan`).

    Args:
        name: of the primitive, as shown in jaxprs.
        default: plain JAX implementation.
        cpu: implementation for CPUs; None is `default`, as for the others.
        native: one for CPUs by the compiled kernels of `spyx.ops.native`, used instead of `cpu` where
            `native_kernels()` says so and the program is not exported: an exported program stands alone.
        cuda: implementation for NVIDIA GPUs.
        tpu: implementation for TPUs.

    Returns:
        Function `f(*trees, **static) -> tree`; the static arguments must be hashable.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def run(implementation: Callable[..., Any], *leaves, tree, in_axes: tuple, static: tuple) -> list[jax.Array]:
        def f(*leaves):
            return tuple(jax.tree.leaves(implementation(*jax.tree.unflatten(tree, leaves), **dict(static))))

        for axes in in_axes:
            f = jax.vmap(f, in_axes=axes)
        return list(f(*leaves))

    def abstract(*avals, **params):
        return jax.make_jaxpr(partial(run, default, **params))(*avals).out_avals

    @partial(jax.jit, static_argnames=("tree", "in_axes", "static"))
    def eager(*leaves, **params):
        return primitive.bind(*leaves, **params)

    def batch(leaves, dims, *, tree, in_axes, static):
        outs = primitive.bind(*leaves, tree=tree, in_axes=(*in_axes, tuple(dims)), static=static)
        return outs, [0] * len(outs)

    def differentiate(primals, tangents, **params):
        return jax.jvp(partial(run, default, **params), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(eager)
    ad.primitive_jvps[primitive] = differentiate
    batching.primitive_batchers[primitive] = batch
    for platform, implementation in ((None, default), ("cpu", cpu), ("cuda", cuda), ("tpu", tpu)):
        if implementation is not None:
            rule = mlir.lower_fun(partial(run, implementation), multiple_results=True)
            mlir.register_lowering(primitive, rule, platform=platform)
    if native is not None:
        in_xla = mlir.lower_fun(partial(run, cpu or default), multiple_results=True)
        compiled = mlir.lower_fun(partial(run, native), multiple_results=True)

        def choose(context, *args, **params):
            exported = context.module_context.lowering_parameters.for_export
            return (in_xla if exported or not native_kernels() else compiled)(context, *args, **params)

        mlir.register_lowering(primitive, choose, platform="cpu")

    def call(*trees: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(trees)
        outs = primitive.bind(*leaves, tree=tree, in_axes=(), static=tuple(sorted(static.items())))
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(partial(default, **static), *trees)), outs)

    call.__name__ = call.__qualname__ = name
    return call
