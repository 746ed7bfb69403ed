"""Linear probe of a frozen encoder: `python -m moco.linear run=DIR|checkpoint=FILE [protocol=NAME] [field=value ...]`.

Under torchrun too.
"""

import os

from moco.cli import run_command
from moco.config.linear import LinearConfig, check_linear


def linear(config: LinearConfig) -> None:
    """Judges as configured.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError, ValueError: for an encoder or data that are not there or do not fit.
    """
    check_linear(config, int(os.environ.get("WORLD_SIZE", "1")))
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.evaluation.linear import evaluate_linear

    evaluate_linear(config)


if __name__ == "__main__":
    run_command("linear", LinearConfig, linear)
