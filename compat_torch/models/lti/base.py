"""What the diagonal LTI layers share: forward, step and cache around one discrete system."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import diagonal_ssm, diagonal_ssm_step

from ...core.base import LRNN
from ...interop import torch_in_torch_out

Cache = dict[str, Array]
System = tuple[Complex[Array, " N"], Complex[Array, "N H"], Complex[Array, "H N"]]


class LTI_LRNN(LRNN):
    """h_t = A_bar h_{t-1} + B_bar x_t, y_t = Re(C h_t) + D x_t; a subclass gives the system.

    A cache is a dict of arrays: `lrnn_state` (B, N) complex, and the discrete system under the names of
    `_cache_names`, a snapshot of the parameters at allocation, as in the reference.
    """

    _cache_names: ClassVar[tuple[str, str, str]] = ("A_bar", "B_bar", "C_complex")

    d_state: int
    conj_sym: bool = False

    def _system(self) -> System:
        """(A_bar (N,), B_bar (N, H), C (H, N)), all complex."""
        raise NotImplementedError

    def _feedthrough(self) -> Float[Array, " H"] | Float[Array, "H H"]:
        """D, acting on a column: (H,) elementwise or (H, H)."""
        raise NotImplementedError

    @property
    def _n_states(self) -> int:
        return self.d_state // 2 if self.conj_sym else self.d_state

    def _check_cache(self, cache: Cache, batch: int) -> None:
        H, N = self.d_model, self._n_states
        shapes = [(batch, N)], [(N,)], [(N, H)], [(H, N)]
        self._check_entries(cache, dict(zip(("lrnn_state", *self._cache_names), shapes, strict=True)))

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"],
        integration_timesteps: None = None,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """Run the layer over whole sequences.

        Args:
            x: real floating point, shape (B, L, H).
            integration_timesteps: must be None: the step of an LTI layer is the same at every time.
            lengths: int, shape (B,): valid steps of each row; outputs past them are 0.
            inference_cache: start from its state, with its discrete system.

        Returns:
            y of shape (B, L, H) in `dtype`, or else the dtype of `x`; with a cache, `(y, cache)` where the new
            cache holds the state after the last (valid) step.

        Raises:
            ValueError: wrong rank or width, `integration_timesteps` given, or a cache that does not fit.
            TypeError: wrong dtype.
        """
        if integration_timesteps is not None:
            raise ValueError(
                f"{self._name} is time-invariant and cannot use integration_timesteps; pass None, or use a class "
                "of compat_torch.models.ltv"
            )
        x = self._input(x, "(B, L, H)")
        lengths = None if lengths is None else jnp.asarray(lengths)
        if inference_cache is None:
            (A_bar, B_bar, C), h0 = self._system(), None
        else:
            self._check_cache(inference_cache, x.shape[0])
            A_bar, B_bar, C = (inference_cache[name] for name in self._cache_names)
            h0 = inference_cache["lrnn_state"]
        y, h = diagonal_ssm(
            x, A_bar, B_bar, C, self._feedthrough(), h0, lengths=lengths, conj_sym=self.conj_sym,
            return_state=True, precision=self.precision, batch_first=True,
        )  # fmt: skip
        return y if inference_cache is None else (y, {**inference_cache, "lrnn_state": h})

    @torch_in_torch_out
    def step(self, x: Float[Array, "B H"], inference_cache: Cache) -> tuple[Float[Array, "B H"], Cache]:
        """One step: `(y, cache)` from x (B, H) and the cache before it, which is left as it is.

        Raises:
            ValueError: wrong rank or width, or a cache that does not fit. TypeError: wrong dtype.
        """
        x = self._input(x, "(B, H)")
        self._check_cache(inference_cache, x.shape[0])
        A_bar, B_bar, C = (inference_cache[name] for name in self._cache_names)
        y, h = diagonal_ssm_step(
            x, inference_cache["lrnn_state"], A_bar, B_bar, C, self._feedthrough(),
            conj_sym=self.conj_sym, precision=self.precision,
        )  # fmt: skip
        return y, {**inference_cache, "lrnn_state": h}

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """A cache with zero state and the discrete system of the parameters as they are now.

        Args:
            batch_size: rows B.
            max_seqlen: no effect: the state of a recurrence does not grow.
            dtype: no effect: the state is complex64, or complex128 for float64 parameters.

        Returns:
            `lrnn_state` (B, N) complex, and the discrete system under the reference's names.
        """
        self._check_sizes(batch_size=batch_size)
        system = self._system()
        state = jnp.zeros((batch_size, self._n_states), system[0].dtype)
        return {"lrnn_state": state, **dict(zip(self._cache_names, system, strict=True))}
