from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for
from jax.sharding import PartitionSpec

from spyx.ops.dispatch import platform_primitive
from spyx.ops.pallas import gpu, tpu
from spyx.ops.pallas.linear import Flags, advance

TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def sequential(a, x, h0, *, flags):
    def step(carry, inputs):
        (h,), carry = advance((inputs[0],), (inputs[1],), carry, flags)
        return carry, h

    last = 0 if flags.reverse else -1
    _, h = jax.lax.scan(step, (h0.astype(jnp.float32),), (a, x), reverse=flags.reverse)
    return h.astype(x.dtype), h[last]


def kernel(run, a, x, h0, *, flags, interpret=False):
    (h,), (h_last,) = run((a,), (x,), (h0,), flags, interpret=interpret)
    return h, h_last


forward = platform_primitive(
    "linear_scan_example",
    sequential,
    cuda=partial(kernel, gpu.linear_scan_forward),
    tpu=partial(kernel, tpu.linear_scan_forward),
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan(a, x, h0, flags):
    return forward(a, x, h0, flags=flags)


def scan_fwd(a, x, h0, flags):
    h, h_last = scan(a, x, h0, flags)
    return (h, h_last), (a, h, h0)


def scan_bwd(flags, saved, cotangents):
    """The adjoint is a scan too, so it can be differentiated again."""
    a, h, h0 = saved
    dh, dh_last = cotangents
    first, last = (-1, 0) if flags.reverse else (0, -1)
    if flags.lagged:
        dh = dh.at[last].add(dh_last)
        g, _ = scan(a, dh, jnp.zeros_like(h0), flags.adjoint())
        following = jnp.roll(g, 1 if flags.reverse else -1, 0).at[last].set(0)
        return following * h, g, g[first]
    g, _ = scan(a, dh, dh_last, flags.adjoint())
    before = jnp.roll(h, -1 if flags.reverse else 1, 0).at[first].set(h0)
    return g * before, g, a[first] * g[first]


scan.defvjp(scan_fwd, scan_bwd)


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    a, x = rng.uniform(0.2, 0.9, (5, 2, 3)), rng.normal(size=(5, 2, 3))
    return tuple(jnp.asarray(v, jnp.float32) for v in (a, x, rng.normal(size=(2, 3))))


def loss(run, a, x, h0):
    h, h_last = run(a, x, h0)
    return (h**2).sum() + (h_last**3).sum()


ours = partial(scan, flags=Flags())
plain = partial(sequential, flags=Flags())


def check(f, *args):
    """f(run, *args) is the same through the primitive and in plain JAX."""
    got, expected = f(ours, *args), f(plain, *args)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_eager_jit_and_grad(arguments):
    check(lambda run, *args: run(*args), *arguments)
    check(lambda run, *args: jax.jit(run)(*args), *arguments)
    check(lambda run, *args: jax.grad(partial(loss, run), (0, 1, 2))(*args), *arguments)


def test_second_order(arguments):
    def hessian_vector(run, *args):
        gradient = jax.grad(partial(loss, run), (0, 1, 2))
        product = jax.grad(lambda args: sum(jnp.sum(g * jnp.cos(g)) for g in gradient(*args)))
        return product(args)

    check(hessian_vector, *arguments)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 1, None), (3, None, 0)])
def test_vmap(arguments, axes):
    def grow(value, axis):
        return value if axis is None else jnp.stack([value, 0.5 * value], axis)

    batched = [grow(v, axis) for v, axis in zip(arguments, axes, strict=True)]
    check(lambda run, *args: jax.vmap(run, in_axes=axes)(*args), *batched)
    check(lambda run, *args: jax.vmap(jax.grad(partial(loss, run), 1), in_axes=axes)(*args), *batched)


def test_nested_vmap(arguments):
    batched = [jnp.stack([jnp.stack([v, 0.5 * v], 1)] * 3, 2) for v in arguments]
    check(lambda run, *args: jax.vmap(jax.vmap(run, 1), 2)(*args), *batched)


def test_inside_scan_and_checkpoint(arguments):
    a, x, h0 = arguments

    def chained(run, a, x, h0):
        layer = jax.checkpoint(run)
        h_last, h = jax.lax.scan(lambda h, _: layer(a, x, h)[::-1], h0, None, length=3)
        return (h**2).sum() + h_last.sum()

    check(lambda run, *args: jax.grad(partial(chained, run), (0, 1, 2))(*args), a, x, h0)


def test_inside_shard_map(arguments):
    mesh = jax.make_mesh((1,), ("b",))
    split = PartitionSpec(None, "b")

    def sharded(run, *args):
        specs = (split, split, PartitionSpec("b"))
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(split, PartitionSpec("b"))))(
            *(jax.device_put(v, jax.NamedSharding(mesh, s)) for v, s in zip(args, specs, strict=True))
        )

    check(sharded, *arguments)


def test_static_arguments_and_name_are_in_the_jaxpr(arguments):
    jaxpr = str(jax.make_jaxpr(partial(forward, flags=Flags(reverse=True)))(*arguments))
    assert "linear_scan_example[" in jaxpr
    assert "reverse=True" in jaxpr


def test_one_export_for_all_platforms_gradient_included(arguments):
    gradient = jax.value_and_grad(partial(loss, ours), (0, 1, 2))
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arguments]
    export = jax.export.export(jax.jit(gradient), platforms=("cpu", "cuda", "tpu"), disabled_checks=[TRITON])
    exported = jax.export.deserialize(export(*shapes).serialize())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    module = exported.mlir_module()
    assert module.count("tpu_custom_call") >= 2
    assert module.count("xla.gpu.triton") >= 2
    got, expected = exported.call(*arguments), jax.value_and_grad(partial(loss, plain), (0, 1, 2))(*arguments)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_trees_and_none():
    f = platform_primitive("tree_example", lambda pair, mask: {"sum": pair[0] + pair[1], "mask": mask})
    got = f((jnp.ones(3), jnp.ones(3)), None)
    assert got["mask"] is None
    assert got["sum"].tolist() == [2, 2, 2]
    assert jax.vmap(f, in_axes=((0, None), 0))((jnp.ones((2, 3)), jnp.ones(3)), jnp.ones(2))["mask"].shape == (2,)


def test_rocm_takes_the_plain_form(arguments):
    lowered = jax.jit(ours).trace(*arguments).lower(lowering_platforms=("rocm",)).as_text()
    assert "triton" not in lowered
    assert "stablehlo.while" in lowered


@pytest.mark.parametrize("run", [tpu.linear_scan_forward, gpu.linear_scan_forward])
@pytest.mark.parametrize("axes", [(0, 1, 0), (None, 0, None)])
def test_vmap_of_a_kernel(arguments, run, axes):
    def grow(value, axis):
        return value if axis is None else jnp.stack([value, 0.5 * value, -value], axis)

    batched = [grow(v, axis) for v, axis in zip(arguments, axes, strict=True)]
    got = jax.vmap(partial(kernel, run, flags=Flags(), interpret=True), in_axes=axes)(*batched)
    expected = jax.vmap(plain, in_axes=axes)(*batched)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_vmap_and_gradient_compile(chip):
    f = jax.vmap(jax.grad(partial(loss, ours), (0, 1, 2)))
    a, h0 = jax.ShapeDtypeStruct((3, 64, 8, 128), jnp.float32), jax.ShapeDtypeStruct((3, 8, 128), jnp.float32)
    compile_for(chip, f, a, a, h0)
