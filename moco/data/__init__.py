"""Images in, views out: sources, random numbers without state, crops, device augmentation, loaders."""
