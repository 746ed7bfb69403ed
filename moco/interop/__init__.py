"""Read and write encoder files of other projects."""
