"""Whole models as torch modules; import paths mirror `compat_torch.architectures`."""
