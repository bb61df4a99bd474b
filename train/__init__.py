"""Training of the built-in checkpoint: generated data, trainer, export. Not part of the package."""
