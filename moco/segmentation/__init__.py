"""Semantic segmentation: images with masks, networks with a pretrained encoder, their training and evaluation."""
