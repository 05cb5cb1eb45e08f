"""lindermanlab/S5's layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from spyx.ops import bilinear, diagonal_ssm, zoh
from spyx.ops.dtypes import to_complex, widen
from spyx.ops.hippo import block_normal_form

from ...interop import torch_in_torch_out
from ...random import default_rngs
from ...utils.init import init_CV, init_log_steps, init_VinvB
from ..lti.base import LTI_LRNN, Cache, System

CInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
Discretization = Literal["zoh", "bilinear"]

_DISCRETIZE = {"zoh": zoh, "bilinear": bilinear}
_LEAST_DECAY = 1e-4

_DRAWS = {
    "trunc_standard_normal": initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0),
    "lecun_normal": initializers.lecun_normal(),
}


class S5SSM(LTI_LRNN):
    """S5 as published: (B, L, H) -> (B, L, H), or (L, H) -> (L, H) as the reference has it.

    h_t = A_bar h_{t-1} + B_bar x_t, y_t = Re(C h_t) + D x_t, A_bar and B_bar by `discretization` from Lambda, B and the
    step sizes step_rescale exp(log_step). With `bidirectional`, y_t = Re(C1 h_t + C2 g_t) + D x_t, where
    g_t = A_bar g_{t+1} + B_bar x_t; with `conj_sym` the real part counts twice.

    Args:
        H: width.
        P: number of states before `conj_sym` halves them: ssm_size_base of the reference's training script. Only
            together with `Lambda_re_init` it is, as in the reference's class, the number n of stored states.
        C_init: C starts from "trunc_standard_normal" (variance 1 / P) or "lecun_normal" (variance 1 / (H P)) in the
            HiPPO basis, or from "complex_normal" (real and imaginary part of variance 1/2) in the diagonal one.
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: exp(log_step) starts log-uniform between them, in the time unit of Lambda.
        conj_sym: the stored states are one of each conjugate pair.
        clip_eigs: Re Lambda is at most -1e-4 where it is used (what is stored is not touched).
        bidirectional: see above. There is no step and no cache.
        step_rescale: factor of the step sizes, for another sampling rate.
        blocks: HiPPO blocks of P / blocks states that Lambda starts from.
        Lambda_re_init, Lambda_im_init, V, Vinv: another start: eigenvalues (n,), (n,), basis (N, n), its inverse
            (n, N), where N = 2 n with `conj_sym`, else n. All four or none.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters: Lambda_re, Lambda_im (n,), B (n, H, 2), C (H, n, 2), D (H,), log_step (n, 1); with `bidirectional` in
    place of C: C1, C2 (H, n, 2), or for "complex_normal" one C (H, 2 n, 2). Cache: lrnn_state (B, n) complex, and
    A_bar (n,), B_bar (n, H), C_complex (H, n) as they were at allocation.

    Raises:
        ValueError: unknown C_init or discretization; a size that is not a positive integer; P that the blocks (and
            pairs) cannot share; not 0 < dt_min <= dt_max; step_rescale not positive; initial values of other shapes,
            some of them only, or together with blocks.

    Source: S5 (arXiv:2208.04933); lindermanlab/S5 `s5.ssm.S5SSM`.
    """

    C: nnx.Param
    C1: nnx.Param
    C2: nnx.Param

    def __init__(
        self,
        H: int,
        P: int,
        C_init: CInit = "trunc_standard_normal",
        discretization: Discretization = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        conj_sym: bool = True,
        clip_eigs: bool = False,
        bidirectional: bool = False,
        step_rescale: float = 1.0,
        *,
        blocks: int = 1,
        Lambda_re_init: ArrayLike | None = None,
        Lambda_im_init: ArrayLike | None = None,
        V: ArrayLike | None = None,
        Vinv: ArrayLike | None = None,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        self._check_sizes(H=H, P=P, blocks=blocks)
        self._check_choice("C_init", C_init, get_args(CInit))
        self._check_choice("discretization", discretization, get_args(Discretization))
        if not step_rescale > 0:
            raise ValueError(f"S5SSM: step_rescale must be positive, got {step_rescale}")
        given = {"Lambda_re_init": Lambda_re_init, "Lambda_im_init": Lambda_im_init, "V": V, "Vinv": Vinv}
        own = all(value is not None for value in given.values())
        if not own and any(value is not None for value in given.values()):
            missing = [name for name, value in given.items() if value is None]
            raise ValueError(f"S5SSM: {tuple(given)} go together, got no {missing}")
        if own and blocks != 1:
            raise ValueError(f"S5SSM: with Lambda_re_init the blocks are in V, so blocks must be 1, got {blocks}")
        self.d_model, self.d_state = H, 2 * P if own and conj_sym else P
        self.conj_sym, self.clip_eigs, self.bidirectional = bool(conj_sym), bool(clip_eigs), bool(bidirectional)
        self.C_init: CInit = C_init
        self.discretization: Discretization = discretization
        self.step_rescale = float(step_rescale)
        if own:
            start = {name: np.asarray(value) for name, value in given.items()}
            self._check_start(start)
        else:
            eigenvalues, basis = block_normal_form(P, blocks, conj_sym=self.conj_sym)
            start = dict(zip(given, (np.real(eigenvalues), np.imag(eigenvalues), basis, basis.conj().T), strict=True))
        self._init_parameters(default_rngs(rngs), start, dt_min, dt_max)

    def _check_start(self, start: dict[str, np.ndarray]) -> None:
        n, N = self._n_states, self.d_state
        for (name, value), shape in zip(start.items(), ((n,), (n,), (N, n), (n, N)), strict=True):
            if value.shape != shape:
                raise ValueError(
                    f"S5SSM: {name} must have shape {shape} for P = {n} stored states and conj_sym={self.conj_sym}, "
                    f"got {value.shape}"
                )

    def _init_parameters(self, rngs: nnx.Rngs, start: dict[str, np.ndarray], dt_min: float, dt_max: float) -> None:
        H, N, n = self.d_model, self.d_state, self._n_states
        re, im, V, Vinv = start.values()
        self.Lambda_re, self.Lambda_im = self._param(re), self._param(im)
        self.B = self._param(init_VinvB(Vinv, N, H, draw=initializers.lecun_normal(), rngs=rngs))
        if self.C_init == "complex_normal":
            shape = (H, 2 * n if self.bidirectional else n, 2)
            self.C = self._param(jax.random.normal(rngs.params(), shape) * 0.5**0.5)
        else:
            for name in ("C1", "C2") if self.bidirectional else ("C",):
                setattr(self, name, self._param(init_CV(V, N, H, draw=_DRAWS[self.C_init], rngs=rngs)))
        self.D = self._param(jax.random.normal(rngs.params(), (H,)))
        self.log_step = self._param(init_log_steps(n, dt_min, dt_max, rngs=rngs)[:, None])

    def _system(self) -> System:
        """(A_bar (n,), B_bar (n, H), C (H, n), or (H, 2 n) = [C1, C2] if bidirectional)."""
        re = widen(self.Lambda_re[...])
        eigenvalues = to_complex(jnp.minimum(re, -_LEAST_DECAY) if self.clip_eigs else re, self.Lambda_im[...])
        dt = self.step_rescale * jnp.exp(widen(self.log_step[:, 0]))
        A_bar, gamma = _DISCRETIZE[self.discretization](eigenvalues, dt)
        both = self.bidirectional and self.C_init != "complex_normal"
        B, C = self.B[...], jnp.concatenate([self.C1[...], self.C2[...]], 1) if both else self.C[...]
        return A_bar, gamma[:, None] * to_complex(B[..., 0], B[..., 1]), to_complex(C[..., 0], C[..., 1])

    def _feedthrough(self) -> Float[Array, " H"]:
        return self.D[...]

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"] | Float[Array, "L H"],
        integration_timesteps: None = None,
        lengths: Int[Array, " B"] | Int[Array, ""] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """Run the layer over whole sequences.

        Args:
            x: real floating point, shape (B, L, H), or (L, H).
            integration_timesteps: must be None: the step of an LTI layer is the same at every time.
            lengths: int, shape (B,), or () for x (L, H): valid steps of each row; outputs past them are 0.
            inference_cache: start from its state, with its discrete system; for x (L, H) one of batch size 1.

        Returns:
            y in the shape of `x`, in `dtype` or else the dtype of `x`; with a cache, `(y, cache)` where the new
            cache holds the state after the last (valid) step.

        Raises:
            ValueError: wrong rank or width, `integration_timesteps` given, a cache that does not fit, or with
                `bidirectional` any. TypeError: wrong dtype.
        """
        x = jnp.asarray(x)
        if x.ndim == 2:
            lengths = None if lengths is None else jnp.asarray(lengths)[None]
            result = self(x[None], integration_timesteps, lengths, inference_cache)
            return result[0] if inference_cache is None else (result[0][0], result[1])
        if not self.bidirectional or integration_timesteps is not None:
            return super().__call__(x, integration_timesteps, lengths, inference_cache)
        if inference_cache is not None:
            raise self._no_cache()
        x = self._input(x, "(B, L, H)")
        A_bar, B_bar, C = self._system()
        u, n = widen(x), self._n_states
        lengths = None if lengths is None else jnp.asarray(lengths)
        how: dict[str, Any] = {"lengths": lengths, "conj_sym": self.conj_sym, "precision": self.precision}
        y: Any = diagonal_ssm(u, A_bar, B_bar, C[:, :n], self._feedthrough(), **how, batch_first=True)
        y = y + diagonal_ssm(u, A_bar, B_bar, C[:, n:], reverse=True, **how, batch_first=True)
        return y.astype(x.dtype)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """A cache with zero state and the discrete system of the parameters as they are now.

        Args:
            batch_size: rows B.
            max_seqlen, dtype: no effect; the state is complex64, or complex128 for float64 parameters.

        Raises:
            ValueError: the layer is bidirectional.
        """
        if self.bidirectional:
            raise self._no_cache()
        return super().allocate_inference_cache(batch_size, max_seqlen, dtype)

    def _check_cache(self, cache: Cache, batch: int) -> None:
        if self.bidirectional:
            raise self._no_cache()
        super()._check_cache(cache, batch)

    def _no_cache(self) -> ValueError:
        return ValueError(
            "S5SSM: a bidirectional layer needs the whole sequence at once: it has no cache and no step; "
            "bidirectional=False has both"
        )
