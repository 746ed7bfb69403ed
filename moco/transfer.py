"""Evaluate encoders on many labeled data sets: `python -m moco.transfer run=DIR 'sets=[pets,dtd]'`."""

from moco.cli import Command, launched_processes
from moco.config.transfer import TransferConfig, check_transfer

transfer = Command(
    "transfer",
    TransferConfig,
    lambda config: check_transfer(config, launched_processes()),
    "moco.evaluation.transfer:evaluate_transfer",
)

if __name__ == "__main__":
    transfer.main()
