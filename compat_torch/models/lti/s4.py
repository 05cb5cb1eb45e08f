"""lrnnx's S4: diagonal plus low-rank state matrices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from spyx.ops.dtypes import to_complex, widen

from ...core.variables import Buffer
from . import _s4_dplr as dplr
from ._s4_layer import Cache, Rates, S4Layer


class S4(S4Layer):
    """S4: a diagonal plus low-rank system per channel, (B, H, L) -> ((B, H, L), state).

    Arguments, errors and the table of differences are those of `S4D`, without `disc` (the method is always the
    bilinear one) and with `rank` in use. Parameters are those of S4D, and P (rank, n_ssm, n, 2) and the buffer
    layer.kernel.l_kernel.

    C and C~. Where l_kernel is 0, C is the readout. Where it is M > 0, C holds C~ = C (I - A_bar^M), from which
    the convolution kernel of M steps is computed directly, and which is what the optimizer moves. The reference
    rewrites C so in its first forward; here the constructor does, when `l_max` is given (M = l_max), and
    `set_kernel_length(M)` on request. A call changes nothing: where its kernel needs another M, C is converted
    on the fly, at a cost of O(n^3) a channel. Checkpoints of the reference load and save in either state.

    Cache: lrnn_state (B, H, 2 n), the states and their conjugates, and dC (c, H, n), the readout C. A step
    costs O(rank n) a channel. A call with a state or cache runs step by step in one compiled loop.

    Raises:
        ValueError: as S4D. A call in training mode with drop_kernel and a state or cache raises, too.

    Source: S4 (arXiv:2111.00396); lrnnx 1.0.0 `lrnnx.models.lti.S4`.
    """

    _diagonal = False

    def _register_system(self, inv_dt, A, P, B, C, lr: Rates, wd: Rates) -> None:
        super()._register_system(inv_dt, A, P, B, C, lr, wd)
        self.layer.kernel.l_kernel = Buffer(jnp.zeros((), jnp.int32))
        if self.l_max is not None and not self.is_real:
            self.set_kernel_length(self.l_max)

    def set_kernel_length(self, M: int) -> None:
        """Convert C to kernels of M steps, M = 0 to the readout itself; the outputs stay the same.

        Raises:
            ValueError: M is not an integer from 0 to 2^24, or not 0 for is_real, whose C~ is not real.
        """
        if isinstance(M, bool) or not isinstance(M, int) or not 0 <= M <= 2**24:
            raise ValueError(f"{self._name}: M must be an integer from 0 to {2**24}, got {M!r}")
        if self.is_real and M:
            raise ValueError(f"{self._name}: with is_real=True C~ is not real, so M must be 0, got {M}")
        C = self._readout(M)
        self.C.set_value((C.real if self.is_real else jnp.stack([C.real, C.imag], -1)).astype(self.param_dtype))
        self.layer.kernel.l_kernel.set_value(jnp.asarray(M, jnp.int32))

    def _continuous(self, rate: float = 1.0) -> tuple[dplr.Continuous, Complex[Array, "c H n"]]:
        dt, A, B, C = self._system(rate)
        A, B, C = (to_complex(value.real, value.imag) for value in (A, B, C))
        P = widen(self.P[...])
        return dplr.Continuous(dt, A, B, self._tile(to_complex(P[..., 0], P[..., 1]))), C

    def _readout(self, M: int) -> Complex[Array, "c H n"]:
        """C (I - A_bar^M), or C for M = 0."""
        system, C = self._continuous()
        return dplr.relength(system, C, self.layer.kernel.l_kernel[...], M, self.precision)

    def _kernel(self, L: int, rate: float) -> Float[Array, "c H L"]:
        steps = round(rate * L)
        M = max(self.l_max or steps, steps, 1)
        system, _ = self._continuous(rate)
        return dplr.kernel(system, self._readout(M), max(L, round(M / rate)), L, self.precision)

    def _zero_state(self, batch_size: int) -> Cache:
        C = self._readout(0)
        return {"lrnn_state": jnp.zeros((batch_size, self.d_inner, 2 * C.shape[-1]), C.dtype), "dC": C}

    def _with_state(self, state: Array) -> Cache:
        return super()._with_state(_whole(state) if state.shape[-1:] == (self.d_state // 2,) else state)

    def _respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, rngs: Any
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        if self.drop_kernel.rate > 0 and not self.drop_kernel.deterministic:
            raise ValueError(f"{self._name}: drop_kernel in training mode needs a call without state and cache")
        valid = jnp.ones(u.shape[:2], bool) if valid is None else valid
        stepper = dplr.stepper(self._continuous()[0])
        h = cache["lrnn_state"]
        y, after = dplr.run(stepper, cache["dC"], u, _half(h), valid)
        return y, {**cache, "lrnn_state": _whole(after).astype(h.dtype)}

    def _update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        h = cache["lrnn_state"]
        after = dplr.advance(dplr.stepper(self._continuous()[0]), _half(h), u)
        return dplr.observe(cache["dC"], after), {**cache, "lrnn_state": _whole(after).astype(h.dtype)}


def _half(h: Complex[Array, "B H N"]) -> Complex[Array, "B H n"]:
    """One of each conjugate pair; from a state that is not in pairs, the pairs with the same outputs."""
    first, second = jnp.split(h, 2, -1)
    return (first + jnp.conj(second)) / 2


def _whole(h: Complex[Array, "B H n"]) -> Complex[Array, "B H N"]:
    return jnp.concatenate([h, jnp.conj(h)], -1)
