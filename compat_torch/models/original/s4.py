"""The S4 layers of state-spaces/s4: `S4Block`, and the standalone `S4D`."""

from ._s4_block import S4Block
from ._s4_standalone import S4D

__all__ = ["S4D", "S4Block"]
