"""The PyTorch reference itself, traced into JAX: both sides under jit, grad and vmap of one framework.

Needs lrnnx and torch2jax (`pip install --no-deps torch2jax==0.1.0`), which runs a torch module on JAX values. What it
lacks of the operations that the reference uses is added here; a configuration that cannot be traced has a row that says
which operation stopped it. The reference's models with input-dependent dynamics loop over time in Python, so that their
traces grow with the sequence, and XLA's time with the square of it: they get the first steps of the sequence only.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .case import Run
from .compare import Precision, Row, Scores, check_forward, check_gradient, in_parts, paired
from .live import Configuration, ReferenceMissingError, configurations, import_class, in_float64, output_of
from .subjects import Subject, subjects_of

TORCH2JAX = "torch2jax==0.1.0"
LOOPED_STEPS = 12  # of a sequence, for a reference that loops over time
FORWARD_LIMIT = 1e-5  # of batches, relative to max(1, max|reference|), beside what float32 costs the reference
_LOOPED = "lrnnx.models.ltv."
_QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def rows(pattern: str | None, dtype: Precision) -> Iterator[list[Row]]:
    """One list of rows for each configuration of the installed reference whose name has `pattern` in it.

    A row compares the outputs under `jax.jit` and under `jax.vmap` (forward), and the gradients of the parameters and
    of the input; there are no steps.

    Raises:
        ValueError: a `dtype` other than float32. ReferenceMissingError: lrnnx or torch2jax is not installed.
    """
    if dtype != "float32":
        raise ValueError(f"the traced reference computes in float32 only, got dtype={dtype!r}")
    trace = _tracer()
    for index, configuration in enumerate(configurations()):
        if pattern is None or pattern in configuration.name:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")
                found = [_row(configuration, subject, trace, index) for subject in subjects_of(configuration.cls)]
            yield found


def _row(configuration: Configuration, subject: Subject, trace: Callable[..., Any], seed: int) -> Row:
    name = (configuration.name, f"torch2jax / {subject.name}")
    configuration, remark, options = _shortened(configuration)
    module, x, inputs, draw = _prepared(configuration, seed)
    params, fixed, names = _tensors(module)
    theirs = functools.partial(trace(module, tuple(inputs), fixed, names), *inputs.values())
    try:
        w = draw.standard_normal(jax.eval_shape(theirs, params, x[0]).shape, np.float32)
    except Exception as err:
        return Row(*name, None, None, None, None, "unsupported", f"not traced: {_reason(err)}")

    def ours(params, x):
        return subject.forward(configuration.kwargs, _under_all_names({**params, **fixed}, names), x, **inputs)

    scores = Scores()
    try:
        _compare(ours, theirs, module, params, x, inputs, w, options, scores)
    except Exception as err:
        scores.notes.append(_reason(err))
    return scores.row(*name, remark)


def _compare(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    module: Any,
    params: dict[str, jax.Array],
    x: np.ndarray,
    inputs: dict[str, jax.Array],
    w: np.ndarray,
    options: dict[str, Any],
    scores: Scores,
) -> None:
    """Score outputs and gradients of sum(y * w) at the first of the two inputs in `x`, and outputs of both by vmap."""
    import torch

    def run(function, *args):
        return jax.jit(function, compiler_options=options)(*args)

    def with_gradients(function):
        def loss(params, x):
            y = function(params, x)
            return jnp.sum(y * w), y

        (_, y), (of_params, of_x) = run(jax.value_and_grad(loss, (0, 1), has_aux=True), params, x[0])
        return np.asarray(y), {**of_params, "x": of_x}

    (y, mine), (expected, traced) = map(with_gradients, (ours, theirs))
    extra = {argument: torch.from_numpy(np.array(value)) for argument, value in inputs.items()}
    y64, grads64 = in_float64(module, torch.from_numpy(x[0].copy()), extra, torch.from_numpy(w))
    grads = {key: np.asarray(in_parts(jnp.conj(value))) for key, value in traced.items()}
    check_forward(y.astype(np.float64), Run("jit", x[0], expected, y64, w), "float32", scores)
    for key, ours_of, theirs_of in paired(mine, grads):
        check_gradient(np.asarray(ours_of, np.float64), theirs_of, grads64.get(key), f"grad.{key}", scores)
    batched = [run(jax.vmap(function, (None, 0)), params, x) for function in (ours, theirs)]
    scores.add("forward", _distance(*batched), FORWARD_LIMIT + 4 * _distance(expected, y64), "vmap")


def _prepared(configuration: Configuration, seed: int) -> tuple[Any, np.ndarray, dict[str, jax.Array], Any]:
    """The reference, two inputs for it, its further arguments, and the generator they are drawn from."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    module = import_class(configuration.cls)(**configuration.kwargs).eval()
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((2, *configuration.shape), np.float32)
    if getattr(module, "transposed", False):
        x = np.swapaxes(x, 2, 3)
    if any(name.endswith("l_kernel") for name in module.state_dict()):  # S4 rewrites C in its first forward
        prepared = copy.deepcopy(module)
        prepared(torch.from_numpy(x[0].copy()))
        module.load_state_dict(prepared.state_dict())
    inputs = {}
    if configuration.event:
        inputs["integration_timesteps"] = jnp.asarray(draw.uniform(0.1, 2.1, configuration.shape[:2]), jnp.float32)
    return module, x, inputs, draw


def _shortened(configuration: Configuration) -> tuple[Configuration, str, dict[str, Any]]:
    """What is traced of a configuration, what to say of it, and how to compile it."""
    B, L, H = configuration.shape
    if not configuration.cls.startswith(_LOOPED):
        return configuration, "", {}
    steps = min(L, LOOPED_STEPS)
    remark = f"{steps} of {L} steps" if steps < L else ""
    return replace(configuration, shape=(B, steps, H)), remark, _QUICK_TO_COMPILE


def _tensors(module: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, str]]:
    """The tensors of a module under their first names, and of every name the first one of the same tensor.

    Returns:
        The tensors that have gradients, the integers (which the reference branches on), and the names.
    """
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    names = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    arrays = {name: jnp.asarray(state[name].detach().numpy()) for name in first.values()}
    fixed = {name: array for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.inexact)}
    return {name: array for name, array in arrays.items() if name not in fixed}, fixed, names


def _under_all_names(params: dict[str, jax.Array], names: dict[str, str]) -> dict[str, jax.Array]:
    return {name: params[first] for name, first in names.items()}


def _reason(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).split('(*(')[0].splitlines()[0][:120]}"


def _distance(ours: Any, theirs: Any) -> float:
    scale = max(1.0, float(np.max(np.abs(theirs), initial=0.0)))
    return float(np.max(np.abs(np.asarray(ours) - theirs), initial=0.0)) / scale


def _tracer() -> Callable[..., Any]:
    """`trace(module, arguments, fixed, names) -> f(*inputs, params, x)`, with all operations registered."""
    try:
        torch2jax: Any = importlib.import_module("torch2jax")
    except ImportError as err:
        raise ReferenceMissingError(
            f"torch2jax is not installed; beside the reference, pip install --no-deps {TORCH2JAX}"
        ) from err
    _register(torch2jax)

    def trace(module: Any, arguments: tuple[str, ...], fixed: dict[str, jax.Array], names: dict[str, str]):
        import torch

        module = copy.deepcopy(module)
        for part in module.modules():
            for name in part._non_persistent_buffers_set:  # not in the state_dict, from which torch2jax takes buffers
                setattr(part, name, torch2jax.Torchish(jnp.asarray(part._buffers.pop(name).numpy())))

        class Call(torch.nn.Module):
            """The module on `(*inputs, x)`, its output alone."""

            def __init__(self):
                super().__init__()
                self.module = module

            def forward(self, *values):
                return output_of(self.module(values[-1], **dict(zip(arguments, values[:-1], strict=True))))

        traced = torch2jax.t2j(Call())

        def function(*values):
            *inputs, params, x = values
            state = {f"module.{name}": value for name, value in _under_all_names({**params, **fixed}, names).items()}
            return traced(*inputs, x, state_dict=state)

        return function

    return trace


def _register(torch2jax: Any) -> None:
    """Add what the reference uses and torch2jax lacks: functions, methods of tensors, a backend of einops."""
    import torch
    from einops._backends import JaxBackend

    Torchish = torch2jax.Torchish

    def plain(arg: Any) -> Any:
        if isinstance(arg, Torchish):
            return arg.value
        if isinstance(arg, torch.Tensor):
            return jnp.asarray(arg.detach().numpy())
        if isinstance(arg, torch.dtype):
            return jnp.dtype(torch2jax.t2j_dtype(arg))
        return type(arg)(map(plain, arg)) if isinstance(arg, list | tuple) else arg

    def wrapped(result: Any) -> Any:
        return tuple(map(Torchish, result)) if isinstance(result, list | tuple) else Torchish(result)

    def lifted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: wrapped(function(*plain(args), **{k: plain(v) for k, v in kwargs.items()}))

    def scatter_(self, dim, index, src):
        self.value = jnp.put_along_axis(self.value, index.value, src.value, dim, inplace=False)
        return self

    for owner, name, function in _functions():
        torch2jax.implements(getattr(owner, name), Torchishify_output=False)(lifted(function))
    for name, function in _METHODS.items():
        setattr(Torchish, name, lifted(function))
    Torchish.scatter_ = scatter_
    for name in ("contiguous", "requires_grad_", "to_dense"):
        setattr(Torchish, name, lambda self, *args, **kwargs: self)
    Torchish.is_complex = lambda self: jnp.iscomplexobj(self.value)
    Torchish.device, Torchish.is_cuda = torch.device("cpu"), False
    Torchish.real = property(lambda self: Torchish(self.value.real))
    Torchish.imag = property(lambda self: Torchish(self.value.imag))
    Torchish.size = lambda self, dim=None: self.shape if dim is None else self.shape[dim]
    Torchish.__iter__ = lambda self: map(Torchish, self.value)
    Torchish.__len__ = lambda self: len(self.value)
    Torchish.__getitem__ = lambda self, key: Torchish(self.value[plain(key)])

    class Backend(JaxBackend):
        framework_name = "torch2jax"

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Torchish)

    for name in ("reshape", "transpose", "tile", "add_axis", "stack_on_zeroth_dimension", "reduce", "einsum"):
        setattr(Backend, name, _through(getattr(JaxBackend, name), plain, wrapped))
    torch2jax.einops_backend = Backend  # einops finds it among the subclasses, as long as it lives


def _through(method: Callable[..., Any], plain: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """A method of einops' backend on the values inside."""
    return lambda self, *args, **kwargs: wrapped(method(self, *plain(args), **kwargs))


def _functions() -> list[tuple[Any, str, Callable[..., Any]]]:
    import torch
    import torch.nn.functional as F

    def gelu(x, approximate="none"):
        return jax.nn.gelu(x, approximate=approximate != "none")

    shared = [(torch, name, function) for name, function in _METHODS.items() if hasattr(torch, name)]
    return [
        *shared,
        *((torch.fft, name, _fft(name)) for name in ("fft", "ifft", "rfft", "irfft")),
        (torch, "is_complex", jnp.iscomplexobj),
        (torch, "eye", lambda n, **_: jnp.eye(n)),
        (torch.linalg, "inv", jnp.linalg.inv),
        (torch, "einsum", lambda equation, *operands: jnp.einsum(equation, *operands, precision="highest")),
        (torch, "real", jnp.real),
        (torch, "stack", lambda tensors, dim=0: jnp.stack(tensors, dim)),
        (torch, "complex", jax.lax.complex),
        (torch, "where", jnp.where),
        (torch, "conv1d", _conv1d),
        (F, "linear", lambda x, w, b=None: jnp.matmul(x, w.T, precision="highest") + (0 if b is None else b)),
        (F, "gelu", gelu),
        (F, "silu", lambda x, inplace=False: jax.nn.silu(x)),
        (F, "softplus", lambda x, beta=1, threshold=20: jax.nn.softplus(x)),
    ]


def _conv1d(x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    pads = [(p, p) for p in padding]
    y = jax.lax.conv_general_dilated(
        x, weight, stride, pads, rhs_dilation=dilation, feature_group_count=groups, precision="highest"
    )
    return y if bias is None else y + bias[:, None]


def _split(x, sizes, dim=0):
    sizes = [sizes] * (x.shape[dim] // sizes) if isinstance(sizes, int) else sizes
    return jnp.split(x, np.cumsum(sizes)[:-1], dim)


def _to(x, *args, **kwargs):
    dtype = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, np.dtype)), None)
    return x if dtype is None else x.astype(dtype)


def _fft(name):
    function = getattr(jnp.fft, name)
    return lambda x, n=None, dim=-1: function(x, n, dim)


_METHODS: dict[str, Callable[..., Any]] = {
    "__add__": lambda x, y: x + y,
    "__radd__": lambda x, y: y + x,
    "__sub__": lambda x, y: x - y,
    "__rsub__": lambda x, y: y - x,
    "__mul__": lambda x, y: x * y,
    "__rmul__": lambda x, y: y * x,
    "__pow__": lambda x, y: x**y,
    "__neg__": jnp.negative,
    "__truediv__": jnp.divide,
    "__rtruediv__": lambda x, y: y / x,
    "__rpow__": lambda x, y: y**x,
    "__matmul__": functools.partial(jnp.matmul, precision="highest"),
    "cfloat": lambda x: x.astype(jnp.complex64),
    "chunk": lambda x, chunks, dim=0: jnp.array_split(x, chunks, dim),
    "conj": jnp.conj,
    "clamp": lambda x, min=None, max=None: jnp.clip(x, min, max),
    "diag": jnp.diag,
    "exp": jnp.exp,
    "expm1": jnp.expm1,
    "float": lambda x: x.astype(jnp.float32),
    "log": jnp.log,
    "new_zeros": lambda x, *shape, **_: jnp.zeros(shape if isinstance(shape[0], int) else shape[0], x.dtype),
    "reciprocal": jnp.reciprocal,
    "repeat_interleave": jnp.repeat,
    "sinh": jnp.sinh,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "split": _split,
    "squeeze": jnp.squeeze,
    "sum": lambda x, dim=None, keepdim=False: jnp.sum(x, dim, keepdims=keepdim),
    "t": jnp.transpose,
    "to": _to,
    "type_as": lambda x, other: x.astype(other.dtype),
    "unbind": lambda x, dim=0: list(jnp.moveaxis(x, dim, 0)),
    "unsqueeze": jnp.expand_dims,
    "view_as_complex": lambda x: jax.lax.complex(x[..., 0], x[..., 1]),
    "view_as_real": lambda x: jnp.stack([x.real, x.imag], -1),
}
