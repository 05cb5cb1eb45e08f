"""HiPPO systems x' = A x + B u and what state-space layers start from: their normal and diagonal forms.

Shapes: N real states, n = N // 2 kept, one of each conjugate pair; r the rank of the correction; S systems.
Whatever is not random is NumPy float64 or complex128; random values are JAX arrays.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

Measure = Literal["legs", "legt", "fourier", "fout"]
BInit = Literal["constant", "random", "alternating", "unit-cw", "unit-ccw", "legs", "hippo"]

COMBINATIONS = {
    "hippo": ("legs", "fourier"),
    "diag": ("diag-inv", "diag-lin"),
    "all": ("legs", "fourier", "diag-inv", "diag-lin"),
}

_NEGLIGIBLE = 1e-4  # below it an eigenvalue of the normal part counts as zero


class System(NamedTuple):
    """A diagonal plus low-rank system: A_full = V (diag(A) - P P^*) V^*, with V over both halves of the pairs.

    Attributes:
        A: diagonal, shape (n,) or (S, n).
        P: low-rank part, shape (r, n) or (r, S, n).
        B: input vector, shape (n,) or (S, n).
        V: the basis, shape (N, n) or (S, N, n).
    """

    A: Any
    P: Any
    B: Any
    V: Any


def transition(measure: Measure, N: int) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
    """A and B of a HiPPO measure.

    Args:
        measure: "legs" (scaled Legendre), "legt" (translated Legendre), "fourier" or "fout" (truncated Fourier).
        N: number of states; even for Fourier.

    Returns:
        A (N, N) and B (N,), float64.

    Raises:
        ValueError: unknown measure, N not positive, or odd for Fourier.

    Source: HiPPO (arXiv:2008.07669), How to Train Your HiPPO (arXiv:2206.12037).
    """
    _check_measure(measure, N)
    q = np.arange(N, dtype=np.float64)
    root = np.sqrt(2 * q + 1)
    if measure == "legs":
        return -np.tril(np.outer(root, root), -1) - np.diag(q + 1), root
    if measure == "legt":
        sign = np.where(q[:, None] < q[None, :], (-1.0) ** (q[:, None] - q[None, :]), 1.0)
        return -0.5 * sign * np.outer(root, root), 0.5 * root
    turn = np.zeros(N - 1)
    turn[1::2] = np.pi * np.arange(1, N // 2)
    turn = np.roll(turn, 1) if N > 2 else turn
    B = np.where(q % 2 == 0, math.sqrt(2), 0.0)
    B[0] = 1.0
    return np.diag(turn, -1) - np.diag(turn, 1) - np.outer(B, B), B


def rank_correction(measure: Measure, N: int, rank: int = 1) -> Float[np.ndarray, "r N"]:
    """P such that A + P^T P of `transition` is normal, padded with zero rows up to `rank`.

    Raises:
        ValueError: as `transition`, and rank below 1, or below 2 for "legt".
    """
    _check_measure(measure, N)
    least = 2 if measure == "legt" else 1
    if rank < least:
        raise ValueError(f"{measure} needs rank >= {least}, got {rank}")
    q = np.arange(N, dtype=np.float64)
    if measure == "legs":
        rows = [np.sqrt(q + 0.5)]
    elif measure == "legt":
        rows = [np.where(q % 2 == parity, np.sqrt(q + 0.5), 0.0) for parity in (1, 0)]
    else:
        rows = [transition(measure, N)[1]]
    return np.stack([*rows, *[np.zeros(N)] * (rank - len(rows))])


@lru_cache(maxsize=16)
def normal_form(N: int) -> tuple[Complex[np.ndarray, " N"], Complex[np.ndarray, "N N"]]:
    """Eigenvalues, by ascending imaginary part, and unitary eigenvectors of the normal part of HiPPO-LegS.

    Args:
        N: number of states.

    Returns:
        (eigenvalues (N,), eigenvectors (N, N)), complex128, shared between calls: do not edit. The eigenvectors are
        unique up to a phase.

    Source: S4 (arXiv:2111.00396), S5 (arXiv:2208.04933).
    """
    P = rank_correction("legs", N)
    S = transition("legs", N)[0] + P.T @ P
    im, V = np.linalg.eigh(-1j * S)
    return np.mean(np.diag(S)) + 1j * im, V


def block_normal_form(
    N: int, blocks: int = 1, *, conj_sym: bool = False
) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, "N n"]]:
    """`normal_form` of N / blocks states, repeated along the diagonal.

    Args:
        N: number of states.
        blocks: how many blocks share them equally.
        conj_sym: keep one of each conjugate pair of a block, those with the most negative imaginary part.

    Returns:
        (eigenvalues (n,), eigenvectors (N, n), block-diagonal), complex128, n = N or N // 2: do not edit.

    Raises:
        ValueError: N is not a multiple of `blocks`, or not of 2 `blocks` with `conj_sym`.

    Source: S5 (arXiv:2208.04933), section 4.3.
    """
    parts = 2 * blocks if conj_sym else blocks
    if blocks < 1 or N % parts:
        raise ValueError(f"{blocks} blocks{' of conjugate pairs' if conj_sym else ''} cannot share {N} states equally")
    eigenvalues, V = (part[..., : N // parts] for part in normal_form(N // blocks))
    return np.tile(eigenvalues, blocks), np.kron(np.eye(blocks), V)


def nplr(measure: Measure, N: int, rank: int = 1, *, B_clip: float | None = 2.0) -> System:
    """A HiPPO system as diagonal plus low rank.

    Args:
        measure: see `transition`.
        N: number of states, at least 2; n = N // 2 are kept, those with the most negative imaginary part.
        rank: rows of P; see `rank_correction`.
        B_clip: Im B is clipped to [-B_clip, B_clip]; None leaves it.

    Returns:
        A (n,), P (rank, n), B (n,), V (N, n), complex128. Eigenvectors are unique up to a phase: here the first
        component that is not 0 is real and positive, whatever the linear algebra library. (The reference takes
        the library's: usually real of either sign, for Fourier a quarter turn as well.)

    Raises:
        ValueError: as `rank_correction`, or N < 2.

    Source: S4 (arXiv:2111.00396), theorem 1.
    """
    if N < 2:
        raise ValueError(f"{measure}: N must be at least 2 to keep N // 2 states, got {N}")
    A, V = _normal_part(measure, N)
    P = rank_correction(measure, N, rank) @ V.conj()
    B = V.conj().T @ transition(measure, N)[1]
    if B_clip is not None:
        B = B.real + 1j * np.clip(B.imag, -B_clip, B_clip)
    return System(A, P, B, V)


@lru_cache(maxsize=64)
def _normal_part(measure: Measure, N: int):
    """Eigenvalues (n,) and eigenvectors (N, n) of A + P^T P, one of each conjugate pair."""
    least = 2 if measure == "legt" else 1
    P = rank_correction(measure, N, least)
    S = transition(measure, N)[0] + P.T @ P
    im, V = np.linalg.eigh(S * -1j)
    n = N // 2
    A, V = np.mean(np.diag(S)) + 1j * im[:n], V[:, :n]
    if abs(A[-1]) < _NEGLIGIBLE:  # a pair of zeros, on the first two states: eigh returns any basis of them
        V[:, -1] = 0
        V[:2, -1] = math.sqrt(0.5) * np.array([1, 1j])
    first = np.take_along_axis(V, np.argmax(np.abs(V) > 1e-9, axis=0)[None], axis=0)
    return A, V * (np.abs(first) / first)


def dplr(
    init: str = "hippo",
    N: int = 64,
    rank: int = 1,
    H: int = 1,
    *,
    key: Array,
    real_random: bool = False,
    real_scale: float = 1.0,
    imag_random: bool = False,
    imag_scale: float = 1.0,
    B_random: bool = False,
    B_init: BInit = "constant",
    B_scale: float = 1.0,
    P_scale: float = 1.0,
    normalize: bool = False,
) -> System:
    """A system given directly by its diagonal and a random low-rank part.

    Args:
        init: of Im A: "lin"/"linear", "inv"/"inverse", "inv2"/"inverse2", "quad"/"quadratic", "real", "rand"/"random",
            "legs"/"hippo" (and then B too is that of LegS, whatever `B_init` but for P).
        N: number of states; n = N // 2.
        rank: rows of P.
        H: systems S.
        key: of the random parts.
        real_random: -Re A uniform in [0, 1) instead of 1/2 (for "real": an integer below n instead of 1, 2, ...).
        real_scale, imag_scale: factors of -Re A (but for "real") and -Im A.
        imag_random: n * uniform takes the place of 0, 1, ... in the formula of -Im A.
        B_random: must be False; B_init="random" is its successor.
        B_init: "constant" (1), "random", "alternating" (1, -1), "unit-cw", "unit-ccw" (exp(-+ 2 pi i k / N)), and
            with init "legs": "legs" or "hippo", which give P of LegS.
        B_scale, P_scale: factors of B and of the random P.
        normalize: divide B by the norm of B / A.

    Returns:
        A (H, n), P (rank, H, n), B (H, n), V (H, N, n) (columns of the identity).

    Raises:
        ValueError: unknown init or B_init, N < 2, "alternating" with odd n, B_random.

    Source: S4D (arXiv:2206.11893), section 4.
    """
    if N < 2 or rank < 1:
        raise ValueError(f"{init}: need N >= 2 and rank >= 1, got N={N}, rank={rank}")
    if B_random:
        raise ValueError('B_random has no effect in the reference: pass B_init="random"')
    if B_init not in get_args(BInit):
        raise ValueError(f"B_init must be one of {get_args(BInit)}, got {B_init!r}")
    n, keys = N // 2, jax.random.split(key, 5)
    legs = init in ("legs", "hippo")
    count: Any = np.broadcast_to(np.arange(n, dtype=np.float64), (H, n))
    real: Any = np.full((H, n), 0.5)
    if real_random:
        real = jax.random.uniform(keys[0], (H, n))
    if init != "real":
        real = real_scale * real
    elif real_random:
        real = jnp.floor(real * N / 2)
    else:
        real = 1 + count
    if imag_random:
        count = n * jax.random.uniform(keys[1], (H, n))
    A = -real - 1j * imag_scale * _imaginary_part(init, N, count, keys[2])
    if legs:
        B: Any = np.broadcast_to(nplr("legs", N).B, (H, n))
    elif B_init == "random":
        B = jax.random.normal(keys[3], (H, n), complex)
    elif B_init == "alternating":
        if n % 2:
            raise ValueError(f'B_init="alternating" needs N divisible by 4, got {N}')
        B = np.broadcast_to((-1.0) ** np.arange(n), (H, n)).astype(complex)
    elif B_init in ("unit-cw", "unit-ccw"):
        sign = -1 if B_init == "unit-cw" else 1
        B = np.broadcast_to(np.exp(sign * 2j * np.pi * np.arange(n) / N), (H, n))
    elif B_init == "constant":
        B = np.ones((H, n), complex)
    else:
        raise ValueError(f'B_init={B_init!r} belongs to init "legs", got init {init!r}')
    B = B * B_scale
    if normalize:
        B = B / (2 * (abs(B / A) ** 2).sum(-1, keepdims=True)) ** 0.5
    if B_init in ("legs", "hippo"):
        P: Any = np.broadcast_to(nplr("legs", N, rank).P[:, None], (rank, H, n))
    elif P_scale == 0:
        P = np.zeros((rank, H, n), complex)
    else:
        P = P_scale * jax.random.normal(keys[4], (rank, H, n), complex)
    return System(A, P, B, np.broadcast_to(np.eye(N, n, dtype=complex), (H, N, n)))


def _imaginary_part(init: str, N: int, k, key):
    """-Im A for the states k = 0, 1, ..., shape (H, n)."""
    if init in ("rand", "random"):
        return jnp.exp(jax.random.normal(key, k.shape))
    if init == "real":
        return 0 * k
    if init in ("lin", "linear"):
        return math.pi * k
    if init in ("inv", "inverse"):
        return N / math.pi * (N / (1 + 2 * k) - 1)
    if init in ("inv2", "inverse2"):
        return N / math.pi * (N / (1 + k) - 1)
    if init in ("quad", "quadratic"):
        return (1 + 2 * k) ** 2 / math.pi
    if init in ("legs", "hippo"):
        return np.broadcast_to(-nplr("legs", N).A.imag, k.shape)
    known = ("lin", "inv", "inv2", "quad", "real", "rand", "legs")
    raise ValueError(f"init of a diagonal must be one of {known} (after 'diag-' or 'dplr-'), got {init!r}")


def combination(
    init: str | Sequence[str], N: int, rank: int, S: int, *, key: Array, **arguments: Any
) -> tuple[Complex[Array, "S n"], Complex[Array, "r S n"], Complex[Array, "S n"], Complex[Array, "S N n"]]:
    """S systems, in equal shares from several initialisers.

    Args:
        init: a measure ("legs", "legt", "fourier", "fout"), "diag-X" or "dplr-X" with X an `init` of `dplr` ("diag-X"
            has P = 0; X left out is "hippo"), a sequence of these, or one of the keys of `COMBINATIONS`: "hippo",
            "diag", "all".
        N: number of states.
        rank: rows of P.
        S: number of systems, a multiple of the number of initialisers.
        key: of the random parts.
        **arguments: of `nplr` or `dplr`, taken by every initialiser in use.

    Returns:
        `System` with A (S, n), P (rank, S, n), B (S, n), V (S, N, n), complex.

    Raises:
        ValueError: unknown init, S not a multiple, an argument that an initialiser does not take, and what
            `nplr` and `dplr` raise.
    """
    names = (COMBINATIONS.get(init) or (init,)) if isinstance(init, str) else tuple(init)
    if not names or S % len(names):
        raise ValueError(f"{S} systems cannot be shared equally among the initialisers {names}")
    keys = jax.random.split(key, len(names))
    share = S // len(names)
    parts = [_systems(name, N, rank, share, k, arguments) for name, k in zip(names, keys, strict=True)]
    A, P, B, V = zip(*parts, strict=True)
    axes = ((A, 0), (P, 1), (B, 0), (V, 0))
    return System(*(part[0] if len(parts) == 1 else jnp.concatenate(part, axis) for part, axis in axes))


def _systems(init: str, N: int, rank: int, S: int, key: Array, arguments: dict[str, Any]) -> System:
    kind, _, form = init.partition("-")
    maker = dplr if kind in ("diag", "dplr") else nplr
    if maker is nplr and init not in get_args(Measure):
        raise ValueError(
            f"init must be one of {(*get_args(Measure), *COMBINATIONS)}, 'diag-...' or 'dplr-...', got {init!r}"
        )
    options = inspect.signature(maker).parameters.values()
    allowed = {p.name for p in options if p.kind is p.KEYWORD_ONLY and p.name != "key"}
    if unknown := sorted(arguments.keys() - allowed):
        raise ValueError(f"init {init!r} takes {sorted(allowed)}, got {unknown}")
    if maker is nplr:
        A, P, B, V = nplr(init, N, rank, **arguments)  # type: ignore[arg-type]
        n = N // 2
        shapes = ((A, (S, n)), (P[:, None], (rank, S, n)), (B, (S, n)), (V, (S, N, n)))
        return System(*(np.broadcast_to(value, shape) for value, shape in shapes))
    if kind == "diag":
        arguments = {**arguments, "P_scale": 0.0}
    return dplr(form or "hippo", N, rank, S, key=key, **arguments)


def _check_measure(measure: str, N: int) -> None:
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
    if N < 1 or (measure in ("fourier", "fout") and N % 2):
        raise ValueError(f"{measure}: N must be positive{'' if measure.startswith('leg') else ' and even'}, got {N}")
