"""s5-pytorch's layer."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Complex, Float, Int

from spyx.ops import diagonal_ssm, zoh
from spyx.ops.dtypes import state_dtype, widen
from spyx.ops.scan import check_lengths, valid_steps

from ...core.base import LRNN
from ...interop import torch_in_torch_out
from ...random import default_rngs
from ..ltv._diagonal import project, read_out, varying_ssm
from ._s5_parameters import SSM, Initialization

Cache = dict[str, Array]
StepScale = float | Float[Array, " B"] | Float[Array, "B L"]


class S5(LRNN):
    """S5 with step sizes that may differ by row and by step: (B, L, H) -> (B, L, H).

    h_t = A_t h_{t-1} + g_t B x_t, y_t = Re(C h_t) + D x_t over P complex states, none of them left out for symmetry,
    with A_t = exp(s_t Lambda), g_t = (A_t - 1) / Lambda, s_t = step_scale exp(log_step).

    Args:
        width: width H.
        state_width: number P of states; None is `width`.
        factor_rank: rank k of B = BP BH^T and C = CH^T CP; with `bcInit` None or "factorized".
        block_count: HiPPO blocks of P / block_count states that Lambda starts from.
        dt_min, dt_max: exp(log_step) starts log-uniform between them, in the time unit of Lambda.
        liquid: A_t = exp(s_t Lambda) + g_t B x_t.
        degree: g_t B is raised to this power, element by element; more than 1 needs P = H.
        bidir: y_t = Re(C [h_t, k_t]) + D x_t, where k_t = exp(s_t Lambda) k_{t+1} + g_t B x_t (with `liquid` too, as in
            the reference). There is no state, no step and no cache.
        bcInit: what B and C start from: "dense" (None is that), "dense_columns", "complex_normal", "factorized".
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).

    Parameters, all under `seq`: Lambda (P,) complex, B (P, H, 2) real, C (H, P) complex, (H, 2 P) if `bidir`, D (H,),
    log_step (P,); "factorized" has in place of B and C the complex BH (H, k), BP (P, k), CH (k, H), CP (k, P or 2 P).
    Cache: lrnn_state (B, P) complex. Complex arrays of size (B, L, P) are held with `liquid` and where `step_scale`
    is an array only (on a CPU).

    Where s5-pytorch 0.2.1 is wrong and this class is not: "dense_columns" and "factorized" raise; `initial_state`
    raises; a `state` given to a liquid layer is not multiplied by g_0 B x_0.

    Raises:
        ValueError: unknown bcInit; factor_rank without "factorized" or the other way round; a size that is not a
            positive integer; block_count that does not divide P; degree > 1 with P != H; not 0 < dt_min <= dt_max.

    Source: S5 (arXiv:2208.04933), Liquid-S4 (arXiv:2209.12951); s5-pytorch 0.2.1 `s5.S5`.
    """

    def __init__(
        self,
        width: int,
        state_width: int | None = None,
        factor_rank: int | None = None,
        block_count: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        liquid: bool = False,
        degree: int = 1,
        bidir: bool = False,
        bcInit: Initialization | None = None,
        *,
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        state_width = width if state_width is None else state_width
        rank = {} if factor_rank is None else {"factor_rank": factor_rank}
        self._check_sizes(width=width, state_width=state_width, block_count=block_count, degree=degree, **rank)
        bcInit = bcInit or ("dense" if factor_rank is None else "factorized")
        self._check_choice("bcInit", bcInit, get_args(Initialization))
        if (factor_rank is None) == (bcInit == "factorized"):
            raise ValueError(f"S5: factor_rank and bcInit='factorized' go together, got {factor_rank} and {bcInit!r}")
        if state_width % block_count:
            raise ValueError(f"S5: block_count must divide state_width, got {block_count} and {state_width}")
        if degree != 1 and state_width != width:
            raise ValueError(f"S5: degree={degree} needs state_width == width, got {state_width} and {width}")
        self.width = self.d_model = width
        self.state_width, self.degree = state_width, degree
        self.liquid, self.bidir = bool(liquid), bool(bidir)
        self.seq = SSM(
            width, state_width,
            factor_rank=factor_rank, block_count=block_count, dt_min=dt_min, dt_max=dt_max, bidir=self.bidir,
            bcInit=bcInit, param_dtype=self.param_dtype, rngs=default_rngs(rngs),
        )  # fmt: skip

    @torch_in_torch_out
    def __call__(
        self,
        signal: Float[Array, "B L H"],
        step_scale: StepScale = 1.0,
        state: Complex[Array, "B P"] | None = None,
        return_state: bool = False,
        lengths: Int[Array, " B"] | None = None,
        inference_cache: Cache | None = None,
    ) -> Any:
        """Run the layer over whole sequences.

        Args:
            signal: real floating point, shape (B, L, H).
            step_scale: factor of the step sizes: a number, (B,), or (B, L), the time since the step before.
            state: start from it, shape (B, P), as `initial_state` or another call returns it.
            return_state: return `(y, state)`, the state after the last valid step.
            lengths: int, shape (B,): valid steps of each row; outputs past them are 0, and the padding, even NaN,
                reaches nothing.
            inference_cache: start from it, in place of `state`; then `(y, cache)` is returned.

        Returns:
            y of shape (B, L, H) in `dtype`, or else the dtype of the input; or a pair, as above.

        Raises:
            ValueError: wrong rank or width, a state or cache that does not fit, both of them, one of them or
                `return_state` with `bidir`, `return_state` with a cache. TypeError: wrong dtype.
        """
        x = jnp.swapaxes(self._input(signal, "(B, L, H)"), 0, 1)
        L, B = x.shape[:2]
        if self.bidir and (return_state or state is not None or inference_cache is not None):
            raise self._no_state()
        if inference_cache is not None:
            if state is not None or return_state:
                raise ValueError("S5: pass inference_cache, or state and return_state: the cache holds the state")
            state = self._state_of(inference_cache, B)
        elif state is not None:
            state = self._checked("state", state, B)
        scale = self._scale(step_scale, ((), (B,), (B, L)))
        valid = None
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            check_lengths(lengths, x.shape)
            valid = valid_steps(lengths, L, 3)
            x = jnp.where(valid, x, 0)
            scale = jnp.where(valid[..., 0].T, scale, 0) if scale.ndim == 2 else scale
        y, after = self._respond(x, scale.T, state, lengths)
        y = jnp.swapaxes(y if valid is None else jnp.where(valid, y, 0), 0, 1).astype(x.dtype)
        if inference_cache is not None:
            return y, {**inference_cache, "lrnn_state": after}
        return (y, after) if return_state else y

    def _respond(self, x: Float[Array, "L B H"], scale: Array, h0, lengths) -> tuple[Array, Array]:
        """y in float32 or wider, and the last state; `scale` is (), (B,) or (L, B)."""
        (A_bar, gain, B, C), D, P = self._discrete(scale), self.seq.D[...], self.state_width

        def run(C, D, h0, *, liquid: bool, reverse: bool):
            how: dict[str, Any] = {"lengths": lengths, "reverse": reverse, "precision": self.precision}
            if liquid or scale.ndim:
                return varying_ssm(x, A_bar, B, C, D, h0, gain=gain, liquid=liquid, **how)
            return diagonal_ssm(widen(x), A_bar, gain[:, None] * B, C, D, h0, return_state=True, **how)

        y, after = run(C[:, :P], D, h0, liquid=self.liquid, reverse=False)
        if self.bidir:
            y = y + run(C[:, P:], None, None, liquid=False, reverse=True)[0]
        return y, after

    def _discrete(self, scale: Array) -> tuple[Array, Array, Array, Array]:
        """exp(s Lambda) and g^degree, each (*scale.shape, P), B^degree and C."""
        eigenvalues, B, C, dt = self.seq.system(self.precision)
        A_bar, gain = zoh(eigenvalues, scale[..., None] * dt)
        if self.degree != 1:
            gain, B = gain**self.degree, B**self.degree
        return A_bar, gain, B, C

    @torch_in_torch_out
    def step(
        self, x: Float[Array, "B H"], inference_cache: Cache, step_scale: float | Float[Array, " B"] = 1.0
    ) -> tuple[Float[Array, "B H"], Cache]:
        """One step: `(y, cache)` from x (B, H) and the cache before it, which is left as it is.

        Args:
            x: real floating point, shape (B, H).
            inference_cache: from `allocate_inference_cache`, a call, or a step before.
            step_scale: factor of the step sizes: a number, or (B,).

        Raises:
            ValueError: wrong rank or width, a cache that does not fit, or the layer is bidirectional.
            TypeError: wrong dtype.
        """
        x = self._input(x, "(B, H)")
        before = self._state_of(inference_cache, x.shape[0])
        A_bar, gain, B, C = self._discrete(self._scale(step_scale, ((), x.shape[:1])))
        u = x.astype(state_dtype(x, A_bar))
        drive = gain * project(u, B, self.precision)
        h = (A_bar + drive if self.liquid else A_bar) * before + drive
        y = read_out(h, C, False, self.precision) + self.seq.D[...] * u
        return y.astype(x.dtype), {**inference_cache, "lrnn_state": h.astype(before.dtype)}

    def _advance(self, x: Float[Array, "B H"], cache: Cache, timesteps: Array | None = None) -> tuple[Array, Cache]:
        return self.step(x, cache, 1.0 if timesteps is None else timesteps)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """A cache at the start of a sequence: lrnn_state (B, P), zero.

        Args:
            batch_size: rows B.
            max_seqlen, dtype: no effect; the state is complex64, or complex128 for float64 parameters.

        Raises:
            ValueError: the layer is bidirectional.
        """
        self._check_sizes(batch_size=batch_size)
        if self.bidir:
            raise self._no_state()
        return {"lrnn_state": self.initial_state(batch_size)}

    def initial_state(self, batch_size: int | None = None) -> Complex[Array, "*B P"]:
        """A zero state (B, P), or (P,) without a batch size.

        Raises:
            ValueError: `batch_size` is not a positive integer.
        """
        if batch_size is not None:
            self._check_sizes(batch_size=batch_size)
        rows = () if batch_size is None else (batch_size,)
        dtype = jnp.result_type(state_dtype(self.seq.Lambda[...]), jnp.complex64)
        return jnp.zeros((*rows, self.state_width), dtype)

    def _no_state(self) -> ValueError:
        return ValueError("S5: with bidir=True the whole sequence is needed at once: there is no state, cache or step")

    def _state_of(self, cache: Cache, batch: int) -> Array:
        if self.bidir:
            raise self._no_state()
        if not isinstance(cache, dict) or "lrnn_state" not in cache:
            found = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
            raise ValueError(
                f"S5: inference_cache must have the key 'lrnn_state', got {found}; "
                "make one with allocate_inference_cache(batch_size)"
            )
        return self._checked("lrnn_state", cache["lrnn_state"], batch)

    def _checked(self, name: str, state: ArrayLike, batch: int) -> Array:
        state, shape = jnp.asarray(state), (batch, self.state_width)
        if state.shape != shape:
            raise ValueError(f"S5: {name} must have shape {shape} for this input, got {state.shape}")
        return state.astype(jnp.result_type(state.dtype, jnp.complex64))

    def _scale(self, step_scale: ArrayLike, shapes: tuple[tuple[int, ...], ...]) -> Array:
        scale = jnp.asarray(step_scale)
        if scale.shape not in shapes:
            raise ValueError(f"S5: step_scale must have one of the shapes {shapes} for this input, got {scale.shape}")
        if not jnp.issubdtype(scale.dtype, jnp.floating) and not jnp.issubdtype(scale.dtype, jnp.integer):
            raise TypeError(f"S5: step_scale must be real, got {scale.dtype}")
        return scale
