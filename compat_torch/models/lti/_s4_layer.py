"""What the S4 layers share: all but the system itself and the arguments of the constructor."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spyx.ops import fft_conv
from spyx.ops.dtypes import widen
from spyx.ops.scan import check_lengths, valid_steps

from ...core.base import LRNN
from ...core.layers import linear
from ...interop import torch_in_torch_out
from ._s4_kernels import Cache, Dropout, Kernel
from ._s4_parameters import ACTIVATIONS, activation


class Activations(NamedTuple):
    """Names of the activations: after the systems, of the gate, after the gate, after the output projection.

    None is the identity; `final` None leaves the output projection out.
    """

    layer: str | None = "gelu"
    gate: str | None = None
    mult: str | None = None
    final: str | None = "glu"


class S4Layer(LRNN):
    """Skip connection, gate, output projection, dropout, lengths and layouts around a single-input system per channel.

    The input x passes input_linear to u, the systems and the skip connection give c rows of H channels, then: first
    dropout (`_drops_twice`), activation, times the gate of x, activation, dropout, output projection and activation.
    A constructor calls `_set_up`, then defines the parameters, which `_ssm` and `_skip` find, and calls `_init_dense`.
    """

    _drops_twice: bool = False
    bidirectional: bool = False
    swap_channels: bool = False
    l_max: int | None = None
    bottleneck: int | None = None
    gate: int | None = None
    channels: int = 1

    @property
    def _ssm(self) -> Kernel:
        raise NotImplementedError

    @property
    def _skip(self) -> Float[Array, "c H"]:
        raise NotImplementedError

    @property
    def _cuts(self) -> bool:
        """Whether a call without a state cuts its kernel off at l_max."""
        return True

    @property
    def _swaps_in_step(self) -> bool:
        """Whether `step` orders the outputs as `swap_channels` says."""
        return False

    def _set_up(
        self,
        d_model: int,
        d_state: int,
        activations: Activations,
        *,
        transposed: bool,
        dropout: float,
        tie_dropout: bool,
        drop_kernel: float = 0.0,
        bottleneck: int | None = None,
        gate: int | None = None,
        channels: int = 1,
        l_max: int | None = None,
        swap_channels: bool = False,
    ) -> None:
        optional = {"bottleneck": bottleneck, "gate": gate, "l_max": l_max}
        given = {name: value for name, value in optional.items() if value is not None}
        self._check_sizes(d_model=d_model, channels=channels, d_state=d_state, **given)
        for name, rate in (("dropout", dropout), ("drop_kernel", drop_kernel)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{self._name}: {name} must be in [0, 1], got {rate}")
        if d_model % (bottleneck or 1):
            raise ValueError(f"{self._name}: bottleneck must divide d_model, got {bottleneck} and {d_model}")
        self.d_model, self.d_inner, self.d_state = d_model, d_model // (bottleneck or 1), d_state
        self.bottleneck, self.gate, self.channels, self.l_max = bottleneck, gate, channels, l_max
        self.transposed, self.swap_channels = bool(transposed), bool(swap_channels)
        self._time_axis = 2 if transposed else 1
        self._activations = activations
        self.tie_dropout = bool(tie_dropout)
        self.drop = nnx.Dropout(dropout, broadcast_dims=(0,) if tie_dropout else ())
        self.drop_kernel = nnx.Dropout(drop_kernel)

    def _check_pairs(self, d_state: int) -> None:
        if d_state < 2:
            raise ValueError(
                f"{self._name}: d_state must be at least 2 (one of each conjugate pair is kept), got {d_state}"
            )

    def _shared_systems(self, n_ssm: int | None, rank: int) -> int:
        """How many systems the channels share."""
        self._check_sizes(rank=rank, **({} if n_ssm is None else {"n_ssm": n_ssm}))
        n_ssm = n_ssm or self.d_inner
        if self.d_inner % n_ssm:
            raise ValueError(f"{self._name}: n_ssm must divide the width {self.d_inner}, got {n_ssm}")
        return n_ssm

    def _final_act(self, final_act: str | None, postact: str | None) -> str | None:
        """The one of two arguments that is in use."""
        if postact is not None:
            if final_act is not None:
                raise ValueError(
                    f"{self._name}: postact is an older name of final_act; with postact={postact!r} pass "
                    f"final_act=None, got {final_act!r}"
                )
            final_act = postact
        self._check_choice("final_act", final_act, (None, *ACTIVATIONS))
        return final_act

    def _init_dense(self, rngs: nnx.Rngs, gate_in_list: bool) -> None:
        """The dense layers; the gate's weight is input_gate.0.weight or input_gate.weight."""
        H, W, act = self.d_inner, self.channels * self.d_inner, self._activations
        dense: dict[str, Any] = {"param_dtype": self.param_dtype, "precision": self.precision, "rngs": rngs}
        if self.bottleneck is not None:
            self.input_linear = linear(self.d_model, H, **dense)
        if self.gate is not None:
            gate = linear(self.d_model, self.gate * H * (2 if act.gate == "glu" else 1), **dense)
            self.input_gate = nnx.List([gate]) if gate_in_list else gate
            if self.gate != self.channels:
                self.output_gate = linear(W, self.gate * H, **dense)
            W = self.gate * H
        if act.final is not None:
            self.output_linear = nnx.List([linear(W, self.d_model * (2 if act.final == "glu" else 1), **dense)])
        self._d_output = W if act.final is None else self.d_model

    @property
    def d_output(self) -> int:
        """Width of the output: d_model, or without the final projection what comes before it."""
        return self._d_output

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
            cut = L if self.l_max is None or not self._cuts else min(L, round(self.l_max / rate))
            if cut == L and self._kernel_dropout(rngs) is None and not self.bidirectional:
                y = self._ssm.outputs(u, rate, self.l_max)
            else:
                y = self._convolve(u, self._ssm.kernel(cut, rate, self.l_max), rngs)
        elif rate != 1:
            raise ValueError(f"{self._name}: rate={rate} needs a call without state and cache")
        else:
            cache = self._ssm.with_state(jnp.asarray(state)) if inference_cache is None else inference_cache
            self._check_cache(cache, B)
            y, after = self._respond(u, cache, valid, self._kernel_dropout(rngs))
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
        swap = self.swap_channels and self._swaps_in_step
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
        wanted = jax.eval_shape(lambda: self._zeros_like(cache, batch))
        compact = jax.eval_shape(self._compact, wanted)
        self._check_entries(cache, {name: (leaf.shape, compact[name].shape) for name, leaf in wanted.items()})

    def _compact(self, cache: Cache) -> Cache:
        return self._ssm.compact(cache)

    def _restored(self, cache: Cache) -> Cache:
        return self._ssm.restored(cache)

    def _zero_state(self, batch_size: int) -> Cache:
        """The cache before the first step, in which a state of the caller fits."""
        return self._ssm.zero_state(batch_size)

    def _zeros_like(self, cache: Cache, batch_size: int) -> Cache:
        """A cache of the kind of `cache`, which may be anything."""
        return self._zero_state(batch_size)

    def _respond(
        self, u: Float[Array, "L B H"], cache: Cache, valid: Bool[Array, "L B"] | None, drop: Dropout | None
    ) -> tuple[Float[Array, "L B c H"], Cache]:
        """Outputs and cache of the recurrence from a cache; `drop` is the dropout of the kernel, if there is any."""
        return self._ssm.respond(u, cache, valid, drop)

    def _update(self, u: Float[Array, "B H"], cache: Cache) -> tuple[Float[Array, "B c H"], Cache]:
        """One step of the recurrence."""
        return self._ssm.update(u, cache)

    def _kernel_dropout(self, rngs: Any) -> Dropout | None:
        if self.drop_kernel.rate == 0 or self.drop_kernel.deterministic:
            return None
        return lambda k: self.drop_kernel(k, rngs=rngs)

    def _enter(self, x: Float[Array, "L B H"]) -> tuple[Array | None, Float[Array, "L B D"]]:
        """The gate, and the input of the system in float32 or wider."""
        v = None
        if self.gate is not None:
            gate = self.input_gate[0] if isinstance(self.input_gate, nnx.List) else self.input_gate
            v = activation(self._activations.gate, gate(x))
        return v, widen(x if self.bottleneck is None else self.input_linear(x))

    def _convolve(self, u: Float[Array, "L B H"], k: Float[Array, "c H M"], rngs: Any) -> Float[Array, "L B c H"]:
        """The convolution with a kernel."""
        return fft_conv(u, jnp.moveaxis(self.drop_kernel(k, rngs=rngs), -1, 0))

    def _leave(self, y: Float[Array, "L B c H"], u, v, dtype, swap: bool, rngs: Any) -> Float[Array, "L B W"]:
        """Skip connection, activations, gate, dropout, output projection."""
        act = self._activations
        y = y + u[:, :, None] * widen(self._skip)
        y = jnp.swapaxes(y, 2, 3) if swap else y
        y = y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])
        if self._drops_twice:
            y = self.drop(y, rngs=rngs)
        y = activation(act.layer, y)
        if v is not None:
            y = y if self.gate == self.channels else self.output_gate(y.astype(dtype))
            y = y * v
        y = self.drop(activation(act.mult, y), rngs=rngs).astype(dtype)
        if act.final is not None:
            y = activation(act.final, self.output_linear[0](y)).astype(dtype)
        return y
