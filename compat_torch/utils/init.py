"""lrnnx's initialisers of S5."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Complex, Float

from spyx.ops.hippo import normal_form, rank_correction, transition

from ..random import default_rngs


def make_HiPPO(N: int) -> Float[np.ndarray, "N N"]:  # noqa: N802
    """The state matrix of HiPPO-LegS, float64; see `spyx.ops.hippo.transition`."""
    return transition("legs", N)[0]


def make_NPLR_HiPPO(N: int) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:  # noqa: N802
    """(A (N, N), P (N,), B (N,)) of HiPPO-LegS: A + P P^T is normal."""
    A, B = transition("legs", N)
    return A, rank_correction("legs", N)[0], B


def make_DPLR_HiPPO(  # noqa: N802
    N: int,
) -> tuple[
    Complex[np.ndarray, " N"],
    Complex[np.ndarray, " N"],
    Complex[np.ndarray, " N"],
    Complex[np.ndarray, "N N"],
    Float[np.ndarray, " N"],
]:
    """HiPPO-LegS in the basis V of its normal part: A = V (diag(Lambda) - P P^*) V^*.

    Returns:
        (Lambda (N,), by ascending imaginary part, P (N,) = V^* P_orig, B (N,) = V^* B_orig, V (N, N), B_orig (N,)).
        The columns of V are unique up to a phase.

    Source: S4 (arXiv:2111.00396), S5 (arXiv:2208.04933).
    """
    _, P, B = make_NPLR_HiPPO(N)
    Lambda, V = normal_form(N)
    return Lambda.copy(), V.conj().T @ P, V.conj().T @ B, V.copy(), B


def init_log_steps(
    P: int, dt_min: float = 0.001, dt_max: float = 0.1, *, rngs: nnx.Rngs | None = None
) -> Float[Array, " P"]:
    """log(dt), shape (P,), uniform between log(dt_min) and log(dt_max).

    Args:
        P: how many.
        dt_min, dt_max: 0 < dt_min <= dt_max.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Raises:
        ValueError: not 0 < dt_min <= dt_max.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"init_log_steps needs 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")
    key = default_rngs(rngs).params()
    return jax.random.uniform(key, (P,), minval=math.log(dt_min), maxval=math.log(dt_max))


def init_VinvB(  # noqa: N802
    Vinv: Complex[np.ndarray, "P local_P"],
    local_P: int,
    H: int,
    *,
    draw: Initializer | None = None,
    rngs: nnx.Rngs | None = None,
) -> Float[Array, "P H 2"]:
    """Vinv B for real B (local_P, H); (re, im) on the last axis.

    Args:
        Vinv: inverse of the eigenvectors, shape (P, local_P).
        local_P: states: P, or 2 P with one of each conjugate pair kept.
        H: width of the input.
        draw: of B, called with a key and its shape; None is normal with variance 1 / local_P.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Raises:
        ValueError: Vinv has not `local_P` columns.
    """
    _check("init_VinvB: Vinv", np.shape(Vinv), (-1, local_P))
    B = _draw(draw, (local_P, H), local_P, rngs)
    return _parts(jnp.matmul(jnp.asarray(Vinv), B, precision="highest"))


def init_CV(  # noqa: N802
    V: Complex[np.ndarray, "local_P P"],
    local_P: int,
    H: int,
    *,
    draw: Initializer | None = None,
    rngs: nnx.Rngs | None = None,
) -> Float[Array, "H P 2"]:
    """C V for complex C (H, local_P); (re, im) on the last axis.

    Args:
        V: eigenvectors, shape (local_P, P).
        local_P: states: P, or 2 P with one of each conjugate pair kept.
        H: width of the output.
        draw: of C as (H, local_P, 2), called with a key and this shape; None is normal with variance 1 / local_P.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Raises:
        ValueError: V has not `local_P` rows.
    """
    _check("init_CV: V", np.shape(V), (local_P, -1))
    C = _draw(draw, (H, local_P, 2), local_P, rngs)
    return _parts(jnp.matmul(jax.lax.complex(C[..., 0], C[..., 1]), jnp.asarray(V), precision="highest"))


def _draw(draw: Initializer | None, shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs | None) -> Array:
    draw = draw or jax.nn.initializers.normal(fan_in**-0.5)
    return draw(default_rngs(rngs).params(), shape)


def _check(what: str, shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    if len(shape) != 2 or any(b not in (-1, a) for a, b in zip(shape, expected, strict=True)):
        raise ValueError(f"{what} must have shape {str(expected).replace('-1', 'P')}, got {shape}")


def _parts(value: Complex[Array, "..."]) -> Float[Array, "... 2"]:
    return jnp.stack([jnp.real(value), jnp.imag(value)], -1)
