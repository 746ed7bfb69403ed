"""Which checkpoint to take, told without labels: `python -m moco.choose 'runs=[runs/a,runs/b]'`."""

from moco.cli import run_command
from moco.config.choose import ChooseConfig, check_choose


def choose(config: ChooseConfig) -> None:
    """Ranks the runs' checkpoints by measures that need no labels and, with labels, says how well that agrees.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for runs or pictures that are not there.
    """
    check_choose(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.analysis.studies.choose import choose as run

    run(config)


if __name__ == "__main__":
    run_command("choose", ChooseConfig, choose)
