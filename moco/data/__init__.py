"""Make views of images: sources, random numbers without state, crops, augmentation on the device, loaders."""
