"""Results for people: galleries of pictures, and the report of a run (`python -m moco.report run=DIR`)."""
