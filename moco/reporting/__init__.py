"""Galleries of images, and the report of a run (`python -m moco.report run=DIR`)."""
