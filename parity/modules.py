"""A torch module and what is to take its place, on the same input: for the tests of a migration."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from compat_torch.checkpoint.detection import renamed

from .case import STEP_LIMIT, Arrays, Run
from .compare import Row, Scores, check_forward, check_gradient, distance
from .torch_run import gradients, in_float64, output_of

if TYPE_CHECKING:
    import torch
    from flax import nnx

    from compat_torch.checkpoint.formats import Format


def compare_modules(
    theirs: torch.nn.Module,
    x: Any,
    ours: nnx.Module | torch.nn.Module | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    steps: Callable[[Any], torch.Tensor] | None = None,
    output: Callable[[Any], torch.Tensor] = output_of,
) -> Row:
    """Outputs, gradients and steps of a torch module and of what replaces it, judged as the stored cases are.

    Both are copied and run in eval mode, in float32; the truth is what `theirs` computes in float64, if it can.
    Gradients are those of sum(y * w), w random: of each parameter that `theirs` trains, and of x. A first forward pass
    that rewrites weights (S4) has been done before anything is compared.

    Args:
        theirs: with float32 weights, on the CPU.
        x: its input, as a tensor or an array: float32, or integers such as token ids.
        ours: with the same weights: an NNX module, a module of `compat_torch.nn` or one that contains some; None is
            `compat_torch.from_torch(theirs)`.
        inputs: further arguments by name that both take, such as integration_timesteps.
        rename: (regular expression, replacement) pairs that turn names of parameters of `theirs` into those of `ours`;
            those of an NNX module are the names of `compat_torch.wrap(ours)`.
        steps: called with each of the two as a torch module, with its cache and its `step`; the outputs step by step.
        output: the tensor to compare, from what a call gives.

    Returns:
        The outcome; `verdict` is "identical" or "differs", and `note` says what differs. What "identical" means is in
        docs/parity.md.

    Raises:
        ImportError: torch is not installed.
        TypeError: `theirs` is no torch module, `ours` neither that nor an NNX module; or `from_torch` does not know
            `theirs`.
        ValueError: weights or inputs of another floating dtype, or outputs of different shapes.
        Exception: what either of them raises.
    """
    try:
        import torch
    except ImportError as err:
        raise ImportError("comparing torch modules needs PyTorch: pip install 'spyx-torch[torch]'") from err

    from compat_torch import from_torch
    from compat_torch.nn.convert import format_of

    if not isinstance(theirs, torch.nn.Module):
        raise TypeError(f"theirs must be a torch.nn.Module, got {type(theirs).__name__}; the JAX module goes to ours")
    reference = copy.deepcopy(theirs).eval()
    for name, value in reference.state_dict().items():
        _check_dtype(f"{name} of theirs", value)
    given = {name: _tensor(name, value) for name, value in (inputs or {}).items()}
    x = _tensor("x", x)
    with torch.no_grad():
        w = torch.randn(output(reference(x, **given)).shape, generator=torch.Generator().manual_seed(0))
    twin = _as_torch(from_torch(reference) if ours is None else ours)
    table = format_of(reference) if ours is None else None
    remark, exact = "", None
    try:
        with jax.enable_x64(True):  # for modules of compat_torch.nn in it
            exact = in_float64(copy.deepcopy(reference), x, given, w, output)
    except Exception as err:
        remark = f"judged without float64, in which the torch module does not run ({type(err).__name__}: {err})"
    y, grads = _run(reference, x, given, w, output)
    y_ours, grads_ours = _run(twin, x, given, w, output)

    scores = Scores()
    if exact is None:
        scores.add("forward", distance(y_ours, y, y), 1e-5, "forward")
    else:
        check_forward(y_ours.astype(np.float64), Run("forward", x.numpy(), y, exact[0]), "float32", scores)
    trained = {name: name for name, value in reference.named_parameters() if value.requires_grad}
    wanted = exact[1] if exact else {}
    _check_gradients(renamed(trained, rename, "theirs"), grads, wanted, _under_names(twin, table), grads_ours, scores)
    if steps is not None:
        with torch.no_grad():
            stepped, ours_stepped = (steps(model).numpy() for model in (reference, twin))
        scores.add("step", distance(ours_stepped, stepped, y), STEP_LIMIT, "steps")
    return scores.row(type(theirs).__name__, _home(twin), remark)


def assert_identical(theirs: torch.nn.Module, x: Any, ours: Any = None, **options: Any) -> Row:
    """`compare_modules`, which must say "identical".

    Args:
        theirs, x, ours, **options: as for `compare_modules`.

    Returns:
        The outcome.

    Raises:
        AssertionError: they differ; the message says in what.
        Exception: as `compare_modules`.
    """
    row = compare_modules(theirs, x, ours, **options)
    if row.verdict != "identical":
        raise AssertionError(f"{row.case} and {row.subject} differ: {row.note}")
    return row


def _run(model: Any, x: Any, inputs: dict[str, Any], w: Any, output: Callable[[Any], Any]) -> tuple[np.ndarray, Arrays]:
    """Outputs, and the gradients of sum(y * w) by name."""
    import torch

    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        x = x.clone().requires_grad_(x.is_floating_point())
        y = output(model(x, **inputs))
        if y.shape != w.shape:
            raise ValueError(
                f"theirs gives shape {tuple(w.shape)}, ours {tuple(y.shape)}; output= picks one of several"
            )
        return y.detach().numpy(), gradients(model, x, y, w) if y.requires_grad else {}


class _Parameter(NamedTuple):
    """A parameter of ours: the first of its names, its shape, and what turns its gradient into the reference's."""

    name: str
    shape: tuple[int, ...]
    write: Callable[[np.ndarray], np.ndarray]


def _under_names(twin: Any, table: Format | None) -> dict[str, _Parameter]:
    """The parameters of a module under each of their names, as a checkpoint format has them, if there is one."""
    first = {id(value): name for name, value in twin.named_parameters()}
    found = {}
    for name, value in twin.named_parameters(remove_duplicate=False):
        target = (name, lambda gradient: gradient) if table is None else table.written(name)
        if target is not None:
            shape = (*value.shape, 2) if value.is_complex() else tuple(value.shape)
            found[target[0]] = _Parameter(first[id(value)], shape, target[1])
    return found


def _check_gradients(
    trained: Mapping[str, str],
    theirs: Arrays,
    exact: Arrays,
    known: Mapping[str, _Parameter],
    ours: Arrays,
    scores: Scores,
) -> None:
    """Score the gradient of x and of each parameter; `trained` is from its name in `known` to that in `theirs`."""
    for target, name in trained.items():
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            scores.notes.append(f"ours has no parameter {target!r}" + (f", but {near[0]!r}" if near else ""))
            continue
        own = known[target]
        value = own.write(ours.get(own.name, np.zeros(own.shape)))
        wanted = theirs.get(name, np.zeros(value.shape))
        if value.shape == wanted.shape:
            check_gradient(value, wanted, exact.get(name), f"grad.{name}", scores)
        else:
            scores.notes.append(f"the gradient of {name} has shape {wanted.shape}, ours {value.shape}")
    if "x" in theirs or "x" in ours:
        nothing = np.zeros_like(theirs["x"] if "x" in theirs else ours["x"])
        check_gradient(ours.get("x", nothing), theirs.get("x", nothing), exact.get("x"), "grad.x", scores)
    reached = {known[target].name for target in trained if target in known}
    for name in sorted(ours.keys() - reached - {"x"}):
        if np.any(ours[name]):
            scores.notes.append(f"ours has a gradient for {name!r}, theirs trains no such parameter")


def _as_torch(ours: Any) -> Any:
    """A copy of the module as a torch one, in eval mode."""
    import torch
    from flax import nnx

    from compat_torch import wrap

    if isinstance(ours, torch.nn.Module):
        return copy.deepcopy(ours).eval()
    if not isinstance(ours, nnx.Module):
        raise TypeError(f"ours must be an nnx.Module or a torch.nn.Module, got {type(ours).__name__}")
    return wrap(ours).eval()


def _tensor(name: str, value: Any) -> Any:
    import torch

    tensor = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    _check_dtype(name, tensor)
    return tensor


def _check_dtype(name: str, tensor: Any) -> None:
    import torch

    if tensor.dtype not in (torch.float32, torch.complex64) and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"{name} must be float32 or complex64 for this comparison, got {tensor.dtype}")


def _home(module: Any) -> str:
    cls = getattr(module, "jax_class", type(module))
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"
