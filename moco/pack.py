"""Pictures into WebDataset tar shards with an index: `python -m moco.pack data.root=IMAGES output=DIR`."""

from moco.cli import run_command
from moco.config.pack import PackConfig, check_pack


def pack(config: PackConfig) -> None:
    """Writes shards, index and the list of what was left out; goes on where it was interrupted.

    Raises:
        ConfigError: for a configuration that cannot run, or a folder that holds something else.
        FileNotFoundError: for pictures that are not there.
        ValueError: if too many pictures cannot be read, or shards that were finished before are damaged.
    """
    check_pack(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.data.pack import pack as run

    run(config)


if __name__ == "__main__":
    run_command("pack", PackConfig, pack)
