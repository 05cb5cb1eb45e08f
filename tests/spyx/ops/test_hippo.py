"""spyx.ops.hippo: the published definitions, the reference's stored weights, and what can go wrong."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from parity.case import GOLDEN
from spyx.ops import hippo

KEY = jax.random.key(3)
NPLR = [("legs", 1), ("legs", 3), ("legt", 2), ("legt", 3), ("fourier", 1), ("fout", 2)]


def full(system):
    """The real N x N matrix and N-vector that a kept half stands for."""
    A, P, B, V = system
    diagonal = 2 * (V @ np.diag(A) @ V.conj().T).real
    P = 2 * (P @ V.T).real
    return diagonal, P, 2 * (V @ B).real


def test_legs_is_its_definition():
    A, B = hippo.transition("legs", 5)
    for i in range(5):
        assert B[i] == pytest.approx((2 * i + 1) ** 0.5)
        for j in range(5):
            root = ((2 * i + 1) * (2 * j + 1)) ** 0.5
            assert A[i, j] == pytest.approx(-root if i > j else -(i + 1) if i == j else 0)


def test_legt_is_its_definition():
    A, B = hippo.transition("legt", 4)
    for i in range(4):
        assert B[i] == pytest.approx(0.5 * (2 * i + 1) ** 0.5)
        for j in range(4):
            root = 0.5 * ((2 * i + 1) * (2 * j + 1)) ** 0.5
            assert A[i, j] == pytest.approx(-root * (1 if i >= j else (-1) ** (j - i)))


def test_fourier_is_its_definition():
    A, B = hippo.transition("fourier", 6)
    np.testing.assert_allclose(B, [1, 0, 2**0.5, 0, 2**0.5, 0])
    turning = A + np.outer(B, B)
    expected = np.zeros((6, 6))
    for k in (1, 2):
        expected[2 * k + 1, 2 * k] = np.pi * k
        expected[2 * k, 2 * k + 1] = -np.pi * k
    np.testing.assert_allclose(turning, expected, atol=1e-15)


@pytest.mark.parametrize(("measure", "rank"), NPLR)
@pytest.mark.parametrize("N", [2, 4, 8, 64])
def test_nplr_is_the_hippo_system(measure, rank, N):
    system = hippo.nplr(measure, N, rank, B_clip=None)
    diagonal, P, B = full(system)
    A, b = hippo.transition(measure, N)
    np.testing.assert_allclose(diagonal - P.T @ P, A, atol=1e-10 * N**2)
    np.testing.assert_allclose(B, b, atol=1e-11 * N)
    assert system.P.shape == (rank, N // 2)
    assert (system.A.imag <= 1e-9).all()


@pytest.mark.parametrize(("measure", "rank"), NPLR)
def test_eigenvectors_have_one_phase_on_every_platform(measure, rank):
    V = hippo.nplr(measure, 16, rank).V
    first = V[np.argmax(np.abs(V) > 1e-9, axis=0), np.arange(8)]
    np.testing.assert_allclose(first.imag, 0, atol=1e-15)
    assert (first.real > 0).all()


def test_clip():
    free, clipped = hippo.nplr("legs", 64, B_clip=None).B, hippo.nplr("legs", 64).B
    assert np.abs(free.imag).max() > 2
    np.testing.assert_allclose(clipped, free.real + 1j * np.clip(free.imag, -2, 2))


@pytest.mark.parametrize(
    ("init", "imaginary"),
    [
        ("diag-lin", [0, np.pi, 2 * np.pi, 3 * np.pi]),
        ("diag-inv", [8 / np.pi * (8 / (1 + 2 * n) - 1) for n in range(4)]),
        ("diag-inv2", [8 / np.pi * (8 / (1 + n) - 1) for n in range(4)]),
        ("diag-quad", [(1 + 2 * n) ** 2 / np.pi for n in range(4)]),
        ("diag-real", [0, 0, 0, 0]),
    ],
)
def test_diagonals(init, imaginary):
    A, P, B, _ = hippo.combination(init, 8, 2, 3, key=KEY)
    np.testing.assert_allclose(A.imag, -np.broadcast_to(imaginary, (3, 4)))
    np.testing.assert_allclose(-A.real, np.broadcast_to([1, 2, 3, 4] if init == "diag-real" else 0.5, (3, 4)))
    np.testing.assert_array_equal(B, 1)
    np.testing.assert_array_equal(P, np.zeros((2, 3, 4)))


def test_options_of_the_diagonal():
    base = hippo.combination("diag-lin", 8, 1, 2, key=KEY)
    scaled = hippo.combination("diag-lin", 8, 1, 2, key=KEY, real_scale=3.0, imag_scale=0.5, B_scale=2.0)
    np.testing.assert_allclose(scaled.A, 3 * base.A.real + 0.5j * base.A.imag)
    np.testing.assert_allclose(scaled.B, 2 * base.B)
    signs = hippo.combination("diag-lin", 8, 1, 1, key=KEY, B_init="alternating").B[0]
    np.testing.assert_array_equal(signs, [1, -1, 1, -1])
    turns = hippo.combination("diag-lin", 8, 1, 1, key=KEY, B_init="unit-cw").B[0]
    np.testing.assert_allclose(turns, np.exp(-2j * np.pi * np.arange(4) / 8))
    unit = hippo.combination("diag-inv", 8, 1, 2, key=KEY, normalize=True, B_init="random")
    np.testing.assert_allclose(2 * np.sum(np.abs(unit.B / unit.A) ** 2, -1), 1, rtol=1e-5)
    legs = hippo.combination("dplr-legs", 8, 2, 2, key=KEY, B_init="hippo")
    np.testing.assert_allclose(legs.P[:, 1], hippo.nplr("legs", 8, 2).P)


def test_random_parts():
    rand = hippo.combination("dplr-rand", 64, 2, 50, key=KEY, real_random=True, B_init="random", P_scale=3.0)
    logs = np.log(-np.asarray(rand.A.imag))
    assert abs(logs.mean()) < 0.1
    assert abs(logs.std() - 1) < 0.1
    assert -rand.A.real.max() >= 0
    assert -rand.A.real.min() <= 1
    np.testing.assert_allclose(np.mean(np.abs(rand.B) ** 2), 1, rtol=0.1)
    np.testing.assert_allclose(np.mean(np.abs(rand.P) ** 2), 9, rtol=0.1)
    again = hippo.combination("dplr-rand", 64, 2, 50, key=jax.random.key(4))
    assert not np.allclose(again.A, rand.A)
    count = hippo.combination("diag-lin", 8, 1, 40, key=KEY, imag_random=True).A
    assert 0 <= -count.imag.max() <= -count.imag.min() <= 4 * np.pi
    whole = -hippo.combination("diag-real", 8, 1, 40, key=KEY, real_random=True).A.real
    assert set(np.unique(whole)) <= {0.0, 1.0, 2.0, 3.0}


def test_combinations_share_equally():
    A = hippo.combination("all", 8, 2, 8, key=KEY).A
    for index, init in enumerate(hippo.COMBINATIONS["all"]):
        np.testing.assert_allclose(A[2 * index : 2 * index + 2], hippo.combination(init, 8, 2, 2, key=KEY).A, rtol=1e-6)
    listed = hippo.combination(["diag-lin", "legs"], 8, 1, 2, key=KEY).A
    np.testing.assert_allclose(listed[0].imag, -np.pi * np.arange(4), rtol=1e-6)


def test_initialisers_run_without_values():
    shapes = jax.eval_shape(lambda key: hippo.combination("all", 64, 1, 8, key=key), KEY)
    assert [leaf.shape for leaf in shapes] == [(8, 32), (1, 8, 32), (8, 32), (8, 64, 32)]


INITS = ["all", "diag", "diag-inv", "diag-inv2", "diag-legs", "diag-lin", "diag-quad", "diag-real", "fourier", "fout"]


@pytest.mark.parametrize("init", [*INITS, "hippo", "legt", "B_alt"])
def test_stored_weights_of_the_reference(init):
    weights = load_file(GOLDEN / f"lrnnx_s4d_init_{init}" / "weights.safetensors")
    kwargs = {"B_init": "alternating"} if init == "B_alt" else {}
    A, _, B, _ = hippo.combination({"B_alt": "diag-lin"}.get(init, init), 8, 2, 4, key=KEY, **kwargs)
    np.testing.assert_allclose(weights["A_real"], np.log(np.maximum(-A.real, 1e-4)), atol=2e-6)
    np.testing.assert_allclose(weights["A_imag"], np.maximum(-A.imag, 1e-4), rtol=2e-6)
    stored = weights["B"][0, ..., 0] + 1j * weights["B"][0, ..., 1]
    np.testing.assert_allclose(np.abs(stored), np.abs(B), atol=3e-6)


@pytest.mark.parametrize("case", ["default_lmax", "fourier", "rank2_legt", "rank3", "dt_untied"])
def test_stored_low_rank_systems_of_the_reference(case):
    weights = load_file(GOLDEN / f"lrnnx_s4_{case}" / "weights_init.safetensors")
    init = {"fourier": "fourier", "rank2_legt": "legt"}.get(case, "legs")
    A, P, B, _ = hippo.combination(init, 8, len(weights["P"]), 4, key=KEY)
    stored_B, stored_P = (weights[name][..., 0] + 1j * weights[name][..., 1] for name in ("B", "P"))
    phase = np.conj(stored_B[0]) / np.conj(B)
    np.testing.assert_allclose(np.abs(phase), 1, atol=2e-6)
    np.testing.assert_allclose(weights["A_imag"], np.maximum(-A.imag, 1e-4), rtol=2e-6)
    np.testing.assert_allclose(np.conj(phase) * B, stored_B[0], atol=3e-6)
    np.testing.assert_allclose(np.conj(phase) * P, stored_P, atol=3e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("legz", 8, 1, 2), r"init must be one of \('legs'.*got 'legz'"),
        (("lin", 8, 1, 2), "init must be one of"),
        (("diag-cubic", 8, 1, 2), "init of a diagonal must be one of .*got 'cubic'"),
        (("all", 8, 2, 6), "6 systems cannot be shared equally"),
        (("legt", 8, 1, 2), "legt needs rank >= 2, got 1"),
        (("legs", 1, 1, 2), "N must be at least 2"),
        (("fourier", 7, 1, 2), "N must be positive and even, got 7"),
        (([], 8, 1, 2), "cannot be shared"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        hippo.combination(*arguments, key=KEY)


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ("legs", {"B_init": "random"}, r"init 'legs' takes \['B_clip'\], got \['B_init'\]"),
        ("diag-lin", {"B_clip": 1.0}, r"got \['B_clip'\]"),
        ("diag-lin", {"B_random": True}, 'pass B_init="random"'),
        ("diag-lin", {"B_init": "ones"}, "B_init must be one of"),
        ("diag-lin", {"B_init": "legs"}, 'belongs to init "legs"'),
    ],
)
def test_bad_options(init, options, message):
    with pytest.raises(ValueError, match=message):
        hippo.combination(init, 8, 1, 2, key=KEY, **options)
    with pytest.raises(ValueError, match="divisible by 4"):
        hippo.combination("diag-lin", 6, 1, 2, key=KEY, B_init="alternating")
