"""Images in, views out: sources, keyed randomness, crops, device augmentation, loaders."""
