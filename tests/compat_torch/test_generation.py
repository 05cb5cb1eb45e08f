"""compat_torch.utils: generation of continuous sequences, initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from compat_torch.architectures.classifier import Classifier
from compat_torch.models import lti, ltv
from compat_torch.utils import (
    generate,
    init_CV,
    init_log_steps,
    init_VinvB,
    make_DPLR_HiPPO,
    make_HiPPO,
    make_NPLR_HiPPO,
)


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected, tolerance=3e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)), rtol=0)


def layers():
    rngs = nnx.Rngs(0)
    return [lti.S4D(3, d_state=4, rngs=rngs), ltv.Mamba(3, 2, rngs=rngs), ltv.S5(3, 2, rngs=rngs)]


def test_it_is_a_loop_over_the_definition():
    layer, x = lti.LRU(3, 2, rngs=nnx.Rngs(1)), noise(2, 3)
    p = {name: np.asarray(value, np.float64) for name, value in layer.state_dict().items()}
    Lambda = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    B = np.exp(p["gamma_log"])[:, None] * (p["B_re"] + 1j * p["B_im"])
    C = p["C_re"] + 1j * p["C_im"]
    h, x_t, expected = np.zeros((2, 2), complex), np.asarray(x, np.float64), []
    for _ in range(7):
        h = h * Lambda + x_t @ B.T
        x_t = (h @ C.T).real + p["D"] * x_t
        expected.append(x_t)
    close(generate(layer, x, 7), np.stack(expected, 1))


@pytest.mark.parametrize("index", range(3), ids=("S4D", "Mamba", "S5"))
def test_it_is_a_loop_over_step(index):
    layer, x = layers()[index], noise(2, 3)
    layer.eval()
    timesteps = jnp.array([[0.5], [2.0]]) if index else None
    cache, x_t, expected = layer.allocate_inference_cache(2), x, []
    for _ in range(4):
        if index:
            y, cache = layer.step(x_t[:, None], cache, timesteps)
            x_t = y[:, 0]
        else:
            x_t, cache = layer.step(x_t, cache)
        expected.append(x_t)
    close(generate(layer, x, 4, integration_timesteps=timesteps), jnp.stack(expected, 1))


def test_machinery():
    layer, x = lti.LRU(3, 2, rngs=nnx.Rngs(1)), noise(2, 3)
    y = generate(layer, x, 5)
    assert generate(layer, x, 0).shape == (2, 0, 3)
    np.testing.assert_array_equal(generate(layer, x, 1), y[:, :1])
    close(jax.jit(lambda x: generate(layer, x, 5))(x), y)
    assert jnp.isfinite(jax.grad(lambda x: generate(layer, x, 5).sum())(x)).all()
    low = generate(layer, x.astype(jnp.bfloat16), 3)
    assert low.dtype == jnp.bfloat16
    with torch.no_grad():
        close(generate(layer, torch.tensor(np.asarray(x)), 5), y)
    with jax.enable_x64(True):
        assert generate(lti.LRU(3, 2, param_dtype=jnp.float64), x.astype(jnp.float64), 2).dtype == jnp.float64


def test_what_it_refuses():
    layer, x = lti.LRU(3, 2), noise(2, 3)
    with pytest.raises(ValueError, match=r"graph_cache must be None, got object: .* jax\.jit, which replaces CUDA"):
        generate(layer, x, 2, object())
    with pytest.raises(ValueError, match=r"a first input \(B, H\), got shape \(2, 3, 1\)"):
        generate(layer, x[..., None], 2)
    for steps in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_steps must be an integer, at least 0"):
            generate(layer, x, steps)
    for model in (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), Classifier(3, d_model=2, d_state=2, n_layers=1)):
        with pytest.raises(TypeError, match="a layer of compat_torch that has a step, got"):
            generate(model, x, 2)
    with pytest.raises(ValueError, match=r"keeps the width: S4D gives \(2, 6\) for \(2, 3\)"):
        generate(lti.S4D(3, channels=2, final_act=None), x, 2)
    with pytest.raises(ValueError, match="time-invariant"):
        generate(layer, x, 2, integration_timesteps=jnp.ones(2))


@pytest.mark.parametrize("N", [1, 2, 7])
def test_hippo(N):
    A = np.array(
        [[-np.sqrt((2 * i + 1) * (2 * j + 1)) if i > j else -(i + 1.0) * (i == j) for j in range(N)] for i in range(N)]
    )
    close(make_HiPPO(N), A, 1e-13)
    same, P, B = make_NPLR_HiPPO(N)
    close(same, A, 1e-13)
    close(B, [np.sqrt(2 * i + 1) for i in range(N)], 1e-13)
    normal = A + np.outer(P, P)
    close(normal @ normal.T, normal.T @ normal, 1e-12)
    Lambda, P_in_V, B_in_V, V, B_again = make_DPLR_HiPPO(N)
    close(V @ (np.diag(Lambda) - np.outer(P_in_V, P_in_V.conj())) @ V.conj().T, A, 1e-12)
    close(V.conj().T @ V, np.eye(N), 1e-12)
    close(V @ B_in_V, B, 1e-12)
    np.testing.assert_array_equal(B_again, B)
    V[:] = 0
    assert np.abs(make_DPLR_HiPPO(N)[3]).max() > 0


def test_random_initialisers():
    log_dt = init_log_steps(500, 0.01, 1.0, rngs=nnx.Rngs(0))
    assert log_dt.shape == (500,)
    assert np.log(0.01) <= log_dt.min() < -4.4
    assert -0.2 < log_dt.max() <= 0
    with pytest.raises(ValueError, match="0 < dt_min <= dt_max"):
        init_log_steps(3, 1.0, 0.1)
    V = make_DPLR_HiPPO(8)[3][:, :4]
    B, C = init_VinvB(V.conj().T, 8, 600, rngs=nnx.Rngs(1)), init_CV(V, 8, 600, rngs=nnx.Rngs(2))
    assert (B.shape, C.shape) == ((4, 600, 2), (600, 4, 2))
    # E|B|^2 = 1 / local_P and E|C|^2 = 2 / local_P, because the columns of V are unit vectors
    close((B**2).sum(-1).mean(1), np.full(4, 1 / 8), 0.04)
    close((C**2).sum(-1).mean(0), np.full(4, 2 / 8), 0.04)
    full = make_DPLR_HiPPO(4)[3]
    back = init_VinvB(full.conj().T, 4, 5, rngs=nnx.Rngs(3))
    close((full @ (back[..., 0] + 1j * back[..., 1])).imag, np.zeros((4, 5)))
    assert jnp.abs(init_CV(V, 8, 2) - init_CV(V, 8, 2)).max() > 0
    with pytest.raises(ValueError, match=r"init_VinvB: Vinv must have shape \(P, 8\), got \(8, 4\)"):
        init_VinvB(V, 8, 2)
    with pytest.raises(ValueError, match=r"init_CV: V must have shape \(3, P\), got \(8, 4\)"):
        init_CV(V, 3, 2)
