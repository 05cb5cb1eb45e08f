"""`convert`: a checkpoint of one format in, the same model in another out, and the proof that it is the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ..arrays import as_views, contiguous
from ..errors import CheckpointError
from . import export
from .detection import Content, read_content
from .folder import open_folder
from .hub import locate
from .loading import build, load
from .state_dict import open_file
from .writing import Progress, check_target, hashes_of, write_file, write_folder, write_orbax

_SUFFIXES = (".safetensors", ".bin", ".pt")
_STEPS = 24


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how it was checked.

    Attributes:
        path: what was written.
        source, target: names of formats ("orbax" is one).
        tensors, nbytes: how many, and of what size.
        difference: None if it was not verified; otherwise max |y - r| / max(1, max |r|) of the outputs of the model
            read back and of the source in float64.
    """

    path: Path
    source: str
    target: str
    tensors: int
    nbytes: int
    difference: float | None = None


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    format: str | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Conversion:
    """Read a checkpoint of any known format and write it as another, all or nothing.

    Args:
        path: a file, a folder, or a repository "owner/name" on the hub.
        out: folder to write; for a single layer also a file ending in .safetensors, .bin or .pt.
        to: name of a format or its family ("hf", "mamba_ssm", "lrnnx", "s4"), or "orbax": the pure dict of the module's
            state, which `nnx.replace_by_pure_dict` takes.
        format: of the source; by default found, as by `load`.
        dtype: of the floating point parameters; None keeps them as they are.
        revision: branch, tag or commit of a repository.
        verify: read the result back, compare it bit for bit with what was to be written, and its outputs with those
            of the source in float64.
        overwrite: as for `write_folder`.
        allow_nonfinite: accept NaN and infinite weights.
        progress: called with (bytes of tensors written, bytes in all).
        **kwargs: constructor arguments that the checkpoint does not store, as for `load`.

    Returns:
        What was converted.

    Raises:
        ValueError: the model cannot be written as `to`. FileExistsError: as `write_folder`.
        CheckpointError: as `load`; or the verification found a difference, and then `out` is not made.
    """
    source, out = locate(path, revision), Path(out)
    if out.suffix not in _SUFFIXES:
        check_target(out, overwrite, source)
    content = read_content(source)
    with hashes_of(None if out.suffix in _SUFFIXES else source) as hashes, _wide(content, dtype):
        with contextlib.nullcontext() if to == "orbax" else as_views():
            built = build(content, format, dtype, True, allow_nonfinite, kwargs)
        model, detection = built.module, built.detection
        entry = None if to == "orbax" else export.format_of(model, to)
        target = "orbax" if entry is None else entry.name
        about = {
            "format": {"from": detection.format, "to": target},
            "dtype": None if dtype is None else np.dtype(dtype).name,
        }
        unwritten = {name: value for name, value in kwargs.items() if name not in detection.taken}
        difference = None

        def check(written: Path) -> None:
            nonlocal difference
            difference = _verify(written, model, entry, unwritten)

        options: dict[str, Any] = {"overwrite": overwrite, "check": check if verify else None}
        beside: dict[str, Any] = {"source": source, "hashes": hashes, "provenance": about}
        if entry is None:
            tensors = nnx.to_pure_dict(nnx.state(model))
            write_orbax(out, tensors, detection.config, **beside, **options)
        else:
            config, pairs = export.exported(model, target)
            tensors = dict(pairs)
            options["progress"] = progress
            if out.suffix not in _SUFFIXES:
                write_folder(out, tensors, config, filename=entry.filename, **beside, **options)
            elif config is None:
                write_file(out, tensors, **options)
            else:
                raise ValueError(f"{target} is a folder with config.json, but {out} names a file")
    leaves = jax.tree.leaves(tensors)
    return Conversion(out, detection.format, target, len(leaves), sum(leaf.nbytes for leaf in leaves), difference)


def outputs(model: nnx.Module, seed: int = 0) -> np.ndarray:
    """The model's output for random input of a layout that it accepts: token ids, or (B, L, H), (B, H, L), (L, H).

    Raises:
        CheckpointError: it accepts none of them.
    """
    rng = np.random.default_rng(seed)
    refusals = []
    dtype = next(leaf.dtype for leaf in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(leaf.dtype, jnp.floating))
    for shape in _layouts(model):
        ids = len(shape) == 2 and shape[0] == 1
        high = min(int(getattr(model, "vocab_size", 0) or getattr(getattr(model, "config", None), "vocab_size", 8)), 8)
        x = rng.integers(0, high, shape) if ids else rng.standard_normal(shape)
        try:
            y = _run(model, jnp.asarray(x, jnp.int32 if ids else dtype))
        except (TypeError, ValueError) as err:
            refusals.append(" ".join(str(err).split())[:120])
            continue
        y = getattr(y, "logits", jax.tree.leaves(y)[0])
        return np.asarray(y, np.complex128 if jnp.iscomplexobj(y) else np.float64)
    raise CheckpointError(
        f"no random input suits {type(model).__name__}, so that its outputs were not compared: {refusals}"
    )


@nnx.jit
def _run(model: Any, x: jax.Array) -> Any:
    return model(x)


def _layouts(model: nnx.Module) -> Iterator[tuple[int, ...]]:
    yield (1, _STEPS)
    widths = [getattr(model, name, None) for name in ("input_dim", "d_input", "in_channels", "d_model", "H", "width")]
    for width in dict.fromkeys(width for width in widths if isinstance(width, int)):
        yield from ((1, _STEPS, width), (1, width, _STEPS), (_STEPS, width))


@contextlib.contextmanager
def _wide(content: Content, dtype: DTypeLike | None) -> Iterator[None]:
    """64-bit values on, if the result has some."""
    wide = (np.float64, np.complex128)
    dtypes = [value.dtype for value in content.tensors.values()] if dtype is None else [np.dtype(dtype)]
    with jax.enable_x64(True) if any(kind in wide for kind in dtypes) else contextlib.nullcontext():
        yield


def _verify(out: Path, model: nnx.Module, entry: export.Format | None, kwargs: Mapping[str, Any]) -> float:
    again = _read_orbax(out, model) if entry is None else _read_back(out, model, entry, kwargs)
    y, r32 = outputs(again), outputs(model)
    with jax.enable_x64(True):
        r64 = outputs(_widened(model))
    scale = max(1.0, float(np.max(np.abs(r64), initial=0)))
    noise = float(np.max(np.abs(r32 - r64), initial=0))
    if not np.max(np.abs(y - r32), initial=0) <= 1e-5 * scale + 2 * noise:
        raise CheckpointError(
            f"{out}: the model read back gives other outputs than the source: {np.max(np.abs(y - r32))}"
        )
    return float(np.max(np.abs(y - r64), initial=0)) / scale


def _read_back(out: Path, model: nnx.Module, entry: export.Format, kwargs: Mapping[str, Any]) -> nnx.Module:
    written = (open_folder(out) if out.is_dir() else open_file(out)).tensors
    for name, value in export.exported(model, entry.name)[1]:
        if name not in written or not _same_bits(written[name], value):
            raise CheckpointError(f"{out}: {name} is not what was to be written")
    return load(out, format=entry.name, allow_nonfinite=True, **kwargs)


def _read_orbax(out: Path, model: nnx.Module) -> nnx.Module:
    import orbax.checkpoint as ocp

    graph, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out.absolute() / "state", tree)
    same = jax.tree.map(lambda a, b: _same_bits(np.asarray(a), np.asarray(b)), tree, restored)
    if not all(jax.tree.leaves(same)):
        raise CheckpointError(f"{out}: the state read back is not what was to be written")
    nnx.replace_by_pure_dict(state, restored)
    return nnx.merge(graph, state)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (contiguous(value).reshape(-1).view(np.uint8) for value in (a, b))
    return np.array_equal(left, right)


def _widened(model: nnx.Module) -> nnx.Module:
    """The model with the same values in float64."""

    def widen(leaf: Any) -> Any:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(widen, state))
