"""lrnnx's Centaurus: bundles of modes between two projections, in four connectivities."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import linear_scan, vandermonde_conv
from spyx.ops.dtypes import state_dtype, to_complex, widen
from spyx.ops.scan import check_lengths, valid_steps

from ...core.compiled import compiled
from ...core.discretization import Reference
from ...interop import torch_in_torch_out
from ...random import default_rngs
from . import _s4_diagonal as diagonal
from .base import LTI_LRNN, Cache, System

Discretization = Literal["zoh", "bilinear", "dirac", "async"]
Mode = Literal["neck", "pointwise", "pw", "s5", "dws", "full"]
Number = Float[Array, "..."] | Complex[Array, "..."]

_BLOCK = 2**21  # values of the state channels alive at once, unless one channel has more
_MIXED_NAMES = ("lrnn_state", "A_bar", "B_bar", "E", "C")


class CentaurusBase(LTI_LRNN):
    """What the four connectivities share: (B, L, H) -> (B, L, H). Build one of them, or use `Centaurus`.

    N state channels, each with M modes, all with dt = exp(log_delta) of their channel:
    h_t[n, m] = A_bar[n, m] h_{t-1}[n, m] + (B_bar x_t)[n], y_t = C Re(sum_m E[n, m] h_t[n, m]).

    Args:
        d_model: width H.
        d_state: number N of state channels.
        sub_state_dim: number M of complex modes of each.
        discretization: "zoh", "bilinear", "dirac" or "async", see the table.
        reference: which arithmetic, see the table.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: A (N, M) complex, held as real numbers (N, M, 2); E (N, M), but for the pointwise mode; log_delta (N,);
    B and C by mode. Cache: lrnn_state (B, N, M) complex, and the system as it was at allocation: A_bar (N, M), B_bar
    (N, H), E (N, M), C (H, N).

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | discretization | no effect: A_bar = exp(dt A), B_bar = dt B | honoured: "zoh", "bilinear", "dirac" as in \
`spyx.ops`, the gain of each mode (in the cache) being part of E; "async" raises |

    Without a cache, sequences are convolved with the kernels of the channels, a few channels at a time (so a NaN that
    is not padding reaches its whole row); with one, the recurrence is run. Where lrnnx 1.0.0 raises for some batch
    sizes (if it chooses its kernel strategy), this class does not; outputs past `lengths`, which it ignores, are 0.

    Raises:
        ValueError: unknown discretization or reference, "async" with reference="paper"; a size that is not a positive
            integer, or does not fit the mode; `integration_timesteps` in a call.

    Source: Centaurus (arXiv:2501.13230); lrnnx 1.0.0 `lrnnx.models.lti.centaurus`.
    """

    mode: ClassVar[str]
    _cache_names = ("A_bar_flat", "B_bar_flat", "C_flat")

    def __init__(
        self,
        d_model: int,
        d_state: int,
        sub_state_dim: int,
        discretization: Discretization = "zoh",
        *,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(d_model=d_model, d_state=d_state, sub_state_dim=sub_state_dim)
        self._check_choice("discretization", discretization, get_args(Discretization))
        if discretization == "async" and reference == "paper":
            raise ValueError(
                f'{self._name}: discretization="async" needs time-varying steps; for event streams use '
                "compat_torch.models.ltv"
            )
        self.d_model, self.d_state, self.sub_state_dim = d_model, d_state, sub_state_dim
        self.discretization: Discretization = discretization
        self._check_mode()
        self._init_parameters(default_rngs(rngs))

    def _check_mode(self) -> None:
        """Raise unless the sizes fit the mode."""

    def _init_parameters(self, rngs: nnx.Rngs) -> None:
        N, M = self.d_state, self.sub_state_dim
        A = jnp.stack([jnp.full((M,), -0.5), math.pi * jnp.arange(M) / M], -1)
        self.A = nnx.Param(jnp.broadcast_to(A, (N, M, 2)).astype(self.param_dtype), is_complex=True)
        self.log_delta = self._param(jnp.linspace(math.log(1e-3), math.log(1e-1), N))
        B, C = self._initial_projections(rngs)
        self.B, self.C = self._param(B), self._param(C)

    def _initial_projections(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        raise NotImplementedError

    def _projections(self) -> tuple[Float[Array, "S H"], Float[Array, "H S"]]:
        """B and C as matrices."""
        return widen(self.B[...]), widen(self.C[...])

    def discretize(self) -> tuple[Complex[Array, "N M"], Number, Float[Array, "H S"]]:
        """(A_bar (N, M), gamma_bar broadcasting against it, C (H, N), or (H, N M) for the pointwise mode)."""
        _, A_bar, gamma_bar = self._discrete()
        return A_bar, gamma_bar, self._projections()[1]

    def _discrete(self) -> tuple[Complex[Array, "N M"], Complex[Array, "N M"], Number]:
        """(logarithm of A_bar, A_bar, gamma_bar)."""
        dt, A = jnp.exp(widen(self.log_delta[...]))[:, None], widen(self.A[...])
        A = to_complex(A[..., 0], A[..., 1])
        if self.reference == "paper" and self.discretization in ("zoh", "bilinear"):
            one = jnp.ones((), A.dtype)
            system = diagonal.discretize(diagonal.Continuous(dt, A, one, one), self.discretization)
            return system.log, system.A, system.B
        return dt * A, jnp.exp(dt * A), dt if self.reference == "lrnnx" else jnp.ones_like(dt)

    def _gains(self) -> tuple[Complex[Array, "N M"], Complex[Array, "N M"], Number, Number]:
        """(logarithm of A_bar, A_bar, gain of the readout, gain of the input).

        gamma_bar is the gain of the readout if modes differ in it, otherwise that of the input.
        """
        log, A_bar, gamma = self._discrete()
        one = jnp.ones((1, 1), gamma.real.dtype)
        return (log, A_bar, gamma, one) if jnp.iscomplexobj(gamma) else (log, A_bar, one, gamma)

    def _channels(self) -> tuple[Number, Complex[Array, "S K"], Float[Array, "S H"], Float[Array, "H S"]]:
        """(w, a, B, C): y = C (k * (B x)) with the kernels k[s, l] = Re sum_k w[s, k] exp(l a[s, k])."""
        raise NotImplementedError

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        integration_timesteps: None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """As `LTI_LRNN`: y, or with a cache `(y, cache)`; without a cache by convolution, with one by recurrence."""
        if inference_cache is not None or integration_timesteps is not None:
            return super().__call__(x, integration_timesteps, lengths, inference_cache)
        x = jnp.swapaxes(self._input(x, "(B, L, H)"), 0, 1)
        if lengths is None:
            return jnp.swapaxes(self._convolve(x), 0, 1)
        lengths = jnp.asarray(lengths)
        check_lengths(lengths, x.shape)
        valid = valid_steps(lengths, x.shape[0], x.ndim)
        return jnp.swapaxes(jnp.where(valid, self._convolve(jnp.where(valid, x, 0)), 0), 0, 1)

    @compiled
    def _convolve(self, x: Float[Array, "L B H"]) -> Float[Array, "L B H"]:
        """The outputs for a sequence from its start, a block of channels after the other."""
        w, a, B, C = self._channels()
        size = min(len(B), max(1, _BLOCK // max(1, x[..., 0].size)))
        u = x.astype(state_dtype(x, B))
        dot = partial(jnp.einsum, precision=self.precision)

        @jax.checkpoint
        def add(y, channels):
            w, a, B, C = channels
            s = vandermonde_conv(dot("lbh,sh->lbs", u, B), w[None], a, precision=self.precision)
            return y + dot("lbs,sh->lbh", s[:, :, 0], C), None

        def blocks(v):
            v = jnp.pad(v, ((0, -len(v) % size), (0, 0)))
            return v.reshape(-1, size, v.shape[1])

        w = jnp.broadcast_to(w, a.shape)
        return jax.lax.scan(add, jnp.zeros_like(u), tuple(map(blocks, (w, a, B, C.T))))[0].astype(x.dtype)

    @property
    def _n_states(self) -> int:
        return self.d_state * self.sub_state_dim

    def _feedthrough(self) -> Any:
        return None


class CentaurusPWNeck(CentaurusBase):
    """Pointwise bottleneck: every mode has projections of its own, B (N M, H) and C (H, N M), and E does not exist.

    See `CentaurusBase`, but y_t = C Re(h_t), and the cache is lrnn_state (B, N M) complex, A_bar_flat (N M,),
    B_bar_flat (N M, H), C_flat (H, N M); a gain in which modes differ is part of C_flat.
    """

    mode = "pointwise"

    def _initial_projections(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        H, S = self.d_model, self._n_states
        return jnp.full((S, H), H**-0.5), math.sqrt(2 / S) * jax.random.normal(rngs.params(), (H, S))

    def _independent(self) -> tuple[Complex[Array, " S"], Complex[Array, " S"], Number, Float[Array, "S H"]]:
        """(logarithm of A_bar, A_bar, gain of the readout, B_bar), of S = N M states."""
        log, A_bar, outputs, inputs = self._gains()
        outputs, inputs = (jnp.broadcast_to(gain, A_bar.shape).reshape(-1) for gain in (outputs, inputs))
        return log.reshape(-1), A_bar.reshape(-1), outputs, inputs[:, None] * self._projections()[0]

    def _channels(self) -> tuple[Number, Complex[Array, "S 1"], Float[Array, "S H"], Float[Array, "H S"]]:
        log, _, outputs, B = self._independent()
        return outputs[:, None], log[:, None], B, self._projections()[1]

    def _system(self) -> System:
        _, A_bar, outputs, B = self._independent()
        return A_bar, B, self._projections()[1] * outputs


class _Mixed(CentaurusBase):
    """Modes of a channel share their input and are summed, with the weights E, before the output projection."""

    def _init_parameters(self, rngs: nnx.Rngs) -> None:
        super()._init_parameters(rngs)
        shape = (self.d_state, self.sub_state_dim)
        self.E = self._param(math.sqrt(2) * jax.random.normal(rngs.params(), shape))

    def _mixing(self) -> tuple[Complex[Array, "N M"], Float[Array, "N H"], Number, Float[Array, "H N"]]:
        """(A_bar, B_bar, E, C)."""
        _, A_bar, outputs, inputs = self._gains()
        B, C = self._projections()
        return A_bar, inputs * B, outputs * widen(self.E[...]), C

    def _channels(self) -> tuple[Number, Complex[Array, "N M"], Float[Array, "N H"], Float[Array, "H N"]]:
        _, B_bar, E, C = self._mixing()
        return E, self._discrete()[0], B_bar, C

    def _system(self) -> System:
        return self._flat(*self._mixing())

    def _flat(self, A_bar, B_bar, E, C) -> System:
        """The same system as N M states with projections of their own."""
        B = jnp.repeat(B_bar, self.sub_state_dim, axis=0)
        return A_bar.reshape(-1), B, (C[:, :, None] * E).reshape(C.shape[0], -1)

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        integration_timesteps: None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """As `CentaurusBase`."""
        if inference_cache is None:
            return super().__call__(x, integration_timesteps, lengths)
        x = self._input(x, "(B, L, H)")
        state, *system = self._checked(inference_cache, x.shape[0])
        flat = dict(zip(self._cache_names, self._flat(*system), strict=True))
        flat["lrnn_state"] = state.reshape(-1, self._n_states)
        y, flat = super().__call__(x, integration_timesteps, lengths, flat)
        return y, {**inference_cache, "lrnn_state": flat["lrnn_state"].reshape(state.shape)}

    @torch_in_torch_out
    def step(self, x: Float[Array, "B H"], inference_cache: Cache) -> tuple[Float[Array, "B H"], Cache]:
        """As `LTI_LRNN`: `(y, cache)` from x (B, H)."""
        x = self._input(x, "(B, H)")
        state, A_bar, B_bar, E, C = self._checked(inference_cache, x.shape[0])
        dot = partial(jnp.einsum, precision=self.precision)
        drive = dot("bh,nh->bn", x.astype(state_dtype(x, state)), B_bar)
        _, h = linear_scan(A_bar, jnp.broadcast_to(drive[None, ..., None], (1, *state.shape)), state)
        mixed = dot("bnm,nm->bn", h.real, E.real)
        if jnp.iscomplexobj(E):
            mixed = mixed - dot("bnm,nm->bn", h.imag, E.imag)
        y = dot("bn,hn->bh", mixed, C).astype(x.dtype)
        return y, {**inference_cache, "lrnn_state": h.astype(state.dtype)}

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """As `LTI_LRNN`: zero state, and the discrete system of the parameters as they are now."""
        self._check_sizes(batch_size=batch_size)
        system = self._mixing()
        state = jnp.zeros((batch_size, self.d_state, self.sub_state_dim), system[0].dtype)
        return dict(zip(_MIXED_NAMES, (state, *system), strict=True))

    def _checked(self, cache: Cache, batch: int) -> tuple[Array, ...]:
        """The arrays of a cache in the order of `_MIXED_NAMES`."""
        state = [(batch, self.d_state, self.sub_state_dim)]
        shapes = (state, *([array.shape] for array in jax.eval_shape(self._mixing)))
        self._check_entries(cache, dict(zip(_MIXED_NAMES, shapes, strict=True)))
        return tuple(cache[name] for name in _MIXED_NAMES)


class CentaurusNeck(_Mixed):
    """Bottleneck: dense projections, B (N, H) and C (H, N). See `CentaurusBase`."""

    mode = "neck"

    def _initial_projections(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        H, N = self.d_model, self.d_state

        def uniform(rows: int, columns: int) -> Array:
            bound = columns**-0.5
            return jax.random.uniform(rngs.params(), (rows, columns), minval=-bound, maxval=bound)

        return uniform(N, H), uniform(H, N)


class CentaurusDWS(_Mixed):
    """Depthwise: state channel n sees and feeds channel n alone, N = H; B and C (H,). See `CentaurusBase`."""

    mode = "dws"

    def _check_mode(self) -> None:
        if self.d_state != self.d_model:
            raise ValueError(
                f"CentaurusDWS has one state channel per channel: d_state must be d_model = {self.d_model}, "
                f"got {self.d_state}"
            )

    def _initial_projections(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        return jnp.ones((self.d_model,)), jnp.ones((self.d_model,))

    def _projections(self) -> tuple[Float[Array, "N H"], Float[Array, "H N"]]:
        B, C = super()._projections()
        return jnp.diag(B), jnp.diag(C)


class CentaurusFull(_Mixed):
    """Full: state channel i H + j leads from channel j to channel i, N = H^2; B and C (N,). See `CentaurusBase`."""

    mode = "full"

    def _check_mode(self) -> None:
        if self.d_state != self.d_model**2:
            raise ValueError(
                "CentaurusFull has one state channel per pair of channels: d_state must be d_model^2 = "
                f"{self.d_model**2}, got {self.d_state}"
            )

    def _initial_projections(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        H, N = self.d_model, self.d_state
        B, C = (jax.random.normal(rngs.params(), (N,)) for _ in range(2))
        return math.sqrt(2 / H) * B, math.sqrt(2 / N) * C

    def _projections(self) -> tuple[Float[Array, "N H"], Float[Array, "H N"]]:
        B, C = super()._projections()
        one = jnp.eye(self.d_model, dtype=B.dtype)
        return jnp.tile(one, (self.d_model, 1)) * B[:, None], jnp.repeat(one, self.d_model, axis=1) * C


_MODES: dict[str, type[CentaurusBase]] = {
    "neck": CentaurusNeck,
    "pointwise": CentaurusPWNeck,
    "pw": CentaurusPWNeck,
    "s5": CentaurusPWNeck,
    "dws": CentaurusDWS,
    "full": CentaurusFull,
}


class Centaurus:
    """Not a class of its own: `Centaurus(..., mode=...)` is the class of that mode.

    Args:
        d_model, d_state, sub_state_dim, discretization: as in `CentaurusBase`.
        mode: "neck" (`CentaurusNeck`), "pointwise", "pw" or "s5" (`CentaurusPWNeck`), "dws" (`CentaurusDWS`), "full"
            (`CentaurusFull`).
        **kwargs: the keyword-only arguments of `CentaurusBase`.

    Raises:
        ValueError: unknown mode, and what the class raises.
    """

    def __new__(
        cls,
        d_model: int,
        d_state: int,
        sub_state_dim: int,
        discretization: Discretization = "zoh",
        mode: Mode = "neck",
        **kwargs: Any,
    ) -> CentaurusBase:
        if mode not in _MODES:
            raise ValueError(f"Centaurus: mode must be one of {tuple(_MODES)}, got {mode!r}")
        return _MODES[mode](d_model, d_state, sub_state_dim, discretization, **kwargs)
