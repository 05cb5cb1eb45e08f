"""S4Block of state-spaces/s4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ...random import default_rngs
from ..lti._s4_diagonal import Disc
from ..lti._s4_kernels import Cache, Dropout, Rates, SSMKernelDiag, SSMKernelDPLR, Storage, registrar
from ..lti._s4_layer import Activations, S4Layer
from ..lti._s4_parameters import ACTIVATIONS, Names, Transform, initial_dt, initial_system
from . import _s4_modes as modes
from ._s4_modes import StepMode

Mode = Literal["dplr", "nplr", "s4", "diag", "s4d"]
_DIAGONAL = ("diag", "s4d")


class S4Block(S4Layer):
    """The S4 block: (B, H, L) -> ((B, H, L), state).

    With u the input: h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) + D u_t for every channel of u and each of the
    c rows of C; then dropout, `activation`, gate, `mult_act`, dropout, linear layer and `final_act` over the c H
    outputs.

    Args:
        d_model: width.
        bottleneck: the systems see input_linear(x), of width H = d_model // bottleneck, without remainder. None:
            H = d_model.
        gate: multiply by gate_act(input_gate(x)), of width gate * H; what is multiplied goes through `output_gate` if
            gate != channels.
        gate_act, mult_act: activation of the gate, and after the gate; None is none. Not "glu" for `mult_act`.
        final_act: activation after the output projection; None leaves the projection out too, and the width is then
            `d_output`. One of id, identity, linear, glu, gelu, relu, silu, swish, tanh, elu, sigmoid, softplus; for
            glu the projection has twice the width.
        postact: older name of `final_act`, which must be None beside it.
        initializer, weight_norm: must be None and False: the reference does not use them.
        dropout: rate, of both dropouts.
        tie_dropout: one mask for all steps.
        transposed: the layout of x and y is (B, H, L) rather than (B, L, H).
        l_max: longest kernel: a call without a state cuts its kernel off there.
        channels: rows c of the output of a channel.
        swap_channels: order the outputs (H, c) rather than (c, H). `step` ignores it, as in the reference.
        bidirectional: a second half of C (2 c rows) reads the sequence from its end, and the step t itself not:
            y_t gets k1_j u_{t+1+j} for j >= 0. Such a block has neither state, cache nor step.
        activation: after the systems; "glu" doubles the rows of C and D. None is none.
        drop_kernel: rate of dropout on the convolution kernel.
        mode: "dplr" (also "nplr", "s4"): diagonal plus low-rank state matrices; "diag" ("s4d"): diagonal ones.
        kernel: another name of `mode`, which must be None beside it.
        disc: of "diag": "zoh" (also None), "bilinear", or "dss": every mode of the kernel is normalised over the
            sequence, so that neither state, cache nor step exists. "dplr" is always "bilinear".
        dt_fast: store asinh of the stored dt instead.
        real_transform, imag_transform, dt_transform: the function that gives -Re A, -Im A and dt from what is stored:
            "none", "exp", "relu" (plus 1e-4), "sigmoid", "softplus".
        bandlimit: states that turn bandlimit / 2 times a step or more are left out: their elements of the stored C
            count as 0. (In "dplr" that is C~ if l_kernel is not 0; the reference also converts C to C~ before.)
        backend: "cuda", "keops" or "naive", without effect.
        is_real: real A, B, C of d_state states; there is then no A_imag.
        lr, wd: learning rate of dt, A (and P), B and C, and weight decay of dt, A (and P) and B: a number, or a mapping
            from "dt", "A", "B", "C". Metadata, see `compat_torch.optim`; an lr of 0 makes a buffer.
        verbose: no effect.
        d_state: real states of each system, at least 2; n = d_state // 2, one of each conjugate pair, are stored.
        deterministic: C = first unit vector, dt evenly spaced in the logarithm, between exp(dt_min) and exp(dt_max).
        dt_min, dt_max: dt starts log-uniform in [dt_min, dt_max], in the time unit of A.
        dt_tie: one dt for all states of a channel.
        rank: of the low-rank part; in "diag", of the initialiser's.
        n_ssm: independent copies of A and B, dividing H; None is H.
        measure: older name of `init`, which must be None beside it.
        init: "legs", "legt" (rank >= 2), "fourier", "fout", "diag-X", "dplr-X", "hippo", "diag", "all", or a sequence
            of these. See `spyx.ops.hippo.combination`.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).
        **init_args: of the initialiser, as `spyx.ops.hippo.dplr` and `nplr` take them.

    Parameters, with R = c, twice that for "glu" and again for `bidirectional`: layer.D (c, H) or (2 c, H);
    layer.kernel.{inv_dt (H, 1) or (H, n), C (R, H, n, 2), B (1, n_ssm, n, 2), A_real, A_imag (n_ssm, n)}, in "dplr"
    also P (rank, n_ssm, n, 2) and the buffer l_kernel; output_linear.0.{weight, bias}; input_linear, input_gate (with
    an activation input_gate.0), output_gate where in use. is_real: C (R, H, n), B (1, n_ssm, n).

    l_kernel in "dplr" says what C is, as in `compat_torch.models.lti.S4`: a call changes neither.

    Not as in the reference, because it raises there: gate, bottleneck > 1, integer `lengths`, is_real in "dplr" and in
    a step, a state with l_max < L. Its outputs past `lengths` are not 0.

    Raises:
        ValueError: an argument out of range, of unknown value, or that the others exclude; it is named.

    Source: S4 (arXiv:2111.00396), S4D (arXiv:2206.11893); state-spaces/s4 `models/s4/s4.py`.
    """

    _drops_twice = True

    layer: Any

    def __init__(
        self,
        d_model: int,
        bottleneck: int | None = None,
        gate: int | None = None,
        gate_act: str | None = None,
        mult_act: str | None = None,
        final_act: str | None = "glu",
        postact: str | None = None,
        initializer: None = None,
        weight_norm: bool = False,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        transposed: bool = True,
        *,
        l_max: int | None = None,
        channels: int = 1,
        swap_channels: bool = False,
        bidirectional: bool = False,
        activation: str | None = "gelu",
        drop_kernel: float = 0.0,
        mode: Mode | None = "dplr",
        kernel: Mode | None = None,
        disc: Disc | None = None,
        dt_fast: bool = False,
        real_transform: Transform = "exp",
        imag_transform: Transform = "none",
        bandlimit: float | None = None,
        backend: Literal["cuda", "keops", "naive"] = "cuda",
        is_real: bool = False,
        lr: Rates = None,
        wd: Rates = 0.0,
        verbose: bool = True,
        d_state: int = 64,
        deterministic: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: Transform = "exp",
        rank: int = 1,
        n_ssm: int | None = None,
        measure: str | None = None,
        init: str | Sequence[str] | None = "legs",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
        **init_args: Any,
    ):
        super().__init__(reference="paper", precision=precision, dtype=dtype, param_dtype=param_dtype)
        if initializer is not None or weight_norm:
            raise ValueError(
                f"{self._name}: initializer must be None and weight_norm False: the reference does not use them; got "
                f"{initializer!r} and {weight_norm!r}"
            )
        self.final_act = self._final_act(final_act, postact)
        for name, act in (("activation", activation), ("gate_act", gate_act)):
            self._check_choice(name, act, (None, *ACTIVATIONS))
        self._check_choice("mult_act", mult_act, (None, *(name for name in ACTIVATIONS if name != "glu")))
        self._check_choice("backend", backend, ("cuda", "keops", "naive"))
        self._set_up(
            d_model, d_state, Activations(activation, gate_act, mult_act, self.final_act), transposed=transposed,
            dropout=dropout, tie_dropout=tie_dropout, drop_kernel=drop_kernel, bottleneck=bottleneck, gate=gate,
            channels=channels, l_max=l_max, swap_channels=swap_channels,
        )  # fmt: skip
        self.mode = self._one_of("mode", mode, "kernel", kernel)
        self._check_choice("mode", self.mode, get_args(Mode))
        self.init = self._one_of("init", init, "measure", measure)
        self.disc = self._discretization(disc)
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"{self._name}: bandlimit must be positive, got {bandlimit}")
        self.bandlimit, self.bidirectional = bandlimit, bool(bidirectional)
        self.n_ssm, self.rank = self._shared_systems(n_ssm, rank), rank
        if not is_real:
            self._check_pairs(d_state)
        N = 2 * d_state if is_real else d_state
        rngs = default_rngs(rngs)
        rows = channels * (2 if activation == "glu" else 1)
        D = self._param(jax.random.normal(rngs.params(), (rows, self.d_inner)))
        inv_dt = initial_dt(
            self.d_inner, N // 2, dt_min=dt_min, dt_max=dt_max, dt_tie=dt_tie, dt_transform=dt_transform,
            dt_fast=dt_fast, deterministic=deterministic, as_its_own_logarithm=True, key=rngs.params(),
        )  # fmt: skip
        A, P, B, C = initial_system(
            self.init, N, rank, self.n_ssm, self.d_inner, rows * (2 if bidirectional else 1),
            deterministic=deterministic, key=rngs.params(), **init_args,
        )  # fmt: skip
        storage = Storage(dt_transform, bool(dt_fast), real_transform, imag_transform, bool(is_real), bandlimit)
        register = registrar(self._name, lr, wd, ("dt", "A", "B", "C"), self.param_dtype)
        if self.mode in _DIAGONAL:
            ssm = SSMKernelDiag(self._name, storage, self.disc, inv_dt, A, B, C, register, precision)
        else:
            ssm = SSMKernelDPLR(self._name, storage, inv_dt, A, P, B, C, l_max, register, precision)
        self.layer = Names(D=D, kernel=ssm)
        self._init_dense(rngs, gate_in_list=gate_act is not None)

    def _one_of(self, name: str, value: Any, other: str, other_value: Any) -> Any:
        if (value is None) == (other_value is None):
            raise ValueError(
                f"{self._name}: pass one of {name} and its other name {other}, and None for the other one; got "
                f"{value!r} and {other_value!r}"
            )
        value = other_value if value is None else value
        return value if isinstance(value, str) else tuple(value)

    def _discretization(self, disc: Disc | None) -> Disc:
        if self.mode in _DIAGONAL:
            self._check_choice("disc", disc, (None, *get_args(Disc)))
            return disc or "zoh"
        if disc not in (None, "bilinear"):
            raise ValueError(f'{self._name}: mode={self.mode!r} is always disc="bilinear", got disc={disc!r}')
        return "bilinear"

    @property
    def _ssm(self) -> Any:
        return self.layer.kernel

    @property
    def _skip(self) -> Float[Array, "c H"]:
        return self.layer.D[...]

    def set_kernel_length(self, M: int) -> None:
        """Convert the C of "dplr" to kernels of M steps, M = 0 to the readout itself; the outputs stay the same.

        Raises:
            ValueError: mode "diag", or M is not an integer from 0 to 2^24, or not 0 for is_real, or `bandlimit` is in
                use, which depends on what is stored.
        """
        if self.mode in _DIAGONAL or self.bandlimit is not None:
            raise ValueError(
                f"{self._name}: set_kernel_length is for mode='dplr' without bandlimit, got mode={self.mode!r}, "
                f"bandlimit={self.bandlimit}"
            )
        self._ssm.set_length(M)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int = 1, dtype: Any = None, *, mode: StepMode | None = None
    ) -> Cache:
        """A cache at the start of a sequence: what the reference's `setup_step(mode)` and `default_state` prepare.

        Args:
            batch_size: rows B.
            max_seqlen: no effect: the state of a recurrence does not grow.
            dtype: no effect: the state is float32 pairs, or float64 for float64 parameters.
            mode: how mode "dplr" steps; the outputs are the same.
                "dense" (also None): a product with dA, O(n^2) a channel.
                "linear": the low-rank form, O(rank n) a channel and the least memory.
                "diagonal": in the eigenbasis of dA, O(n) a channel, in float64. It needs eigenvectors that can be
                inverted and an eigenvalue solver (not on TPU), and no gradient can go through its allocation.

        Returns:
            mode "diag": lrnn_state (B, H, n). "linear": lrnn_state (B, H, 2 n), the states and their conjugates, and
            the readout dC (c, H, n). "dense": lrnn_state (B, H, 2 n), dA (H, 2 n, 2 n), dB (H, 2 n), dC (c, H, 2 n).
            "diagonal": the same in the eigenbasis with dA (H, 2 n), V and V_inv (H, 2 n, 2 n), where every array is
            real with a last axis of 4. The matrices are those of the parameters as they are now.

        Raises:
            ValueError: a bidirectional block, disc="dss", `mode` for a diagonal block, or "diagonal" where the
                eigenvectors are too ill-conditioned (not seen while tracing).
        """
        self._check_sizes(batch_size=batch_size)
        if self.mode in _DIAGONAL:
            self._check_choice("mode of the cache", mode, (None,))
            return self._zero_state(batch_size)
        self._check_choice("mode of the cache", mode, (None, *get_args(StepMode)))
        self._check_causal()
        return modes.zero_cache(self._ssm, batch_size, mode or "dense")

    def default_state(self, batch_size: int) -> Array:
        """A zero state for so many rows: what `state=` takes."""
        self._check_sizes(batch_size=batch_size)
        return self._zero_state(batch_size)["lrnn_state"]

    def _check_causal(self) -> None:
        if self.bidirectional:
            raise ValueError(f"{self._name}: bidirectional=True needs the whole sequence: no step, state or cache")

    def _zero_state(self, batch_size: int) -> Cache:
        self._check_causal()
        return super()._zero_state(batch_size)

    def _zeros_like(self, cache: Cache, batch_size: int) -> Cache:
        if self.mode in _DIAGONAL or not isinstance(cache, dict):
            return self._zero_state(batch_size)
        self._check_causal()
        return modes.zero_cache(self._ssm, batch_size, modes.mode_of(cache))

    def _respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, drop: Dropout | None
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        if self.mode in _DIAGONAL:
            return super()._respond(u, cache, valid, drop)
        return modes.respond(self._ssm, u, cache, valid, drop)

    def _update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        return super()._update(u, cache) if self.mode in _DIAGONAL else modes.update(self._ssm, u, cache)

    def _compact(self, cache: Cache) -> Cache:
        return super()._compact(cache) if self._pairs_in_steps(cache) else cache

    def _restored(self, cache: Cache) -> Cache:
        return super()._restored(cache) if self._pairs_in_steps(cache) else cache

    def _pairs_in_steps(self, cache: Cache) -> bool:
        return self.mode in _DIAGONAL or modes.mode_of(cache) == "linear"

    def _convolve(self, u: Float[Array, "L B H"], k: Float[Array, "c H M"], rngs: Any) -> Float[Array, "L B c H"]:
        if not self.bidirectional:
            return super()._convolve(u, k, rngs)
        ahead, back = jnp.split(k, 2)
        later = super()._convolve(u[::-1], back, rngs)[::-1]
        return super()._convolve(u, ahead, rngs) + jnp.concatenate([later[1:], jnp.zeros_like(later[:1])])
