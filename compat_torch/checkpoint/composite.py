"""`load_into`: a checkpoint's tensors into a user's own module that holds our layers and Flax's."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from .. import state
from ..arrays import release
from ..errors import CheckpointError, StateDictMismatchError
from .detection import matches, read_content
from .loading import check_finite

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did.

    Attributes:
        loaded: names of the module that got a value.
        skipped: names, of file or module, that `ignore` left out.
        missing: names of the module that the file lacks; they keep their values.
        unused: names of the file that the module lacks.
        mis_shaped: lines "name: expected ..., got ...".
        nearest: for each name in `missing` the nearest one in `unused`, and the other way round.
    """

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mis_shaped: tuple[str, ...]
    nearest: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Nothing is missing, unused or mis-shaped."""
        return not (self.missing or self.unused or self.mis_shaped)


def load_into(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    rename: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    strict: bool = True,
    dtype: DTypeLike | None = None,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Load a checkpoint into a module of your own, by the names PyTorch would give its parameters.

    The name of a parameter is the dotted path of attributes to it; layers of compat_torch have their reference's names
    below that, Flax's Linear, Conv, Embed and norms torch's (`weight`, `bias`, `running_mean`, `running_var`) with
    torch's order of axes.

    Args:
        model: any `nnx.Module`, at any depth with layers of compat_torch and of Flax; it is changed in place, either
            completely or, on an error, not at all.
        path: a file, or a folder with weights.
        prefix: read only the sub-tree of the file below this dotted name.
        rename: (regular expression, replacement) pairs, applied to every name of the file in turn.
        ignore: regular expressions; names of the file (before `rename`) and of the module in which one is found are
            left out.
        strict: raise unless every name of the file and of the module is used. Otherwise what does not fit is left
            as it is and reported.
        dtype: floating dtype of the parameters; by default the file's.
        allow_nonfinite: accept NaN and infinite weights.

    Returns:
        what was loaded and what was not.

    Raises:
        FileNotFoundError, CorruptCheckpointError: as `read_state_dict`.
        StateDictMismatchError: missing, unused (when strict) or mis-shaped tensors (when strict); all are listed.
        CheckpointError: NaN or infinite weights, unequal copies of one parameter, two names made one by `rename`,
            float64 without jax_enable_x64, a ConvTranspose without transpose_kernel=True (torch's has it).
    """
    content = read_content(path, prefix=prefix, rename=rename, ignore=ignore, seek_config=False)
    everything = list(_entries(model))
    known = [entry for entry in everything if not matches(ignore, entry.name)]
    names = {entry.name for entry in known}
    tensors = {name: value for name, value in content.tensors.items() if not _bookkeeping(name)}
    given = {id(entry.variable) for entry in known if entry.name in tensors}
    missing = [entry.name for entry in known if id(entry.variable) not in given]
    unused = [name for name in tensors if name not in names]
    mis_shaped, loads = _fitting(known, tensors, dtype, content.path)
    if strict and (missing or unused or mis_shaped):
        target = f"{type(model).__name__} (read from {content.path})"
        raise StateDictMismatchError(target, missing, unused, mis_shaped, missing or sorted(names))
    if not allow_nonfinite:
        check_finite({entry.name: array for entry, array in loads}, content.path)
    for entry, array in loads:
        entry.write(array, dtype)
        release(array)
    written = {id(entry.variable) for entry, _ in loads}
    return LoadReport(
        loaded=tuple(entry.name for entry in known if id(entry.variable) in written),
        skipped=(*content.ignored, *(entry.name for entry in everything if entry.name not in names)),
        missing=tuple(missing),
        unused=tuple(unused),
        mis_shaped=tuple(mis_shaped),
        nearest={**_nearest(missing, unused), **_nearest(unused, missing)},
    )


def _entries(model: nnx.Module) -> Iterator[state.Entry]:
    """What `state.entries` gives, and the statistics of BatchNorm under torch's names."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel:
            where = ".".join(map(str, path))
            raise CheckpointError(
                f"{where} is a ConvTranspose with the kernel of a Conv: construct it with transpose_kernel=True, as "
                "torch's is, or load it by hand"
            )
    yield from state.entries(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for leaf, variable in (("running_mean", module.mean), ("running_var", module.var)):
                yield state.Entry(".".join((*map(str, path), leaf)), variable, False)


def _bookkeeping(name: str) -> bool:
    """A count that BatchNorm keeps in torch and Flax does not."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _fitting(
    known: Sequence[state.Entry], tensors: Mapping[str, np.ndarray], dtype: Any, path: str
) -> tuple[list[str], list[tuple[state.Entry, np.ndarray]]]:
    """The lines for what does not fit, and what to write: one array for each variable."""
    mis_shaped: list[str] = []
    loads: dict[int, tuple[state.Entry, np.ndarray]] = {}
    for entry in known:
        if entry.name not in tensors:
            continue
        array = _spatial(entry, np.asarray(state.as_array(entry.name, tensors[entry.name], dtype)))
        first, value = loads.get(id(entry.variable), (entry, array))
        if problem := entry.misfit(array):
            mis_shaped.append(problem)
        elif value is not array and not np.array_equal(value, array, equal_nan=value.dtype.kind == "f"):
            raise CheckpointError(f"{path}: {entry.name} and {first.name} are one parameter, but their values differ")
        else:
            loads[id(entry.variable)] = (first, value)
    return mis_shaped, list(loads.values())


def _spatial(entry: state.Entry, array: np.ndarray) -> np.ndarray:
    """The kernel of a convolution in more than one dimension: the order of its spatial axes is not reversed."""
    if not entry.reversed_axes or array.ndim < 4:
        return array
    return array.transpose(0, 1, *reversed(range(2, array.ndim)))


def _nearest(names: Sequence[str], among: Sequence[str]) -> dict[str, str]:
    near = {name: difflib.get_close_matches(name, among, n=1) for name in names[:100]}
    return {name: found[0] for name, found in near.items() if found}
