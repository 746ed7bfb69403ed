"""Read and write encoder files of this and other projects."""
