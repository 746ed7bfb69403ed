"""Pretrain an encoder: `python -m moco.train [experiment=NAME] [field=value ...]`, or under torchrun.

Reads from top to bottom: set up, build, resume, train, say what happened.
"""

import os

from moco.cli import run_command
from moco.config import TrainConfig, check
from moco.runtime.preemption import PreemptionHandler


def train(config: TrainConfig) -> None:
    """Pretrains as configured, or goes on with the run that is in `config.run`.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for a data set that is not there.
        Preempted: if a signal or `config.stop_after` ended the run before its end.
    """
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    # From here on a signal is heard: to import torch takes seconds, in which a launcher may want to stop already.
    with PreemptionHandler(config.stop_after) as stop:
        # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
        from moco.training.trainer import pretrain

        pretrain(config, stop)


if __name__ == "__main__":
    run_command("train", TrainConfig, train)
