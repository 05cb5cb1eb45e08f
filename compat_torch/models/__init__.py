"""Layers; import paths mirror lrnnx.models."""
