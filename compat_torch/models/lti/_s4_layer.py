"""What S4 and S4D share: everything but the state matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spyx.ops import fft_conv
from spyx.ops.dtypes import to_complex, widen
from spyx.ops.scan import check_lengths, valid_steps

from ...core.base import LRNN
from ...core.discretization import Reference
from ...core.layers import linear
from ...core.variables import hint, register
from ...interop import torch_in_torch_out
from ...random import default_rngs
from ._s4_parameters import (
    ACTIVATIONS,
    Names,
    Transform,
    check_transform,
    gelu,
    initial_dt,
    initial_system,
    positive,
    stored,
)

Cache = dict[str, Array]
Rates = float | Mapping[str, float] | None


class S4Layer(LRNN):
    """Skip connection, gate, output projection, dropout, lengths and layouts around a single-input system per channel.

    Arguments and parameters are those of `S4D`. A subclass supplies `_kernel`, `_zero_state`, `_respond`, `_update`.
    """

    _diagonal: bool
    layer: Any
    inv_dt: nnx.Variable
    A_real: nnx.Variable
    A_imag: nnx.Variable
    B: nnx.Variable
    C: nnx.Variable
    P: nnx.Variable

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
        optional = {"bottleneck": bottleneck, "gate": gate, "l_max": l_max, "n_ssm": n_ssm}
        given = {name: value for name, value in optional.items() if value is not None}
        self._check_sizes(d_model=d_model, channels=channels, d_state=d_state, rank=rank, **given)
        self._check_rates(dropout=dropout, drop_kernel=drop_kernel)
        if d_state < 2:
            raise ValueError(
                f"{self._name}: d_state must be at least 2 (one of each conjugate pair is kept), got {d_state}"
            )
        if d_model % (bottleneck or 1):
            raise ValueError(f"{self._name}: bottleneck must divide d_model, got {bottleneck} and {d_model}")
        self.d_model, self.d_inner, self.d_state = d_model, d_model // (bottleneck or 1), d_state
        self.n_ssm = n_ssm or self.d_inner
        if self.d_inner % self.n_ssm:
            raise ValueError(f"{self._name}: n_ssm must divide the width {self.d_inner}, got {self.n_ssm}")
        if postact is not None:
            if final_act is not None:
                raise ValueError(
                    f"{self._name}: postact is an older name of final_act; with postact={postact!r} pass "
                    f"final_act=None, got {final_act!r}"
                )
            final_act = postact
        self._check_choice("final_act", final_act, (None, *ACTIVATIONS))
        self.bottleneck, self.gate, self.final_act = bottleneck, gate, final_act
        self.l_max, self.channels, self.rank, self.init = (
            l_max,
            channels,
            rank,
            init if isinstance(init, str) else tuple(init),
        )
        self.tie_dropout, self.transposed, self.swap_channels = bool(tie_dropout), bool(transposed), bool(swap_channels)
        self._time_axis = 2 if transposed else 1
        self.dt_transform: Transform = dt_transform
        self.real_transform: Transform = real_transform
        self.imag_transform: Transform = imag_transform
        self.dt_fast, self.is_real, self.deterministic_init = bool(dt_fast), bool(is_real), bool(deterministic)
        rngs = default_rngs(rngs)
        inv_dt = initial_dt(
            self.d_inner, d_state // 2, dt_min=dt_min, dt_max=dt_max, dt_tie=dt_tie, dt_transform=dt_transform,
            dt_fast=dt_fast, deterministic=deterministic, reference=reference, key=rngs.params(),
        )  # fmt: skip
        system = initial_system(
            init, d_state, rank, self.n_ssm, self.d_inner, channels, deterministic=deterministic, key=rngs.params(),
            **init_args,
        )  # fmt: skip
        self._register_system(inv_dt, *system, lr, wd)
        self._init_dense(rngs)
        self.drop = nnx.Dropout(dropout, broadcast_dims=(0,) if tie_dropout else ())
        self.drop_kernel = nnx.Dropout(drop_kernel)

    def _check_rates(self, **rates: float) -> None:
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{self._name}: {name} must be in [0, 1], got {rate}")

    def _register_system(self, inv_dt, A, P, B, C, lr: Rates, wd: Rates) -> None:
        for name, rates in (("lr", lr), ("wd", wd)):
            if isinstance(rates, Mapping) and (unknown := sorted(rates.keys() - {"dt", "A", "B"})):
                raise ValueError(f"{self._name}: {name} may name 'dt', 'A' and 'B', got {unknown}")

        def variable(group: str, value) -> nnx.Variable:
            rate, decay = (rates.get(group) if isinstance(rates, Mapping) else rates for rates in (lr, wd))
            return register(jnp.asarray(value, self.param_dtype), rate, decay)

        def parts(value) -> Array:
            return jnp.stack([value.real, value.imag], -1)

        def real_or_parts(value) -> Array:
            return value.real if self.is_real else parts(value)

        check_transform("real_transform", self.real_transform, -A.real)
        check_transform("imag_transform", self.imag_transform, 0.0 * A.real if self.is_real else -A.imag)
        self.inv_dt = variable("dt", inv_dt)
        self.C = self._param(real_or_parts(C))
        if self.reference == "lrnnx":
            hint(self.C, weight_decay=0.0)
        self.B = variable("B", real_or_parts(B)[None])
        self.A_real = variable("A", stored(-A.real, self.real_transform))
        names = ["inv_dt", "C", "B", "A_real"]
        if not self.is_real:
            self.A_imag = variable("A", stored(-A.imag, self.imag_transform))
            names.append("A_imag")
        if not self._diagonal:
            self.P = variable("A", parts(P))
            names.append("P")
        self.layer = Names(kernel=Names(**{name: getattr(self, name) for name in names}))

    def _init_dense(self, rngs: nnx.Rngs) -> None:
        H, W = self.d_inner, self.channels * self.d_inner
        dense: dict[str, Any] = {"param_dtype": self.param_dtype, "precision": self.precision, "rngs": rngs}
        if self.bottleneck is not None:
            self.input_linear = linear(self.d_model, H, **dense)
        self.D = self._param(jax.random.normal(rngs.params(), (self.channels, H)))
        if self.gate is not None:
            self.input_gate = nnx.List([linear(self.d_model, self.gate * H, **dense)])
            if self.gate != self.channels:
                self.output_gate = linear(W, self.gate * H, **dense)
            W = self.gate * H
        if self.final_act is not None:
            double = self.reference == "paper" and self.final_act == "glu"
            self.output_linear = nnx.List([linear(W, self.d_model * (2 if double else 1), **dense)])
        self._d_output = W if self.final_act is None else self.d_model

    @property
    def d_output(self) -> int:
        """Width of the output: d_model, or without the final projection what comes before it."""
        return self._d_output

    def _system(self, rate: float = 1.0) -> tuple[Array, Array, Array, Array]:
        """dt (H, 1) or (H, n), A, B (H, n), C (c, H, n), as the parameters are now."""
        inv_dt = widen(self.inv_dt[...])
        dt = rate * positive(jnp.sinh(inv_dt) if self.dt_fast else inv_dt, self.dt_transform)
        A: Array = -positive(widen(self.A_real[...]), self.real_transform)
        B, C = widen(self.B[0]), widen(self.C[...])
        if not self.is_real:
            A = to_complex(A, -positive(widen(self.A_imag[...]), self.imag_transform))
            B, C = to_complex(B[..., 0], B[..., 1]), to_complex(C[..., 0], C[..., 1])
        return dt, self._tile(A), self._tile(B), C

    def _tile(self, value: Array) -> Array:
        """The n_ssm systems (..., S, n), repeated for all channels."""
        repeats = (1,) * (value.ndim - 2) + (self.d_inner // self.n_ssm, 1)
        return jnp.tile(value, repeats)

    def _kernel_length(self, L: int, rate: float) -> int:
        """lrnnx cuts the kernel off at l_max steps of rate 1."""
        return L if self.l_max is None or self.reference == "paper" else min(L, round(self.l_max / rate))

    def _kernel(self, L: int, rate: float) -> Float[Array, "c H L"]:
        """The convolution kernel of L steps."""
        raise NotImplementedError

    def _zero_state(self, batch_size: int) -> Cache:
        """The cache before the first step; `lrnn_state` is the state."""
        raise NotImplementedError

    def _respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, rngs: Any
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        """Outputs and cache of the recurrence from a state; u is 0 where not valid, and y may be anything there."""
        raise NotImplementedError

    def _update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        """One step of the recurrence."""
        raise NotImplementedError

    def _with_state(self, state: Array) -> Cache:
        """A cache around a state that the caller brings."""
        batch = state.shape[0] if state.ndim else 0
        return {**self._zero_state(batch), "lrnn_state": state}

    @torch_in_torch_out
    def __call__(
        self,
        x: Float[Array, "B L H"] | Float[Array, "B H L"],
        lengths: Int[Array, " B"] | int | None = None,
        state: Array | None = None,
        inference_cache: Cache | None = None,
        *,
        rate: float = 1.0,
        integration_timesteps: None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Array, Any]:
        """Run the layer over whole sequences.

        Args:
            x: real floating point, shape (B, H, L), or (B, L, H) with transposed=False.
            lengths: valid steps of each row: int, shape (B,) or (1,), or a Python integer for all rows. Outputs past
                them are 0; the padding, even NaN, reaches nothing.
            state: start from it, as another call or `allocate_inference_cache(...)["lrnn_state"]` gives it.
            inference_cache: start from it. Not together with `state`.
            rate: of the sampling, a Python number: the step is dt * rate, so that 2 fits inputs of half the sampling
                rate. Needs neither state nor cache.
            integration_timesteps: must be None: the step of an LTI layer is the same at every time.
            rngs: with a stream "dropout"; needed in training mode with dropout or drop_kernel.

        Returns:
            `(y, state)`: y in the layout of x, in `dtype` or else the dtype of x, and the state after the last
            valid step: None without `state`; with a cache, the new cache.

        Raises:
            ValueError: wrong rank or width, a state or cache that does not fit, both of them given, no `rngs` where
                needed. TypeError: wrong dtype.
        """
        if integration_timesteps is not None:
            raise ValueError(f"{self._name} is time-invariant and cannot use integration_timesteps; pass None")
        if state is not None and inference_cache is not None:
            raise ValueError(f"{self._name}: pass state or inference_cache, not both")
        if not rate > 0:
            raise ValueError(f"{self._name}: rate must be positive, got {rate}")
        self._check_rngs(rngs)
        x = jnp.moveaxis(self._sequence(x), self._time_axis, 0)
        L, B = x.shape[:2]
        valid = None if lengths is None else self._valid(lengths, L, B)
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        v, u = self._enter(x)
        if valid is not None:
            u = jnp.where(valid[..., None], u, 0)
        after: Any = None
        if state is None and inference_cache is None:
            y = self._convolve(u, self._kernel_length(L, rate), rate, rngs)
        elif rate != 1:
            raise ValueError(f"{self._name}: rate={rate} needs a call without state and cache")
        else:
            cache = self._with_state(jnp.asarray(state)) if inference_cache is None else inference_cache
            self._check_cache(cache, B)
            y, after = self._respond(u, cache, valid, rngs)
            after = after if state is None else after["lrnn_state"][..., : jnp.shape(state)[-1]]
        y = self._leave(y, u, v, x.dtype, self.swap_channels, rngs)
        if valid is not None:
            y = jnp.where(valid[..., None], y, 0)
        return jnp.moveaxis(y, 0, self._time_axis), after

    @torch_in_torch_out
    def step(
        self, x: Float[Array, "B H"], inference_cache: Cache, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B H"], Cache]:
        """One step: `(y, cache)` from x (B, H) and the cache before it, which is left as it is.

        Args:
            x: real floating point, shape (B, H), whatever `transposed`.
            inference_cache: from `allocate_inference_cache`, a call, or a step before.
            rngs: as in a call.

        Raises:
            ValueError: wrong rank or width, or a cache that does not fit. TypeError: wrong dtype.
        """
        self._check_rngs(rngs)
        x = self._input(x, "(B, H)")
        self._check_cache(inference_cache, x.shape[0])
        v, u = self._enter(x[None])
        y, cache = self._update(u[0], inference_cache)
        swap = self.swap_channels and self.reference == "paper"
        return self._leave(y[None], u, v, x.dtype, swap, rngs)[0], cache

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 1, dtype: Any = None) -> Cache:
        """A cache at the start of a sequence.

        Args:
            batch_size: rows B.
            max_seqlen: no effect: the state of a recurrence does not grow.
            dtype: no effect: the state is float32 pairs, or float64 for float64 parameters.

        Returns:
            `lrnn_state`, as described in the class, and what else a step needs.
        """
        self._check_sizes(batch_size=batch_size)
        return self._zero_state(batch_size)

    def default_state(self, batch_size: int) -> Array:
        """A zero state for so many rows: what `state=` takes."""
        return self.allocate_inference_cache(batch_size)["lrnn_state"]

    def _sequence(self, x) -> Float[Array, "B L H"] | Float[Array, "B H L"]:
        x = jnp.asarray(x)
        if self._time_axis == 1:
            return self._input(x, "(B, L, H)")
        if x.ndim != 3 or x.shape[1] != self.d_model:
            raise ValueError(
                f"{self._name} with transposed=True expects input (B, H, L) with H = {self.d_model}, "
                f"got shape {x.shape}; transposed=False takes (B, L, H)"
            )
        return jnp.swapaxes(self._input(jnp.swapaxes(x, 1, 2), "(B, L, H)"), 1, 2)

    def _valid(self, lengths, L: int, B: int) -> Bool[Array, "L B"]:
        lengths = jnp.asarray(lengths)
        if lengths.shape in ((), (1,)):
            lengths = jnp.broadcast_to(lengths, (B,))
        check_lengths(lengths, (L, B))
        return valid_steps(lengths, L, 2)

    def _check_rngs(self, rngs) -> None:
        for name, layer in (("dropout", self.drop), ("drop_kernel", self.drop_kernel)):
            if rngs is None and 0 < layer.rate < 1 and not layer.deterministic:
                raise ValueError(
                    f"{self._name}: {name}={layer.rate} in training mode needs rngs=nnx.Rngs(dropout=...) at the call; "
                    "eval() turns it off"
                )

    def _check_cache(self, cache: Cache, batch: int) -> None:
        wanted = jax.eval_shape(lambda: self._zero_state(batch))
        if not isinstance(cache, dict) or not wanted.keys() <= cache.keys():
            found = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
            raise ValueError(
                f"{self._name}: inference_cache must have the keys {sorted(wanted)}, got {found}; "
                "make one with allocate_inference_cache(batch_size)"
            )
        for name, leaf in wanted.items():
            if cache[name].shape != leaf.shape:
                raise ValueError(
                    f"{self._name}: {name} must have shape {leaf.shape} for this input, got {cache[name].shape}"
                )

    def _enter(self, x: Float[Array, "L B H"]) -> tuple[Array | None, Float[Array, "L B D"]]:
        """The gate, and the input of the system in float32 or wider."""
        v = None if self.gate is None else gelu(self.input_gate[0](x))
        return v, widen(x if self.bottleneck is None else self.input_linear(x))

    def _convolve(self, u: Float[Array, "L B H"], L: int, rate: float, rngs: Any) -> Float[Array, "L B c H"]:
        """The convolution with the first L steps of the kernel."""
        k = self.drop_kernel(self._kernel(L, rate), rngs=rngs)
        return fft_conv(u, jnp.moveaxis(k, -1, 0))

    def _leave(self, y: Float[Array, "L B c H"], u, v, dtype, swap: bool, rngs: Any) -> Float[Array, "L B W"]:
        """Skip connection, activations, gate, dropout, output projection."""
        y = y + u[:, :, None] * widen(self.D[...])
        y = jnp.swapaxes(y, 2, 3) if swap else y
        y = gelu(y.reshape(*y.shape[:2], self.channels * self.d_inner))
        if v is not None:
            y = y if self.gate == self.channels else self.output_gate(y.astype(dtype))
            y = y * v
        if self.reference == "lrnnx":
            y = gelu(y)
        y = self.drop(y, rngs=rngs).astype(dtype)
        if self.final_act is not None:
            act = gelu if self.reference == "lrnnx" else ACTIVATIONS[self.final_act]
            y = act(self.output_linear[0](y)).astype(dtype)
        return y
