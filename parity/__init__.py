"""Proof that the JAX side computes what the PyTorch references compute, on real reference weights."""
