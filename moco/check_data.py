"""All that is wrong with a folder of pictures, before a run: `python -m moco.check_data data.root=IMAGES`."""

from moco.cli import run_command
from moco.config.check_data import CheckDataConfig, check_check_data


def check_data(config: CheckDataConfig) -> None:
    """Decodes every picture, prints a table and writes a report.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for pictures that are not there.
        ValueError: if a run with this `data` would stop at something; the report is written all the same.
    """
    check_check_data(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.data.check import check_data as run

    run(config)


if __name__ == "__main__":
    run_command("check_data", CheckDataConfig, check_data)
