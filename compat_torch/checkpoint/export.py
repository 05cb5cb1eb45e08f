"""Our modules written the way each reference writes them: `exported`, `save`, `save_pretrained`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import state
from .formats import TABLE, Format
from .writing import write_file, write_folder

if TYPE_CHECKING:
    from flax import nnx


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a module under a format's names; each is made when it is asked for, and not kept.

    Args:
        module: of the format's class.
        format: gives names and values.
        copies: a tied tensor is there under each of its names; otherwise without the copies of `format.ties`.
    """

    def __init__(self, module: nnx.Module, format: Format, copies: bool):
        found = list(state.entries(module))
        shared = Counter(id(entry.variable) for entry in found)
        left_out = set() if copies else {copy for copy, _ in format.ties}
        self._entries: dict[str, tuple[state.Entry, Any]] = {}
        for entry in found:
            target = format.written(entry.name)
            if target is not None and not (shared[id(entry.variable)] > 1 and target[0] in left_out):
                self._entries[target[0]] = (entry, target[1])

    def __getitem__(self, name: str) -> np.ndarray:
        entry, convert = self._entries[name]
        return convert(entry.view())

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def formats_of(module: nnx.Module) -> list[str]:
    """The formats that a module's class can be written in, its own reference's first; [] if there are none."""
    name = type(module).__name__
    return [
        entry.name
        for entry in TABLE.values()
        if entry.target.rpartition(":")[2] == name and type(module) is entry.load_class()
    ]


def exported(
    module: nnx.Module, format: str | None = None
) -> tuple[dict[str, Any] | None, Iterator[tuple[str, np.ndarray]]]:
    """The configuration and the tensors of a module, as the reference has them.

    Args:
        module: of a class that some format is read into.
        format: one of `FORMATS`, or a family of them, such as "hf" or "mamba_ssm"; None is the first of
            `formats_of(module)`.

    Returns:
        `(config, tensors)`: the content of config.json, None for a format without one, and (name, array) pairs in the
        reference's order of axes and dtype, made one at a time.

    Raises:
        ValueError: no such format, or the module cannot be written in it; the message says why.
    """
    entry = format_of(module, format)
    tensors = Tensors(module, entry, _with_copies(entry, entry.filename))
    return None if entry.config is None else entry.config(module), iter(tensors.items())


def format_of(module: nnx.Module, format: str | None) -> Format:
    """The format to write a module in.

    Raises:
        ValueError: as `exported`.
    """
    known, cls = formats_of(module), type(module).__name__
    if not known:
        raise ValueError(f"no checkpoint format has the class {cls}; compat_torch.state_dict(module) has its tensors")
    chosen = known[:1] if format is None else [name for name in known if format in (name, name.partition(".")[0])]
    if not chosen:
        raise ValueError(f"{cls} cannot be written as format={format!r}; choose from {', '.join(map(repr, known))}")
    entry = TABLE[chosen[0]]
    if reason := entry.unwritable(module):
        raise ValueError(f"{cls} cannot be written as {entry.name}: {reason}")
    return entry


def save(
    module: nnx.Module, path: str | os.PathLike[str], *, format: str | None = None, overwrite: bool = False
) -> None:
    """Write the weights of a module into one file, atomically, so that the reference and `load` read them.

    Args:
        module: of a class that some format is read into.
        path: ends in ".safetensors", or in ".pt" or ".bin" for a torch file (which needs torch).
        format: as for `exported`.
        overwrite: replace the file if it is there.

    Raises:
        ValueError: as `exported`; another ending. FileExistsError: see `overwrite`. ImportError: a torch file
            without torch.
    """
    write_file(path, Tensors(module, format_of(module, format), copies=True), overwrite=overwrite)


def save_pretrained(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    format: str | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write config.json and weights into a folder, atomically, so that the reference and `from_pretrained` read them.

    Args:
        module: a whole model.
        folder: made if it is not there; otherwise it must be empty.
        format: as for `exported`, with weights in the file that the reference reads; None is the first of
            `formats_of(module)` with weights in model.safetensors.
        source: the folder the model came from: tokenizer, generation_config.json, LICENSE and README are copied.
        overwrite: replace the folder if this function wrote it.

    Raises:
        ValueError: as `exported`; a format without config.json. FileExistsError: see `overwrite`. ImportError:
            pytorch_model.bin without torch.
    """
    entry = format_of(module, format)
    if entry.config is None:
        raise ValueError(f"{entry.name} has no config.json: use save(module, path)")
    filename = "model.safetensors" if format is None else entry.filename
    write_folder(
        folder, Tensors(module, entry, _with_copies(entry, filename)), entry.config(module), filename=filename,
        source=source, provenance={"format": entry.name}, overwrite=overwrite,
    )  # fmt: skip


def _with_copies(entry: Format, filename: str) -> bool:
    return entry.config is None or not filename.endswith(".safetensors")
