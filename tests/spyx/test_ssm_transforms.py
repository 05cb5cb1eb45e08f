"""Every layer of spyx.ssm: dtypes, gradients, transformations of JAX and Flax, storage."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from oracles.ssm import ALL, CAUSAL, H, call, close, close_trees, each, length, make, noise, started, step
from safetensors.numpy import load_file, save_file


@each(ALL, quick=("MambaBlock", "ChunkedSSM-causal"))
def test_bfloat16(name):
    u = noise(length(name), 2, H)
    exact, last = call(make(name), u)
    bound = 3e-2 * float(jnp.abs(exact).max())
    for kwargs, v in (({}, u.astype(jnp.bfloat16)), ({"dtype": jnp.bfloat16}, u)):
        layer = make(name, **kwargs)
        y, state = call(layer, v)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=bound)
        assert jax.tree.structure(state) == jax.tree.structure(last)
        if name in CAUSAL:
            y_t, _ = step(layer, v[0], layer.initial_state(2))
            assert y_t.dtype == jnp.bfloat16
            np.testing.assert_allclose(y_t.astype(jnp.float32), exact[0], atol=bound)


@each(ALL, quick=("MambaBlock",))
def test_bfloat16_parameters(name):
    layer, u = make(name, param_dtype=jnp.bfloat16), noise(length(name), 2, H)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.bfloat16)}
    wide = make(name)
    nnx.update(wide, jax.tree.map(lambda v: v.astype(jnp.float32), nnx.state(layer)))
    close(call(layer, u)[0], call(wide, u)[0], 3e-2)
    for v in (u, u.astype(jnp.bfloat16)):
        assert jax.eval_shape(layer, v).dtype == v.dtype


@each(ALL, quick=("MambaBlock",))
def test_float64(name):
    with jax.enable_x64(True):
        layer = make(name, param_dtype=jnp.float64)
        u, state = noise(length(name), 2, H, dtype=jnp.float64), started(layer, name, dtype=jnp.float64)
        whole, last = call(layer, u, state)
        assert whole.dtype == jnp.float64
        assert all(v.dtype in (jnp.float64, jnp.complex128, jnp.int32) for v in jax.tree.leaves(last))
        first, middle = call(layer, u[:6], state)
        second, end = call(layer, u[6:], middle)
        close(jnp.concatenate([first, second]), whole, 1e-14)
        close_trees(end, last, 1e-14)
        narrow = make(name)
        nnx.update(narrow, jax.tree.map(lambda v: v.astype(jnp.float32), nnx.state(layer)))
        close(call(narrow, u.astype(jnp.float32))[0], call(layer, u)[0], 1e-5)


@each(ALL)
def test_jit_vmap_remat(name):
    layer, u = make(name), noise(2, length(name), 2, H)
    expected = jnp.stack([call(layer, v)[0] for v in u])
    close(nnx.jit(lambda m, u: m(u))(layer, u[0]), expected[0])
    close(jax.jit(jax.vmap(layer))(u), expected)
    graph, params = nnx.split(layer)

    def loss(params, u, wrap):
        return jnp.sum(wrap(lambda m, u: m(u))(nnx.merge(graph, params), u) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain = gradient(params, u[0], lambda f: f)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain))
    close_trees(plain, gradient(params, u[0], nnx.remat), 1e-5)


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.full)])
@each(ALL)
def test_gradient_is_the_slope_and_padding_reaches_none(name, reverse):
    with jax.enable_x64(True):
        layer = make(name, param_dtype=jnp.float64, reverse=reverse)
        graph, params = nnx.split(layer)
        state, T = started(layer, name, dtype=jnp.float64), length(name)
        u, w = noise(T, 2, H, dtype=jnp.float64), noise(T, 2, H, seed=3, dtype=jnp.float64)
        lengths, reset = jnp.array([T, 4]), jnp.zeros((T, 2), bool).at[5, 0].set(True)
        mask = jnp.arange(T)[:, None, None] < lengths[:, None]
        padded = jnp.where(mask, u, jnp.nan)

        @jax.jit
        def loss(params, u):
            return jnp.sum(w * nnx.merge(graph, params)(u, state, lengths=lengths, reset=reset))

        along = jax.tree.map(lambda v: noise(*v.shape, seed=v.size, dtype=v.dtype), params)
        ahead, behind = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, along), padded) for s in (1e-6, -1e-6))
        gradient, du = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, padded)
        products = jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, along))
        np.testing.assert_allclose(sum(products), (ahead - behind) / 2e-6, rtol=1e-6)
        np.testing.assert_array_equal(jnp.where(mask, 0, du), 0)
        assert np.all(np.abs(jnp.where(mask, du, 1)) > 0)


@each(ALL, quick=("MambaBlock",))
def test_scan_over_stacked_layers(name):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return ALL[name](rngs)

    layers, u = stack(nnx.Rngs(5)), noise(length(name), 2, H)

    @nnx.jit
    @nnx.scan
    def run(u, layer):
        return layer(u), None

    y, _ = run(u, layers)
    graph, params = nnx.split(layers)
    for i in range(3):
        u, _ = call(nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], params)), u)
    close(y, u)


@each(ALL, quick=("MambaBlock", "ChunkedSSM"))
def test_saved_and_restored(name, tmp_path):
    layer, other, u = make(name), make(name, seed=3), noise(length(name), 2, H)
    expected, _ = call(layer, u)
    assert np.abs(call(other, u)[0] - expected).max() > 1e-3

    def path_name(path):
        return ".".join(map(str, path))

    flat = {path_name(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer))}
    save_file(flat, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    state = nnx.to_flat_state(nnx.state(other))
    nnx.update(other, nnx.from_flat_state([(path, v.replace(read[path_name(path)])) for path, v in state]))
    np.testing.assert_array_equal(call(other, u)[0], expected)

    other = make(name, seed=4)
    target = nnx.state(other)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        nnx.replace_by_pure_dict(target, checkpointer.restore(tmp_path / "orbax", nnx.to_pure_dict(target)))
    nnx.update(other, target)
    np.testing.assert_array_equal(call(other, u)[0], expected)


@each(ALL)
def test_made_without_being_initialised(name):
    shapes = nnx.state(nnx.eval_shape(lambda: ALL[name](nnx.Rngs(0))))
    made = nnx.state(ALL[name](nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda v: v.shape, shapes)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@each(ALL)
def test_precision_reaches_every_product(name, platform):
    def products(precision, function):
        layer = make(name, precision=precision)
        graph, params = nnx.split(layer)
        args = params, noise(length(name), 2, H)
        traced = jax.jit(partial(function, graph)).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in traced.splitlines() if "stablehlo.dot_general" in line or ".convolution" in line]
        assert lines
        return [line for line in lines if "[HIGHEST, HIGHEST]" not in line]

    def forward(graph, params, u):
        return nnx.merge(graph, params)(u)

    def gradient(graph, params, u):
        return jax.grad(lambda p: jnp.sum(forward(graph, p, u) ** 2))(params)

    assert products("highest", forward) == products("highest", gradient) == []
    assert products(None, forward)
