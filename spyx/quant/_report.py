"""What quantisation did to a model."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ._quantize import Path, Quantization, float_class
from ._rounding import StoredWeight


class Row(NamedTuple):
    """One module that has parameters of its own."""

    path: str
    layer: str
    weight: str
    """Type that the weights are rounded to, or the dtype they have."""
    act: str | None
    """Type that the inputs are rounded to; None where they stay as they are."""
    bits_before: int
    bits_after: int
    """Bits of a stored weight: those of a float in "qat"."""
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Report:
    """A row for each module with parameters; `str()` is a table."""

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Of all parameters."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Of all parameters, scales included."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        table = [("path", "layer", "weight", "act", "bits", "bytes")]
        for r in self.rows:
            bits, size = f"{r.bits_before} -> {r.bits_after}", f"{r.bytes_before} -> {r.bytes_after}"
            table.append((r.path, r.layer, r.weight, r.act or "-", bits, size))
        table.append(("total", "", "", "", "", f"{self.bytes_before} -> {self.bytes_after}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)
        return "\n".join(lines)


def report(model: nnx.Module, qmodel: nnx.Module) -> Report:
    """Types, bits and bytes of the parameters of a model before and after `quantize`.

    Bytes are those of the arrays stored, types below 8 bits counted as packed (on a CPU, JAX gives each a byte):
    "qat" keeps float weights, so it saves nothing yet. qwix stores "int2" and "int3" in 4 bits, "int5" to "int7" in 8.

    Args:
        model: the float model.
        qmodel: what `quantize` made of it.

    Raises:
        TypeError: not modules. ValueError: the models have different modules.
    """
    for name, module in (("model", model), ("qmodel", qmodel)):
        if not isinstance(module, nnx.Module):
            raise TypeError(f"{name} must be an nnx.Module, got {type(module).__name__}")
    before, after = _owned(model), _owned(qmodel)
    if before.keys() != after.keys():
        different = sorted("/".join(map(str, path)) for path in before.keys() ^ after.keys())
        raise ValueError(f"qmodel must be the quantised model, but these modules are in one only: {different}")
    return Report(tuple(_row(path, before[path], after[path]) for path in before))


def _owned(model: nnx.Module) -> dict[Path, tuple[nnx.Module, list[jax.Array]]]:
    """The modules with parameters of their own, and these."""
    modules = dict(nnx.iter_modules(model))
    owned: dict[Path, tuple[nnx.Module, list[jax.Array]]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, StoredWeight))):
        owner = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in modules)
        owned.setdefault(owner, (modules[owner], []))[1].extend(jax.tree.leaves(variable))
    return owned


def _row(path: Path, before, after) -> Row:
    (module, old), (quantized, new) = before, after
    done: Quantization | None = getattr(quantized, "quantization", None)
    bits_before, bits_after = (_bits(max(values, key=lambda x: (x.size, -_bits(x)))) for values in (old, new))
    return Row(
        "/".join(map(str, path)), float_class(module).__name__,
        _type(done.weight) if done else str(old[0].dtype), _type(done.act) if done and done.act else None,
        bits_before, bits_after, sum(map(_bytes, old)), sum(map(_bytes, new)),
    )  # fmt: skip


def _type(qtype) -> str:
    return qtype if isinstance(qtype, str) else jnp.dtype(qtype).name


def _bits(x: jax.Array) -> int:
    return jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).bits


def _bytes(x: jax.Array) -> int:
    return -(-x.size * _bits(x) // 8)
