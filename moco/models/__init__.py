"""Backbones, heads and batch normalisation in groups."""
