"""What all layers share; import paths mirror lrnnx.core."""
