"""Benchmarks: `python -m scripts.bench NAME`, from the repository's root. One file per comparison."""
