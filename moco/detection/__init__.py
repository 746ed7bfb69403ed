"""Object detection: images with boxes and masks, detectors with a pretrained encoder, their training and evaluation."""
