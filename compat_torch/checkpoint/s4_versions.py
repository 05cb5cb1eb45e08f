"""Checkpoints of state-spaces/s4 before version 4, under the names and with the values of version 4."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import CheckpointError

Values = Callable[[np.ndarray], np.ndarray]

_KERNEL = re.compile(r"(?P<root>(?:.*?\.)??)kernel\.(?:kernel\.)?(?P<leaf>[A-Za-z_]+)")
_OLD = {"inv_w_real", "log_w_real", "w_imag"}


def _same(value: np.ndarray) -> np.ndarray:
    return value


_LEAVES: dict[str, tuple[str, Values]] = {
    "log_dt": ("inv_dt", lambda value: value[:, None] if value.ndim == 1 else value),
    "inv_w_real": ("A_real", _same),
    "log_w_real": ("A_real", _same),
    "w_imag": ("A_imag", np.negative),
    "L": ("l_kernel", _same),
}


def upgrade(tensors: Mapping[str, np.ndarray], path: str) -> tuple[Mapping[str, np.ndarray], int]:
    """Bring S4 layers to version 4.

    `kernel.kernel.X` (or `kernel.X`) and `D` of such a layer move below `layer.`; log_dt (H) becomes inv_dt (H, 1),
    inv_w_real and log_w_real A_real, w_imag -A_imag, L l_kernel. Everything else is left as it is.

    Args:
        tensors: a state_dict; a layer is told by one of inv_w_real, log_w_real, w_imag in its kernel.
        path: for messages.

    Returns:
        the tensors, and how many layers were of an older version.

    Raises:
        CheckpointError: two names become the same.

    Source: the names of state-spaces/s4 in its versions 3 and 4.
    """
    matches = {name: match for name in tensors if (match := _KERNEL.fullmatch(name))}
    roots = {match["root"] for match in matches.values() if match["leaf"] in _OLD}
    if not roots:
        return tensors, 0
    result: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        match = matches.get(name)
        if match is not None and match["root"] in roots:
            leaf, convert = _LEAVES.get(match["leaf"], (match["leaf"], _same))
            target, value = f"{match['root']}layer.kernel.{leaf}", convert(value)
        elif name.endswith("D") and name.removesuffix("D") in roots:
            target = f"{name.removesuffix('D')}layer.D"
        else:
            target = name
        if target in result:
            raise CheckpointError(
                f"{path}: an S4 layer of an older version has two tensors for {target[:80]}, one is {name[:80]}"
            )
        result[target] = value
    return result, len(roots)
