"""The single-input systems inside S4 and S4D, with their parameters: kernel, state, step.

Symbols: H channels, c rows of C, S = n_ssm systems, n states (one of each conjugate pair), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Complex, Float

from spyx.ops import fft_conv
from spyx.ops.dtypes import to_complex, widen

from ...core.compiled import compiled
from ...core.variables import Buffer, register
from . import _s4_diagonal as diagonal
from . import _s4_dplr as dplr
from . import _s4_powers as powers
from ._s4_parameters import Transform, check_transform, positive, stored

Cache = dict[str, Array]
Rates = float | Mapping[str, float] | None
Register = Callable[[str, Any], nnx.Variable]
Dropout = Callable[[Array], Array]


def registrar(owner: str, lr: Rates, wd: Rates, lr_groups: tuple[str, ...], param_dtype: DTypeLike) -> Register:
    """What makes a variable of a group ("dt", "A", "B", "C") and its value, with the learning rate and decay it has.

    Args:
        owner: name of the layer, for messages.
        lr, wd: for all groups, or by group; C has no weight decay of its own.
        lr_groups: the groups that have a learning rate of their own.
        param_dtype: of the variable.

    Raises:
        ValueError: a group of another name.
    """
    groups = {"lr": lr_groups, "wd": ("dt", "A", "B")}
    for name, rates in (("lr", lr), ("wd", wd)):
        if isinstance(rates, Mapping) and (unknown := sorted(rates.keys() - set(groups[name]))):
            *first, last = (repr(group) for group in groups[name])
            raise ValueError(f"{owner}: {name} may name {', '.join(first)} and {last}, got {unknown}")

    def of(name: str, rates: Rates, group: str) -> float | None:
        if group not in groups[name]:
            return None
        return rates.get(group) if isinstance(rates, Mapping) else rates

    def make(group: str, value: Any) -> nnx.Variable:
        value, rate, decay = jnp.asarray(value, param_dtype), of("lr", lr, group), of("wd", wd, group)
        return nnx.Param(value) if rate is None and decay is None else register(value, rate, decay)

    return make


class Storage(NamedTuple):
    """How the parameters of a system are stored; see `S4D`. `bandlimit` is that of `S4Block`."""

    dt_transform: Transform
    dt_fast: bool
    real_transform: Transform
    imag_transform: Transform
    is_real: bool
    bandlimit: float | None = None


class Kernel(nnx.Module):
    """What a layer needs of its systems; time-major, inputs in float32 or wider."""

    def kernel(self, L: int, rate: float, l_max: int | None) -> Float[Array, "c H L"]:
        """The convolution kernel of the first L steps; `l_max` is the longest one ever asked for, if known."""
        raise NotImplementedError

    def outputs(self, u: Float[Array, "L B H"], rate: float, l_max: int | None) -> Float[Array, "L B c H"]:
        """The convolution with all of that kernel."""
        return fft_conv(u, jnp.moveaxis(self.kernel(u.shape[0], rate, l_max), -1, 0))

    def zero_state(self, batch_size: int) -> Cache:
        """The cache before the first step; `lrnn_state` is the state."""
        raise NotImplementedError

    def with_state(self, state: Array) -> Cache:
        """A cache around a state that the caller brings."""
        return {**self.zero_state(state.shape[0] if state.ndim else 0), "lrnn_state": state}

    def respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, drop: Dropout | None
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        """Outputs and cache of the recurrence from a state; u is 0 where not valid, and y may be anything there."""
        raise NotImplementedError

    def update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        """One step of the recurrence, from a cache as it is or in its compact form; the new cache has the same form."""
        raise NotImplementedError

    def compact(self, cache: Cache) -> Cache:
        """A cache of half the size, where states lie in conjugate pairs."""
        return cache

    def restored(self, cache: Cache) -> Cache:
        """The inverse of `compact`."""
        return cache


class DiagonalKernel(Kernel):
    """Diagonal systems; a subclass gives `continuous`."""

    owner: str
    disc: diagonal.Disc
    precision: Any

    def continuous(self, rate: float = 1.0) -> diagonal.Continuous:
        """The systems as the parameters are now."""
        raise NotImplementedError

    @compiled
    def kernel(self, L: int, rate: float, l_max: int | None = None) -> Float[Array, "c H L"]:
        return diagonal.kernel(self.continuous(rate), self.disc, L, self.precision)

    @compiled
    def outputs(self, u: Float[Array, "L B H"], rate: float, l_max: int | None = None) -> Float[Array, "L B c H"]:
        if self.disc == "dss":
            return super().outputs(u, rate, l_max)
        return diagonal.outputs(diagonal.discretize(self.continuous(rate), self.disc), u, self.precision)

    @compiled
    def zero_state(self, batch_size: int) -> Cache:
        system = self._discrete()
        return {"lrnn_state": jnp.zeros((batch_size, *system.A.shape), system.A.dtype)}

    @compiled
    def respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, drop: Dropout | None
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        system, h, L = self._discrete(), cache["lrnn_state"], u.shape[0]
        free = jnp.moveaxis(diagonal.free_response(system, h, L, self.precision), -1, 0)
        lengths = None if valid is None else jnp.sum(valid, 0)
        after = diagonal.final_state(system, jnp.moveaxis(u, 0, -1), h, lengths, self.precision)
        y = self.outputs(u, 1.0) if drop is None else fft_conv(u, jnp.moveaxis(drop(self.kernel(L, 1.0)), -1, 0))
        return y + free, {**cache, "lrnn_state": after.astype(h.dtype)}

    @compiled
    def update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        h = cache["lrnn_state"]
        y, after = diagonal.step(self._discrete(), u, h)
        return y, {**cache, "lrnn_state": after.astype(h.dtype)}

    def _discrete(self) -> diagonal.Discrete:
        if self.disc == "dss":
            raise ValueError(
                f'{self.owner}: disc="dss" normalises its kernel over the whole sequence: no step, state or cache'
            )
        return diagonal.discretize(self.continuous(), self.disc)


class SSMParameters(Kernel):
    """inv_dt (H, 1) or (H, n), C (c, H, n, 2), B (1, S, n, 2), A_real, A_imag (S, n); is_real: no A_imag, no last axis.

    Args:
        owner: name of the layer, for messages.
        storage: how they are stored.
        inv_dt, A, B, C: their initial values, complex but for inv_dt, (S, n) for A and B, (c, H, n) for C.
        register: what makes the variables.
        precision: of every matrix product.
    """

    inv_dt: nnx.Variable
    C: nnx.Variable
    B: nnx.Variable
    A_real: nnx.Variable
    A_imag: nnx.Variable

    def __init__(self, owner: str, storage: Storage, inv_dt, A, B, C, register: Register, precision: Any):
        self.owner, self.storage, self.precision = owner, storage, precision
        check_transform("real_transform", storage.real_transform, -A.real)
        check_transform("imag_transform", storage.imag_transform, 0.0 * A.real if storage.is_real else -A.imag)
        self._repeats = C.shape[-2] // A.shape[-2]
        self.inv_dt = register("dt", inv_dt)
        self.C = register("C", self._parts(C))
        self.B = register("B", self._parts(B)[None])
        self.A_real = register("A", stored(-A.real, storage.real_transform))
        if not storage.is_real:
            self.A_imag = register("A", stored(-A.imag, storage.imag_transform))

    def _parts(self, value) -> Array:
        return value.real if self.storage.is_real else jnp.stack([value.real, value.imag], -1)

    def _system(self, rate: float) -> tuple[Array, Array, Array, Array]:
        """dt (H, 1) or (H, n), A, B (H, n), C (c, H, n), as the parameters are now."""
        how, inv_dt = self.storage, widen(self.inv_dt[...])
        dt = rate * positive(jnp.sinh(inv_dt) if how.dt_fast else inv_dt, how.dt_transform)
        A: Array = -positive(widen(self.A_real[...]), how.real_transform)
        B, C = widen(self.B[0]), widen(self.C[...])
        if not how.is_real:
            A = to_complex(A, -positive(widen(self.A_imag[...]), how.imag_transform))
            B, C = to_complex(B[..., 0], B[..., 1]), to_complex(C[..., 0], C[..., 1])
        return dt, self._tile(A), self._tile(B), C

    def _tile(self, value: Array) -> Array:
        """The n_ssm systems (..., S, n), repeated for all channels."""
        return jnp.tile(value, (1,) * (value.ndim - 2) + (self._repeats, 1))

    def _limited(self, C: Array, A: Array, dt: Array, rate: float) -> Array:
        """C without the states that turn faster than the band limit."""
        if self.storage.bandlimit is None:
            return C
        cycles = dt / rate * jnp.abs(A.imag) / (2 * math.pi)
        return jnp.where(cycles < 0.5 * self.storage.bandlimit, C, 0)


class SSMKernelDiag(SSMParameters, DiagonalKernel):
    """Diagonal systems with the parameters of `SSMParameters`."""

    def __init__(self, owner: str, storage: Storage, disc: diagonal.Disc, inv_dt, A, B, C, register, precision):
        super().__init__(owner, storage, inv_dt, A, B, C, register, precision)
        self.disc = disc

    def continuous(self, rate: float = 1.0) -> diagonal.Continuous:
        dt, A, B, C = self._system(rate)
        return diagonal.Continuous(dt, A, B, self._limited(C, A, dt, rate))


class SSMKernelDPLR(SSMParameters):
    """Diagonal plus low-rank systems: also P (r, S, n, 2), and the buffer l_kernel.

    Where l_kernel is 0, the variable C is the readout; where it is M > 0, C~ = C (I - A_bar^M).
    """

    P: nnx.Variable

    def __init__(self, owner: str, storage: Storage, inv_dt, A, P, B, C, l_max: int | None, register, precision):
        super().__init__(owner, storage, inv_dt, A, B, C, register, precision)
        self.P = register("A", jnp.stack([P.real, P.imag], -1))
        self.l_kernel = Buffer(jnp.zeros((), jnp.int32))
        if l_max is not None and not storage.is_real:
            self.set_length(l_max)

    def set_length(self, M: int) -> None:
        """See `S4.set_kernel_length`."""
        if isinstance(M, bool) or not isinstance(M, int) or not 0 <= M <= 2**24:
            raise ValueError(f"{self.owner}: M must be an integer from 0 to {2**24}, got {M!r}")
        if self.storage.is_real and M:
            raise ValueError(f"{self.owner}: with is_real=True C~ is not real, so M must be 0, got {M}")
        system, C = self._stored()
        C = self._relength(system, C, M)
        self.C.set_value(self._parts(C).astype(self.C.get_value().dtype))
        self.l_kernel.set_value(jnp.asarray(M, jnp.int32))

    def _stored(self, rate: float = 1.0) -> tuple[dplr.Continuous, Complex[Array, "c H n"]]:
        dt, A, B, C = self._system(rate)
        A, B, C = (to_complex(value.real, value.imag) for value in (A, B, C))
        P = widen(self.P[...])
        return dplr.Continuous(dt, A, B, self._tile(to_complex(P[..., 0], P[..., 1]))), C

    def continuous(self, rate: float = 1.0) -> tuple[dplr.Continuous, Complex[Array, "c H n"]]:
        """The systems as the parameters are now, and C or C~ as it is stored, within the band limit."""
        system, C = self._stored(rate)
        return system, self._limited(C, system.A, system.dt, rate)

    @compiled
    def readout(self, M: int = 0) -> Complex[Array, "c H n"]:
        """C (I - A_bar^M), or C for M = 0."""
        return self._relength(*self.continuous(), M)

    def _relength(self, system: dplr.Continuous, C: Array, M: int) -> Complex[Array, "c H n"]:
        return dplr.relength(system, C, self.l_kernel[...], M, self.precision)

    @compiled
    def kernel(self, L: int, rate: float, l_max: int | None) -> Float[Array, "c H L"]:
        if rate != 1:
            return self._kernel_from_length(L, rate, l_max)
        system, C = self.continuous()
        from_powers = partial(powers.kernel, powers.transition(*system), L=L, precision=self.precision)
        return jax.lax.cond(self.l_kernel[...] == 0, from_powers, lambda _: self._kernel_from_length(L, rate, l_max), C)

    def _kernel_from_length(self, L: int, rate: float, l_max: int | None) -> Float[Array, "c H L"]:
        """The kernel by the generating function truncated at M steps, whatever l_kernel is."""
        steps = round(rate * L)
        M = max(l_max or steps, steps, 1)
        system, _ = self.continuous(rate)
        return dplr.kernel(system, self.readout(M), max(L, round(M / rate)), L, self.precision)

    @compiled
    def outputs(self, u: Float[Array, "L B H"], rate: float, l_max: int | None) -> Float[Array, "L B c H"]:
        if rate != 1:
            return super().outputs(u, rate, l_max)
        system, C = self.continuous()

        def by_convolution(_, u):
            return fft_conv(u, jnp.moveaxis(self._kernel_from_length(u.shape[0], rate, l_max), -1, 0))

        from_steps = partial(powers.outputs, powers.transition(*system), precision=self.precision)
        return jax.lax.cond(self.l_kernel[...] == 0, from_steps, by_convolution, C, u)

    @compiled
    def zero_state(self, batch_size: int) -> Cache:
        C = self.readout()
        return {"lrnn_state": jnp.zeros((batch_size, *C.shape[1:-1], 2 * C.shape[-1]), C.dtype), "dC": C}

    def with_state(self, state: Array) -> Cache:
        pairs_halved = state.shape[-1:] == self.C.shape[2:3]
        return super().with_state(whole(state) if pairs_halved else state)

    @compiled
    def respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, drop: Dropout | None
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        h = cache["lrnn_state"]
        y, after = self.run(u, half(h), cache["dC"], valid, drop)
        return y, {**cache, "lrnn_state": whole(after).astype(h.dtype)}

    def run(
        self,
        u: Float[Array, "L B H"],
        h: Complex[Array, "B H n"],
        C: Complex[Array, "c H n"],
        valid: Bool[Array, "L B"] | None,
        drop: Dropout | None,
    ) -> tuple[Float[Array, "L B c H"], Complex[Array, "B H n"]]:
        """Outputs, and the state after the last valid step."""
        if drop is not None:
            raise ValueError(f"{self.owner}: drop_kernel in training mode needs a call without state and cache")
        valid = jnp.ones(u.shape[:2], bool) if valid is None else valid
        return dplr.run(powers.transition(*self.continuous()[0]), C, u, h, valid)

    @compiled
    def update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        state = self.compact(cache)["lrnn_state"]
        after = powers.advance(powers.transition(*self.continuous()[0]), state, u).astype(state.dtype)
        y, compact = dplr.observe(cache["dC"], after), {**cache, "lrnn_state": after}
        return y, compact if state is cache["lrnn_state"] else self.restored(compact)

    def compact(self, cache: Cache) -> Cache:
        state = cache["lrnn_state"]
        return cache if state.shape[-1] == self.C.shape[2] else {**cache, "lrnn_state": half(state)}

    def restored(self, cache: Cache) -> Cache:
        return {**cache, "lrnn_state": whole(cache["lrnn_state"])}


def half(h: Complex[Array, "... N"]) -> Complex[Array, "... n"]:
    """One of each conjugate pair; from a state that is not in pairs, the pairs with the same outputs."""
    first, second = jnp.split(h, 2, -1)
    return (first + jnp.conj(second)) / 2


def whole(h: Complex[Array, "... n"]) -> Complex[Array, "... N"]:
    """The states and their conjugates."""
    return jnp.concatenate([h, jnp.conj(h)], -1)
