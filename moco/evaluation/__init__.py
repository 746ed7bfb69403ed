"""Judging frozen features; used by the commands and by the training loop's live kNN."""
