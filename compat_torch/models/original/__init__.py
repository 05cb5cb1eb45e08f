"""The original authors' layers: state-spaces/s4 in `s4`, lindermanlab/S5 and s5-pytorch in `s5`."""

from .s4 import S4D, S4Block
from .s5 import S5, S5SSM, S5Block

__all__ = ["S4D", "S5", "S5SSM", "S4Block", "S5Block"]
