"""lrnnx's S4D: diagonal state matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import jax
from flax import nnx
from jax.typing import DTypeLike

from ...core.discretization import Reference
from ._s4_diagonal import Disc
from ._s4_kernels import Rates, Register, SSMKernelDiag, Storage
from ._s4_lrnnx import LrnnxS4
from ._s4_parameters import Transform


class S4D(LrnnxS4):
    """S4D: a diagonal system per channel, (B, H, L) -> ((B, H, L), state).

    With u the input: h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) + D u_t for every channel of u and each of the
    c rows of C; then GELU, gate, dropout, linear layer and activation over the c H outputs. n = d_state // 2 states,
    one of each conjugate pair, are stored.

    Args:
        d_model: width.
        bottleneck: the systems see input_linear(x), of width H = d_model // bottleneck, without remainder. None:
            H = d_model.
        gate: multiply by gelu(input_gate(x)), of width gate * H; what is multiplied goes through `output_gate` if
            gate != channels.
        final_act: activation after the output projection; None leaves the projection out too, and the width is then
            `d_output`. One of id, identity, linear, glu, gelu, relu, silu, swish, tanh, elu, sigmoid, softplus.
        postact: older name of `final_act`, which must be None beside it.
        dropout: rate, before the output projection.
        tie_dropout: one mask for all steps.
        transposed: the layout of x and y is (B, H, L) rather than (B, L, H).
        l_max: longest kernel, see the table.
        channels: rows c of C.
        d_state: real states of each system, at least 2.
        dt_min, dt_max: dt starts log-uniform in [dt_min, dt_max], in the time unit of A.
        dt_tie: one dt for all states of a channel.
        dt_transform, real_transform, imag_transform: the function that gives dt, -Re A and -Im A from what is stored:
            "none", "exp", "relu" (plus 1e-4), "sigmoid", "softplus".
        dt_fast: store asinh of that instead of dt.
        rank: of the low-rank part of the initialiser; S4D itself is diagonal.
        n_ssm: independent copies of A and B, dividing H; None is H.
        init: "legs", "legt" (rank >= 2), "fourier", "fout", "diag-X" or "dplr-X" with X one of lin, inv, inv2, quad,
            real, rand, legs; "hippo", "diag", "all": several in equal shares; or a sequence of these. See
            `spyx.ops.hippo.combination`.
        deterministic: C = first unit vector, dt evenly spaced in the logarithm.
        is_real: real A, B, C; there is then no A_imag.
        lr, wd: learning rate and weight decay of dt, A (and P) and B: a number, or a mapping from "dt", "A", "B".
            They become the parameters' metadata, see `compat_torch.optim`; an lr of 0 makes a buffer.
        verbose: no effect.
        disc: "zoh", "bilinear", or "dss": every mode of the kernel is normalised over the sequence, so that
            neither state, cache nor step exists.
        swap_channels: order the outputs (H, c) rather than (c, H).
        drop_kernel: rate of dropout on the convolution kernel.
        reference: which arithmetic, see the table.
        precision: of every matrix product, as in `jax.lax.dot`.
        dtype: of the output; None is that of the input.
        param_dtype: of the parameters; None is `dtype`, or float32.
        rngs: random streams; None draws from the process-wide one (`compat_torch.manual_seed`).
        **init_args: of the initialiser: real_random, real_scale, imag_random, imag_scale, B_init, B_scale, P_scale,
            normalize, B_clip, as `spyx.ops.hippo.dplr` and `nplr` take them.

    Parameters: inv_dt (H, 1) or (H, n), C (c, H, n, 2), B (1, n_ssm, n, 2), A_real, A_imag (n_ssm, n), all of them
    again under layer.kernel; D (c, H); output_linear.0.weight (d_model, c H) or (d_model, gate H) and bias;
    input_linear, input_gate.0, output_gate where in use. is_real: C (c, H, n), B (1, n_ssm, n). Cache: lrnn_state
    (B, H, n).

    | | reference="lrnnx" | reference="paper" |
    |---|---|---|
    | activations | gelu, gate, gelu, output_linear, gelu, whatever final_act names | gelu, gate, output_linear, \
final_act; for glu the projection has width 2 d_model |
    | l_max < L | a call without a state cuts the kernel off at l_max | whole kernel |
    | swap_channels | `step` ignores it | `step` honours it |
    | deterministic | dt between exp(dt_min) and exp(dt_max) | between dt_min and dt_max |
    | weight decay of C | a hint says 0 | no hint |

    Not as in lrnnx 1.0.0, whatever `reference`, because it raises there: gate == channels, bottleneck > 1, the step of
    is_real, disc="dss", integer `lengths`. Its outputs past `lengths` are not 0, and it ignores `lr`.

    Raises:
        ValueError: an argument out of range, of unknown value, or that the others exclude; it is named.

    Source: S4D (arXiv:2206.11893); lrnnx 1.0.0 `lrnnx.models.lti.S4D`.
    """

    def __init__(
        self,
        d_model: int,
        bottleneck: int | None = None,
        gate: int | None = None,
        final_act: str | None = "glu",
        postact: str | None = None,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        transposed: bool = True,
        l_max: int | None = None,
        channels: int = 1,
        d_state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: Transform = "exp",
        dt_fast: bool = False,
        rank: int = 1,
        n_ssm: int | None = None,
        init: str | Sequence[str] = "legs",
        deterministic: bool = False,
        real_transform: Transform = "exp",
        imag_transform: Transform = "none",
        is_real: bool = False,
        lr: Rates = None,
        wd: Rates = 0.0,
        verbose: bool = True,
        disc: Disc = "zoh",
        *,
        swap_channels: bool = False,
        drop_kernel: float = 0.0,
        reference: Reference = "lrnnx",
        precision: jax.lax.PrecisionLike = "highest",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
        **init_args: Any,
    ):
        self._check_choice("disc", disc, get_args(Disc))
        self.disc: Disc = disc
        super().__init__(
            d_model, bottleneck, gate, final_act, postact, dropout, tie_dropout, transposed, l_max, channels, d_state,
            dt_min, dt_max, dt_tie, dt_transform, dt_fast, rank, n_ssm, init, deterministic, real_transform,
            imag_transform, is_real, lr, wd, verbose, swap_channels=swap_channels, drop_kernel=drop_kernel,
            reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **init_args,
        )  # fmt: skip

    def _make_kernel(self, storage: Storage, inv_dt, A, P, B, C, register: Register) -> SSMKernelDiag:
        return SSMKernelDiag(self._name, storage, self.disc, inv_dt, A, B, C, register, self.precision)
