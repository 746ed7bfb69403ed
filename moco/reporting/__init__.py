"""Results for people: galleries of images, and the report of a run (`python -m moco.report run=DIR`)."""
