"""Backbones, heads and batch normalization in groups."""
