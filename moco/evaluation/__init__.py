"""Evaluation of encoders; used by the commands and by the training loop."""
