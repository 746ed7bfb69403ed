"""Train and evaluate a linear classifier on a frozen encoder: `python -m moco.linear run=DIR`, or under torchrun."""

from moco.cli import Command, launched_processes
from moco.config.linear import LinearConfig, check_linear

linear = Command(
    "linear",
    LinearConfig,
    lambda config: check_linear(config, launched_processes()),
    "moco.evaluation.linear:evaluate_linear",
)

if __name__ == "__main__":
    linear.main()
