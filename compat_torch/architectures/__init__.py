"""Whole models; import paths mirror lrnnx.architectures."""
