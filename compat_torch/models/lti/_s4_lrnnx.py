"""What lrnnx's S4 and S4D share beyond `S4Layer`: the constructor and the names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...core.discretization import Reference
from ...core.variables import hint
from ...random import default_rngs
from ._s4_kernels import Rates, Register, SSMParameters, Storage, registrar
from ._s4_layer import Activations, S4Layer
from ._s4_parameters import Names, Transform, initial_dt, initial_system


class LrnnxS4(S4Layer):
    """S4Layer with the arguments and parameters of `S4D`; a subclass supplies `_make_kernel`."""

    layer: Any

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
        super().__init__(reference=reference, precision=precision, dtype=dtype, param_dtype=param_dtype)
        self.final_act = self._final_act(final_act, postact)
        double = reference == "lrnnx"
        final = "gelu" if double and self.final_act is not None else self.final_act
        self._set_up(
            d_model, d_state, Activations("gelu", "gelu", "gelu" if double else None, final), transposed=transposed,
            dropout=dropout, tie_dropout=tie_dropout, drop_kernel=drop_kernel, bottleneck=bottleneck, gate=gate,
            channels=channels, l_max=l_max, swap_channels=swap_channels,
        )  # fmt: skip
        self._check_pairs(d_state)
        self.n_ssm = self._shared_systems(n_ssm, rank)
        self.rank, self.init = rank, init if isinstance(init, str) else tuple(init)
        self.dt_transform: Transform = dt_transform
        self.real_transform: Transform = real_transform
        self.imag_transform: Transform = imag_transform
        self.dt_fast, self.is_real, self.deterministic_init = bool(dt_fast), bool(is_real), bool(deterministic)
        rngs = default_rngs(rngs)
        inv_dt = initial_dt(
            self.d_inner, d_state // 2, dt_min=dt_min, dt_max=dt_max, dt_tie=dt_tie, dt_transform=dt_transform,
            dt_fast=dt_fast, deterministic=deterministic, as_its_own_logarithm=double, key=rngs.params(),
        )  # fmt: skip
        system = initial_system(
            init, d_state, rank, self.n_ssm, self.d_inner, channels, deterministic=deterministic, key=rngs.params(),
            **init_args,
        )  # fmt: skip
        storage = Storage(dt_transform, self.dt_fast, real_transform, imag_transform, self.is_real)
        rates = registrar(self._name, lr, wd, ("dt", "A", "B"), self.param_dtype)
        kernel = self._make_kernel(storage, inv_dt, *system, rates)
        if double:
            hint(kernel.C, weight_decay=0.0)
        for name in ("inv_dt", "C", "B", "A_real", "A_imag", "P"):
            if hasattr(kernel, name):
                setattr(self, name, getattr(kernel, name))
        self.layer = Names(kernel=kernel)
        self.D = self._param(jax.random.normal(rngs.params(), (channels, self.d_inner)))
        self._init_dense(rngs, gate_in_list=True)

    def _make_kernel(self, storage: Storage, inv_dt, A, P, B, C, register: Register) -> SSMParameters:
        """The systems, whose variables are the layer's under a second name."""
        raise NotImplementedError

    @property
    def _ssm(self) -> Any:
        return self.layer.kernel

    @property
    def _skip(self) -> Float[Array, "c H"]:
        return self.D[...]

    @property
    def _cuts(self) -> bool:
        return self.reference == "lrnnx"

    @property
    def _swaps_in_step(self) -> bool:
        return self.reference == "paper"
