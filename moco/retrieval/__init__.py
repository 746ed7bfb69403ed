"""Features on disk, and search in them."""
