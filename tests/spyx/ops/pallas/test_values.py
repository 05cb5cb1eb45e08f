from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spyx.ops import linear_scan
from spyx.ops.pallas import gpu, tpu
from spyx.ops.pallas.values import scan, scan_adjoint, scan_fits

RUNS = {name: partial(m.linear_scan_forward, interpret=True) for name, m in (("tpu", tpu), ("gpu", gpu))}


def draw(rng, shape, dtype):
    value = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)
    return jnp.asarray(value, dtype)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("a_shape", "dtypes", "reverse", "masked"),
    [
        ((2, 3), ("complex64", "float32"), False, ()),
        ((1, 3), ("float32", "float32"), True, ("lengths", "reset")),
        ((7, 1, 3), ("complex64", "complex64"), True, ("lengths",)),
        ((7, 2, 3), ("float32", "complex64"), False, ("reset",)),
        ((1, 1), ("float32", "bfloat16"), False, ("lengths",)),
    ],
)
def test_values_and_adjoint_equal_linear_scan(run, a_shape, dtypes, reverse, masked):
    rng = np.random.default_rng(0)
    a, x = 0.5 * draw(rng, a_shape, dtypes[0]), draw(rng, (7, 2, 3), dtypes[1])
    state = jnp.result_type(*(jnp.complex64 if d == "complex64" else jnp.float32 for d in dtypes))
    h0 = draw(rng, (2, 3), str(state))
    lengths = jnp.asarray([4, 0]) if "lengths" in masked else None
    reset = jnp.asarray(rng.random((7, 2)) < 0.3) if "reset" in masked else None
    if lengths is not None:
        x = x.at[5:].set(jnp.nan)
    masks = (
        None if reset is None else reset[..., None],
        None if lengths is None else (jnp.arange(7)[:, None] < lengths)[..., None],
    )
    assert scan_fits((a, x, h0))

    plain = partial(linear_scan, reverse=reverse, reset=reset, lengths=lengths, method="sequential")
    expected, pull = jax.vjp(plain, a, x, h0)
    cotangents = tuple(draw(rng, v.shape, v.dtype.name) for v in expected)
    got = scan(RUNS[run], (a, x, h0), masks, reverse=reverse)
    gradients = scan_adjoint(RUNS[run], (a, x, h0), masks, cotangents, reverse=reverse)
    tolerance = 2e-2 if "bfloat16" in dtypes else 1e-5
    for ours, theirs in zip((*got, *gradients), (*expected, *pull(cotangents)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        compared = [np.asarray(v, "complex128") for v in (ours, theirs)]
        np.testing.assert_allclose(*compared, rtol=tolerance, atol=tolerance)


def test_float64_does_not_fit():
    with jax.enable_x64(True):
        x, h0 = jnp.ones((3, 2)), jnp.ones(2)
        assert not scan_fits((h0, x, h0))
