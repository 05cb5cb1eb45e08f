"""Quantisation of dense layers, convolutions and state-space projections with qwix.

Rules are lists of `qwix.QuantizationRule`; the first one that fits a layer counts. A rule selects layers, not
primitives: `module_path` is a regular expression for the whole path of a layer ("layers/0", "block/in_proj") and
`op_names` are kinds of layers:

| op name | layers | in which rules |
|---|---|---|
| dot_general | `nnx.Linear`, `nnx.LinearGeneral` | all |
| conv_general_dilated | `nnx.Conv` | all |
| einsum | `nnx.Einsum` | by name: `extra_op_names=("einsum",)` |
| ssm_projection | B and C of `spyx.ssm.LRU`, `S5Diag` | by name: `projection_rules()` |

What a rule does not name stays float: recurrences, state matrices, spiking dynamics. A layer is quantised wherever it
is called from: the model, `step`, `spyx.nn.run`, inside `lax.scan`, under `jit` and `grad`. A subclass with a
`__call__` of its own is not quantised, nor is a kernel that is read without calling its layer.

Importing is always safe; without qwix the functions that need it raise ImportError.

Source: qwix (https://github.com/google/qwix); Q-S5 (arXiv:2406.09477) for leaving the recurrence alone.
"""

from __future__ import annotations

from ._quantize import quantize
from ._report import Report, report
from ._rules import (
    available,
    binary_activation_error,
    bitnet_ternary_rules,
    linear_only_rules,
    projection_rules,
    spiking_feedforward_rules,
    weights_only_rules,
)

__all__ = [
    "Report",
    "available",
    "binary_activation_error",
    "bitnet_ternary_rules",
    "linear_only_rules",
    "projection_rules",
    "quantize",
    "report",
    "spiking_feedforward_rules",
    "weights_only_rules",
]
