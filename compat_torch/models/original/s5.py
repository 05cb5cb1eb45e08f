"""The S5 layers of lindermanlab/S5 (`S5SSM`) and of s5-pytorch (`S5`, `S5Block`)."""

from ._s5_block import S5Block
from ._s5_pytorch import S5
from ._s5_ssm import S5SSM

__all__ = ["S5", "S5SSM", "S5Block"]
