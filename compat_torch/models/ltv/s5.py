"""lrnnx's time-varying S5: S5 with an event mode."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import _diagonal_native, bilinear, diagonal_ssm, dirac, zoh
from spyx.ops._undifferentiated import undifferentiated
from spyx.ops.dtypes import to_complex, widen
from spyx.ops.hippo import block_normal_form

from ...core.discretization import Reference
from ...random import default_rngs
from ...utils.init import init_CV, init_log_steps, init_VinvB
from ._diagonal import varying_ssm
from ._kernels import may_fuse
from ._scanned import ScannedLTV
from .base import Cache

Discretization = Literal["zoh", "bilinear", "dirac"]
System = tuple[Complex[Array, " P"], Complex[Array, "P H"], Complex[Array, "H P"], Float[Array, " P"]]

_DISCRETIZE = {"zoh": zoh, "bilinear": bilinear, "dirac": dirac}


class S5(ScannedLTV):
    """S5 for events at uneven times: (B, L, d_model) -> (B, L, d_model).

    h_t = A_bar_t h_{t-1} + gamma B x_t, y_t = Re(C h_t) + D x_t over P complex states, dt = step_rescale exp(log_dt):

    | discretization | A_bar                           | gamma               |
    |----------------|---------------------------------|---------------------|
    | "zoh"          | exp(dt A)                       | (exp(dt A) - 1) / A |
    | "bilinear"     | (1 + dt A / 2) / (1 - dt A / 2) | dt / (1 - dt A / 2) |
    | "dirac"        | exp(dt A)                       | 1                   |

    In event mode (a call with `integration_timesteps`) the dt of A_bar is multiplied by the time since the event
    before; that of gamma is not. Complex arrays of size (B, L, P) are held in this mode only (on a CPU).

    Args:
        d_model: width H.
        d_state: number P of stored states.
        discretization: see the table.
        conj_sym: the states are one of each conjugate pair: y_t = 2 Re(C h_t) + D x_t.
        dt_min, dt_max: exp(log_dt) starts log-uniform between them, in the time unit of A.
        step_rescale: factor of dt, for another sampling rate.
        use_fast_path, device: no effect (device: None or "cpu").
        dtype: of the parameters and the output; None is float32 parameters and output in the dtype of the input.
            (The reference declares it; its parameters are float32 whatever it is.)
        reference: "lrnnx" or "paper"; for this class they are the same arithmetic.
        precision: of every matrix product, as in `jax.lax.dot`.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: A (P, 2) = [Re, Im], B (P, H, 2), C (H, P, 2), D (H,), log_dt (P,). A, B and C start from the normal
    part of HiPPO-LegS with P states, or with 2 P and `conj_sym`. Cache: lrnn_state (B, P) complex, the system as it
    was at allocation (A (P,), B_tilde (P, H), C_tilde (H, P), complex, dt (P,)), seqlen_offset (B,). A cache may name
    its state "ssm_state", as the reference does; the cache that comes back has the name of the one given.

    Where lrnnx 1.0.0 is wrong and this class is not, whatever `reference`: forward leaves the cache as it is; a second
    forward with it is a step that drops all but one input, and `integration_timesteps`; `lengths` has no effect.

    Raises:
        ValueError: unknown discretization, reference or device; a size that is not a positive integer; not
            0 < dt_min <= dt_max; step_rescale not positive.

    Source: S5 (arXiv:2208.04933), Event-SSM (arXiv:2404.18508); lrnnx 1.0.0 `lrnnx.models.ltv.S5`.
    """

    _event_mode = True

    def __init__(
        self,
        d_model: int,
        d_state: int,
        discretization: Discretization = "zoh",
        conj_sym: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        use_fast_path: bool = True,
        device: Any = None,
        dtype: DTypeLike | None = None,
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_device(device)
        self._check_sizes(d_model=d_model, d_state=d_state)
        self._check_choice("discretization", discretization, get_args(Discretization))
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"S5 needs 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")
        if not step_rescale > 0:
            raise ValueError(f"S5: step_rescale must be positive, got {step_rescale}")
        self.d_model, self.d_state, self.conj_sym = d_model, d_state, bool(conj_sym)
        self.discretization: Discretization = discretization
        self.step_rescale, self.use_fast_path = float(step_rescale), use_fast_path
        self._init_parameters(default_rngs(rngs), dt_min, dt_max)

    def _init_parameters(self, rngs: nnx.Rngs, dt_min: float, dt_max: float) -> None:
        H, P = self.d_model, self.d_state
        size = 2 * P if self.conj_sym else P
        eigenvalues, V = block_normal_form(size, conj_sym=self.conj_sym)
        self.A = self._param(np.stack([np.real(eigenvalues), np.imag(eigenvalues)], -1))
        self.B = self._param(init_VinvB(V.conj().T, size, H, rngs=rngs))
        self.C = self._param(init_CV(V, size, H, rngs=rngs))
        self.D = self._param(0.1 * jax.random.normal(rngs.params(), (H,)))
        self.log_dt = self._param(init_log_steps(P, dt_min, dt_max, rngs=rngs))

    def _system(self) -> System:
        """(A, B, C, dt): continuous."""
        A, B, C = (to_complex(p[..., 0], p[..., 1]) for p in (self.A, self.B, self.C))
        return A, B, C, self.step_rescale * jnp.exp(widen(self.log_dt[...]))

    def _zero_state(self, batch_size: int, dtype: DTypeLike) -> Cache:
        system = self._system()
        state = jnp.zeros((batch_size, self.d_state), system[0].dtype)
        return {"lrnn_state": state, **dict(zip(("A", "B_tilde", "C_tilde", "dt"), system, strict=True))}

    def _checked(self, cache: Cache, batch: int) -> Cache:
        if isinstance(cache, dict) and _state_name(cache) == "ssm_state":
            renamed = {"lrnn_state" if name == "ssm_state" else name: leaf for name, leaf in cache.items()}
            super()._checked(renamed, batch)
            return cache
        return super()._checked(cache, batch)

    def _scan(
        self,
        x: Float[Array, "L B H"],
        timesteps: Float[Array, "L B"] | None,
        lengths: Int[Array, " B"] | None,
        state: Cache | None,
    ) -> tuple[Float[Array, "L B H"], Cache]:
        if state is None:
            (A, B, C, dt), h0 = self._system(), None
            state = {}
        else:
            A, B, C, dt = (state[name] for name in ("A", "B_tilde", "C_tilde", "dt"))
            h0 = state[_state_name(state)]
        discretize = _DISCRETIZE[self.discretization]
        A_bar, gamma = discretize(A, dt)
        if timesteps is not None:
            A_bar, _ = discretize(A, timesteps[..., None] * dt)
        values = x, A_bar, jnp.broadcast_to(gamma, dt.shape), B, C, self.D[...], h0
        compute = _compute if may_fuse(x.shape[0]) else _in_jax
        y, h = compute((self.conj_sym, self.precision), values, lengths)
        return y, {**state, _state_name(state): h}


def _in_jax(how, values, lengths):
    conj_sym, precision = how
    x, A_bar, gamma, B, C, D, h0 = values
    B = gamma[:, None] * B
    if A_bar.ndim > 1:
        return varying_ssm(x, A_bar, B, C, D, h0, lengths=lengths, conj_sym=conj_sym, precision=precision)
    y, h = diagonal_ssm(
        jnp.swapaxes(x, 0, 1), A_bar, B, C, D, h0, lengths=lengths, conj_sym=conj_sym, return_state=True,
        precision=precision, batch_first=True,
    )  # fmt: skip
    return jnp.swapaxes(y, 0, 1), h


def _in_kernel(how, values, lengths):
    x, A_bar, gamma, B, C, D, h0 = values
    if A_bar.ndim == 1 or not _diagonal_native.fits(values):
        return _in_jax(how, values, lengths)
    gamma = jax.lax.optimization_barrier(gamma)  # else XLA computes it again for every element of B
    W, V = gamma[:, None] * B, (2 * C.T if how[0] else C.T)
    h0 = jnp.zeros((x.shape[1], len(gamma)), W.dtype) if h0 is None else h0
    valid = None if lengths is None else jnp.arange(x.shape[0])[:, None, None, None] < lengths[:, None, None]
    parts = jnp.stack([W.real, W.imag]), jnp.stack([V.real, -V.imag]), D, jnp.stack([h0.real, h0.imag], 1)
    y, h, _ = _diagonal_native.forward(jnp.swapaxes(x, 0, 1), A_bar, *parts, None, valid, batch_first=True)
    return jnp.swapaxes(y, 0, 1), to_complex(h[:, 0], h[:, 1])


_compute = undifferentiated("diagonal_layer", _in_jax, _in_kernel)


def _state_name(cache: Cache) -> str:
    return "ssm_state" if "ssm_state" in cache and "lrnn_state" not in cache else "lrnn_state"
