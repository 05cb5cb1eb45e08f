"""Functions with a hand-written backward pass that can still be differentiated any number of times."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def recomputed(forward: Callable, adjoint: Callable, plain: Callable) -> Callable[[Hashable, Any, Any], Any]:
    """`f(static, values, masks) -> outputs` with a custom VJP.

    Derivatives of the first order, in reverse mode, use `adjoint`; those of `forward` and `adjoint`
    themselves (grad of grad, Hessian-vector products) come from `plain`.

    Args:
        forward: `(static, values, masks) -> (outputs, saved)`.
        adjoint: `(static, values, masks, saved, cotangents) -> cotangents of values`.
        plain: `(static, values, masks) -> outputs` in differentiable JAX.

    `static` is hashable; values, outputs and saved are pytrees of floating point arrays, masks one of
    bool arrays; None is allowed in all of them.
    """

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def ahead(static, values, masks):
        return forward(static, values, masks)

    @ahead.defjvp
    def _(static, primals, tangents):
        values, masks = primals
        outputs, saved = ahead(static, values, masks)
        _, d_outputs = jax.jvp(lambda v: plain(static, v, masks), (values,), tangents[:1])
        return (outputs, saved), (d_outputs, jax.tree.map(jnp.zeros_like, saved))

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def back(static, values, masks, saved, cotangents):
        return adjoint(static, values, masks, saved, cotangents)

    @back.defjvp
    def _(static, primals, tangents):
        values, masks, saved, cotangents = primals

        def reference(values, cotangents):
            return jax.vjp(lambda v: plain(static, v, masks), values)[1](cotangents)[0]

        result = back(static, values, masks, saved, cotangents)
        return result, jax.jvp(reference, (values, cotangents), (tangents[0], tangents[3]))[1]

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(static, values, masks):
        return forward(static, values, masks)[0]

    def call_forward(static, values, masks):
        outputs, saved = ahead(static, values, masks)
        return outputs, (values, masks, saved)

    def call_backward(static, residuals, cotangents):
        values, masks, saved = residuals
        return back(static, values, masks, saved, cotangents), None

    call.defvjp(call_forward, call_backward)
    return call
