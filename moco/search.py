"""Find similar images, near-duplicates or outliers: `python -m moco.search run=DIR data=folder data.root=IMAGES`."""

from moco.cli import Command
from moco.config.search import SearchConfig, check_search

search = Command("search", SearchConfig, check_search, "moco.retrieval.search:search")

if __name__ == "__main__":
    search.main()
