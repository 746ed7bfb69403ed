"""A pretraining run, from its configuration to its summary."""
