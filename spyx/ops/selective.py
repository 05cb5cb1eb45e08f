"""The selective scan of Mamba: a diagonal recurrence whose step size, input and readout vary in time."""

from __future__ import annotations

import importlib
from functools import partial
from math import isqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from . import _selective_kernels, _selective_native
from . import _selective_runs as runs
from ._recomputed import recomputed
from ._selective_step import Masks, Options, Steps, Weights, one_step
from .dispatch import platform_primitive
from .dtypes import state_dtype
from .scan import check_lengths, check_reset

Discretization = Literal["mamba", "zoh", "bilinear", "dirac"]
SelectiveMethod = Literal["auto", "sequential", "blocked", "associative", "pallas"]
Vectors = Float[Array, "T B *G N"] | Complex[Array, "T B *G N"]
State = Float[Array, "B D N"] | Complex[Array, "B D N"]

_PARALLEL_STEPS = 256
_LEAST_CHUNK, _CHUNK_STATES = 16, 4096
"""Steps of a chunk: at least, and times N at most, since the backward pass holds the states of one in the cache."""
_SAVED_STATES = 256
"""How many states are kept for the backward pass, at most: its memory does not grow with T from there on."""


def selective_scan(
    u: Float[Array, "T B D"],
    dt: Float[Array, "T B D"],
    A: Float[Array, "D N"] | Complex[Array, "D N"],
    B: Vectors,
    C: Vectors,
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "T B D"] | None = None,
    dt_bias: Float[Array, " D"] | None = None,
    dt_softplus: bool = False,
    *,
    discretization: Discretization = "mamba",
    dt_A: Float[Array, "T B D"] | None = None,
    h0: State | None = None,
    conj_sym: bool = False,
    reverse: bool = False,
    reset: Bool[Array, "T *B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    return_state: bool = False,
    method: SelectiveMethod = "auto",
):
    """h_t = A_bar(dt_t) h_{t-1} + gamma(dt_t) B_t u_t, y_t = Re(C_t h_t) + D u_t, with N states per channel.

    With dt after bias and softplus, elementwise in (D, N):

    | discretization | A_bar                         | gamma               |
    |----------------|-------------------------------|---------------------|
    | "mamba"        | exp(dt A)                     | dt                  |
    | "zoh"          | exp(dt A)                     | (exp(dt A) - 1) / A |
    | "bilinear"     | (1 + dt A / 2) / (1 - dt A / 2) | dt / (1 - dt A / 2) |
    | "dirac"        | exp(dt A)                     | 1                   |

    Args:
        u: real input, shape (T, B, D).
        dt: step size in the time unit of `A`, real, shape (T, B, D).
        A: diagonal of the continuous state matrix, real or complex, shape (D, N).
        B, C: input and readout vectors, real or complex, shape (T, B, N), or (T, B, G, N) with one for each
            of G groups of D / G neighbouring channels.
        D: feedthrough, shape (D,); None is 0.
        z: gate, shape (T, B, D): the output is multiplied by silu(z).
        dt_bias: added to `dt`, shape (D,).
        dt_softplus: dt = softplus(dt + dt_bias).
        discretization: see the table.
        dt_A: step size of A_bar alone, shape (T, B, D), taken as it is (neither bias nor softplus); gamma keeps
            `dt`. For events at uneven times. None is `dt`.
        h0: state before the first step, shape (B, D, N); None is zero.
        conj_sym: the states are one of each conjugate pair: the real part counts twice, as the CUDA kernels
            of Mamba and lrnnx do for every complex `A`.
        reverse: run from the last step to the first.
        reset: bool, shape (T,) or (T, B): where true, the incoming state (`h0` included) is cleared
            before that step, in scan direction.
        lengths: int, shape (B,): number of valid steps of each row. `y` is 0 past them, the padding (even NaN)
            reaches neither values nor gradients, and the state is that of the last step computed that is
            valid; with `reverse` the scan starts at the last valid step.
        return_state: also return the last state computed.
        method: "sequential" (lax.scan, every mode of differentiation), "blocked" (the same, with a reverse mode
            that saves a state per chunk and recomputes the rest; fastest on CPU), "associative" (parallel
            prefix in blocks of about 256 steps; every mode of differentiation), "pallas" (the hand kernels for TPU
            and NVIDIA GPU, an error for what they do not take) or "auto" (chosen when lowered: the hand kernels where
            they fit, else "blocked" on CPU, "associative" on accelerators; reverse mode first, then any). The kernels
            for CPU need numba, real A and float32 state.

    Returns:
        y of shape (T, B, D) in the dtype of `u`; with `return_state`, `(y, state)` with state (B, D, N), complex
        if any of A, B, C, h0 is, float32 or wider. T = 0 gives (empty, h0 or 0).

    Raises:
        ValueError: shapes do not fit, unknown `discretization` or `method`.
        TypeError: dtypes do not fit.

    Source: Mamba (arXiv:2312.00752); "dirac" and `dt_A`: Event-SSM (arXiv:2404.18508).
    """
    steps = Steps(*_arrays(u, dt, dt_A, B, C, z))
    A, D, dt_bias, h0, reset, lengths = _arrays(A, D, dt_bias, h0, reset, lengths)
    if method not in get_args(SelectiveMethod):
        raise ValueError(f"method must be one of {get_args(SelectiveMethod)}, got {method!r}")
    if steps.u.ndim != 3:
        raise ValueError(f"u must have shape (T, B, D), got {steps.u.shape}")
    _check(steps, A, D, dt_bias, h0, "h0", discretization)
    if reset is not None:
        check_reset(reset, steps.u.shape[:2])
    if lengths is not None:
        check_lengths(lengths, steps.u.shape)
    y, state = _selective_scan(
        steps, A, D, dt_bias, h0, reset, lengths,
        discretization=discretization, softplus=bool(dt_softplus), conj_sym=bool(conj_sym),
        reverse=bool(reverse), method=method,
    )  # fmt: skip
    return (y, state) if return_state else y


def selective_state_update(
    state: State,
    u: Float[Array, "B D"],
    dt: Float[Array, "B D"],
    A: Float[Array, "D N"] | Complex[Array, "D N"],
    B: Float[Array, "B *G N"] | Complex[Array, "B *G N"],
    C: Float[Array, "B *G N"] | Complex[Array, "B *G N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B D"] | None = None,
    dt_bias: Float[Array, " D"] | None = None,
    dt_softplus: bool = False,
    *,
    discretization: Discretization = "mamba",
    dt_A: Float[Array, "B D"] | None = None,
    conj_sym: bool = False,
) -> tuple[Float[Array, "B D"], State]:
    """One step of `selective_scan`: `(y, state)` from one input (B, D) and the state (B, D, N).

    Arguments, dtypes and errors are those of `selective_scan`, without the time axis.
    """
    steps = Steps(*_arrays(u, dt, dt_A, B, C, z))
    A, D, dt_bias, state = _arrays(A, D, dt_bias, state)
    if steps.u.ndim != 2:
        raise ValueError(f"u must have shape (B, D), got {steps.u.shape}")
    _check(steps, A, D, dt_bias, state, "state", discretization)
    return _update(
        steps, A, D, dt_bias, state,
        discretization=discretization, softplus=bool(dt_softplus), conj_sym=bool(conj_sym),
    )  # fmt: skip


def _arrays(*values) -> tuple[Any, ...]:
    return tuple(None if v is None else jnp.asarray(v) for v in values)


def _check(steps: Steps, A, D, dt_bias, state, state_name, discretization) -> None:
    if discretization not in get_args(Discretization):
        raise ValueError(f"discretization must be one of {get_args(Discretization)}, got {discretization!r}")
    if A.ndim != 2:
        raise ValueError(f"A must have shape (D, N), got {A.shape}")
    u = steps.u
    leading, width, N = u.shape[:-1], u.shape[-1], A.shape[1]
    real = [("u", u, u.shape), ("dt", steps.dt, u.shape), ("dt_A", steps.dt_a, u.shape), ("z", steps.z, u.shape)]
    real += [("D", D, (width,)), ("dt_bias", dt_bias, (width,))]
    number = [("A", A, (width, N)), (state_name, state, (*leading[-1:], width, N))]
    for name, v, shape in real + number:
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for u {u.shape} and A {A.shape}, got {v.shape}")
    groups = 1
    for name, v in (("B", steps.B), ("C", steps.C)):
        count = v.shape[-2] if v.ndim == u.ndim + 1 else 1
        if v.shape not in ((*leading, N), (*leading, count, N)) or not count or width % count:
            raise ValueError(
                f"{name} must have shape {(*leading, N)} or {(*leading, 'G', N)} with G a divisor of {width}, "
                f"for u {u.shape} and A {A.shape}, got {v.shape}"
            )
        if groups > 1 and count not in (1, groups):
            raise ValueError(f"B and C must have equally many groups, got B {steps.B.shape} and C {v.shape}")
        groups = max(groups, count)
    for name, v, _ in real:
        if v is not None and not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(f"{name} must be real floating point, got {v.dtype}")
    for name, v in (("A", A), ("B", steps.B), ("C", steps.C), (state_name, state)):
        if v is not None and not jnp.issubdtype(v.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point or complex, got {v.dtype}")


class _Layout:
    """Between the arrays of the interface and those inside, for given shapes and dtypes."""

    def __init__(self, steps: Steps, A, D, dt_bias, state):
        leading = steps.u.shape[:-1]
        self.leading, self.batch = leading, leading[-1]
        self.channels, self.N = A.shape
        self.G = max([v.shape[-2] for v in (steps.B, steps.C) if v.ndim == steps.u.ndim + 1], default=1)
        values = (*steps, A, D, dt_bias, state)
        self.real = state_dtype(*values)
        complex_ = any(v is not None and jnp.iscomplexobj(v) for v in values)
        self.dtype = jnp.result_type(self.real, jnp.complex64) if complex_ else self.real

    def steps(self, steps: Steps) -> Steps:
        """With as many groups of B and C as the rows have."""

        def grouped(v):
            if self.G == 1:
                return v
            v = v if v.ndim == len(self.leading) + 2 else v[..., None, :]
            return jnp.broadcast_to(v, (*self.leading, self.G, self.N))

        return steps._replace(B=grouped(steps.B), C=grouped(steps.C))

    def weights(self, A, D, dt_bias) -> Weights:
        A = A.astype(self.dtype).reshape(self.G, self.channels // self.G, self.N).mT
        rows = jnp.broadcast_to(A, (self.batch, *A.shape)).reshape(self.batch * self.G, *A.shape[1:])
        D, dt_bias = (None if v is None else v.astype(self.real) for v in (D, dt_bias))
        return Weights(rows if self.G > 1 else A[0], D, dt_bias)

    def rows(self, state):
        if state is None:
            return jnp.zeros((self.batch * self.G, self.N, self.channels // self.G), self.dtype)
        return state.astype(self.dtype).reshape(self.batch * self.G, self.channels // self.G, self.N).mT

    def state(self, rows):
        return rows.mT.reshape(self.batch, self.channels, self.N)


def _sizes(T: int, N: int) -> tuple[int, int, int]:
    """Steps of a chunk, about sqrt(T) for the least memory, of a parallel block, and between saved states."""
    most = max(_LEAST_CHUNK, min(_CHUNK_STATES // max(1, N), isqrt(T)))
    chunk = min(T, 1 << most.bit_length() - 1)
    blocks = -(-T // max(_PARALLEL_STEPS, chunk))
    block = -(-T // (blocks * chunk)) * chunk
    few = _SAVED_STATES * chunk >= T
    return chunk, block, chunk if few else -(-T // (_SAVED_STATES * block)) * block


@partial(jax.jit, static_argnames=("discretization", "softplus", "conj_sym", "reverse", "method"))
def _selective_scan(steps, A, D, dt_bias, h0, reset, lengths, *, discretization, softplus, conj_sym, reverse, method):
    layout = _Layout(steps, A, D, dt_bias, h0)
    shape, dtype = steps.u.shape, steps.u.dtype
    T = shape[0]
    h0 = layout.rows(h0)
    if T == 0:
        return jnp.zeros(shape, dtype), layout.state(h0)
    o = Options(discretization, softplus, conj_sym, reverse, method, *_sizes(T, layout.N))
    valid = None if lengths is None else jnp.arange(T)[:, None] < lengths
    if reset is not None:
        reset = reset.reshape(T, -1)
        reset = reset if valid is None else reset & valid
        reset = reset if reset.shape[1] == 1 else jnp.repeat(reset, layout.G, axis=1)
    y, h = _run(o, layout.steps(steps), layout.weights(A, D, dt_bias), Masks(valid, reset), h0)
    return y, layout.state(h)


@partial(jax.jit, static_argnames=("discretization", "softplus", "conj_sym"))
def _update(steps, A, D, dt_bias, state, *, discretization, softplus, conj_sym):
    layout = _Layout(steps, A, D, dt_bias, state)
    o = Options(discretization, softplus, conj_sym, False, "sequential", 1, 1, 1)
    weights = layout.weights(A, D, dt_bias)
    step = jax.tree.map(jnp.ravel, layout.steps(steps))
    h, y = one_step(o, weights, layout.rows(state), (step, Masks(None, None)))
    return y.reshape(steps.u.shape), layout.state(h)


def _run(o: Options, steps: Steps, weights: Weights, masks: Masks, h0) -> Any:
    if o.method == "sequential":
        return runs.sequential(o, steps, weights, masks, h0)
    if o.method == "associative":
        return runs.forward_associative(o, steps, weights, masks, h0)[:2]
    return _streamed(o, (steps, weights, h0), masks)


def _blocked_forward(*args, o: Options):
    _refuse_cpu(o)
    return runs.forward_blocked(o, *args)


def _blocked_backward(*args, o: Options):
    return runs.backward_blocked(o, *args)


def _parallel_forward(*args, o: Options):
    return runs.forward_associative(o, *args)


def _parallel_backward(*args, o: Options):
    return runs.backward_associative(o, *args)


def _refuse_cpu(o: Options) -> None:
    if o.method == "pallas":
        raise ValueError('method="pallas": there are kernels for TPU and NVIDIA GPU, none for CPU; use method="auto"')


def _kernels(platform: str, o: Options, steps: Steps, weights: Weights, h0) -> Any:
    """The module of kernels for a platform, or None where its block rules do not fit."""
    kernels = importlib.import_module(f".pallas.{platform}", __package__)
    if _selective_kernels.fits(kernels, o, steps, weights, h0):
        return kernels
    if o.method == "pallas":
        raise ValueError(
            f'method="pallas": the {platform} kernel takes float32 or bfloat16 values with real A of shape (D, N), '
            f"N <= 32 (and D >= 512 on TPU), one group, no dt_A; got A {weights.A.dtype}{list(weights.A.mT.shape)}"
        )
    return None


def _kernel_forward(platform: str, steps, weights, masks, h0, *, o: Options):
    kernels = _kernels(platform, o, steps, weights, h0)
    if kernels is None:
        return runs.forward_associative(o, steps, weights, masks, h0)
    return _selective_kernels.forward(kernels, o, steps, weights, masks, h0)


def _kernel_backward(platform: str, steps, weights, masks, starts, dy, dh, *, o: Options):
    kernels = _kernels(platform, o, steps, weights, dh)
    if kernels is None:
        return runs.backward_associative(o, steps, weights, masks, starts, dy, dh)
    return _selective_kernels.backward(kernels, o, steps, weights, masks, starts, dy, dh)


def _native_forward(*args, o: Options):
    _refuse_cpu(o)
    steps, weights, _, h0 = args
    return (_selective_native if _selective_native.fits(o, steps, weights, h0) else runs).forward_blocked(o, *args)


def _native_backward(*args, o: Options):
    steps, weights, dh = args[0], args[1], args[-1]
    return (_selective_native if _selective_native.fits(o, steps, weights, dh) else runs).backward_blocked(o, *args)


_forward_by_platform = platform_primitive(
    "selective_scan", _parallel_forward,
    cpu=_blocked_forward, native=_native_forward,
    cuda=partial(_kernel_forward, "gpu"), tpu=partial(_kernel_forward, "tpu"),
)  # fmt: skip
_backward_by_platform = platform_primitive(
    "selective_scan_backward", _parallel_backward,
    cpu=_blocked_backward, native=_native_backward,
    cuda=partial(_kernel_backward, "gpu"), tpu=partial(_kernel_backward, "tpu"),
)  # fmt: skip


def _forward(o: Options, values, masks: Masks):
    run = partial(_blocked_forward, o=o) if o.method == "blocked" else partial(_forward_by_platform, o=o)
    steps, weights, h0 = values
    y, h, starts = run(steps, weights, masks, h0)
    return (y, h), starts


def _backward(o: Options, values, masks: Masks, starts, cotangents):
    run = partial(_blocked_backward, o=o) if o.method == "blocked" else partial(_backward_by_platform, o=o)
    steps, weights, _ = values
    return run(steps, weights, masks, starts, *cotangents)


def _plain(o: Options, values, masks: Masks):
    steps, weights, h0 = values
    return runs.forward_blocked(o, steps, weights, masks, h0)[:2]


_streamed = recomputed(_forward, _backward, _plain)
