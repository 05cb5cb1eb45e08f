"""Our answers to the classes of lindermanlab/S5 and s5-pytorch."""

from __future__ import annotations

from compat_torch.models.original.s5 import S5, S5SSM, S5Block

from .base import Subject, compat

SUBJECTS: dict[str, list[Subject]] = {
    "s5.ssm:S5SSM": [compat(S5SSM)],
    "s5.s5_model:S5": [compat(S5)],
    "s5.s5_model:S5Block": [compat(S5Block)],
}
