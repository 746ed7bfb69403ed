"""Evaluate encoders on many labeled data sets: `python -m moco.transfer run=DIR 'sets=[pets,dtd]'`."""

from moco.cli import Command
from moco.config.transfer import TransferConfig, check_transfer

transfer = Command("transfer", TransferConfig, check_transfer, "moco.evaluation.transfer:evaluate_transfer")

if __name__ == "__main__":
    transfer.main()
