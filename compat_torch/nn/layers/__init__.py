"""The parts of blocks as torch modules; import paths mirror `compat_torch.layers`."""
