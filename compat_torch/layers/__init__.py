"""Parts of whole models; import paths mirror lrnnx.layers."""

from .block import Block
from .mha import MHA
from .mlp import GatedMLP

__all__ = ["MHA", "Block", "GatedMLP"]
