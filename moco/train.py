"""Pretrain an encoder: `python -m moco.train [experiment=NAME] [field=value ...]`, or under torchrun."""

from moco.cli import launched_processes, run_command
from moco.config import TrainConfig, check
from moco.runtime.preemption import PreemptionHandler


def train(config: TrainConfig) -> None:
    """Pretrain as configured, or resume the run in `config.run`.

    Raises:
        ConfigError: for an invalid configuration.
        FileNotFoundError: if the data set does not exist.
        Preempted: if a signal or `config.stop_after` stopped the run before its end.
    """
    check(config, launched_processes())
    # Signals are caught before torch is imported: the import takes seconds, in which a launcher may stop the run.
    with PreemptionHandler(config.stop_after) as preemption:
        from moco.training.trainer import pretrain

        pretrain(config, preemption)


if __name__ == "__main__":
    run_command("train", TrainConfig, train)
