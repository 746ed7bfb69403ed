"""Fine-tune an encoder on few labels or all: `python -m moco.finetune run=DIR|checkpoint=FILE [field=value ...]`.

Reads from top to bottom: check, then train on the labeled pictures and judge on the held-out ones.
"""

import os

from moco.cli import run_command
from moco.config.finetune import FinetuneConfig, check_finetune


def finetune(config: FinetuneConfig) -> None:
    """Fine-tunes end to end as configured and writes down what the held-out split says.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for a run, a file or a data set that is not there.
    """
    check_finetune(config, int(os.environ.get("WORLD_SIZE", "1")))
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.evaluation.finetune import evaluate_finetune

    evaluate_finetune(config)


if __name__ == "__main__":
    run_command("finetune", FinetuneConfig, finetune)
