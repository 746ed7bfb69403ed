"""Train and evaluate a linear classifier on a frozen encoder: `python -m moco.linear run=DIR [protocol=NAME]`.

It also runs under torchrun.
"""

from moco.cli import Command, launched_processes
from moco.config.linear import LinearConfig, check_linear


def _check(config: LinearConfig) -> None:
    check_linear(config, launched_processes())


linear = Command("linear", LinearConfig, _check, "moco.evaluation.linear:evaluate_linear")

if __name__ == "__main__":
    linear.main()
