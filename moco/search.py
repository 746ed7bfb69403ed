"""Nearest pictures, near-duplicates, outliers: `python -m moco.search run=DIR data=folder data.root=IMAGES`."""

from moco.cli import run_command
from moco.config.search import SearchConfig, check_search


def search(config: SearchConfig) -> None:
    """Writes search/MODE.json and a gallery to look at.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for data, an encoder or a query that is not there.
        ImageError: for a picture that cannot be read.
    """
    check_search(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.retrieval.search import search as run

    run(config)


if __name__ == "__main__":
    run_command("search", SearchConfig, search)
