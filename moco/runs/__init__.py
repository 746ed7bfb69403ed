"""The files of a run directory: configuration, checkpoints, metrics and results."""
