"""Fine-tune an encoder on few labels or all of them: `python -m moco.finetune run=DIR`, or under torchrun."""

from moco.cli import Command, launched_processes
from moco.config.finetune import FinetuneConfig, check_finetune

finetune = Command(
    "finetune",
    FinetuneConfig,
    lambda config: check_finetune(config, launched_processes()),
    "moco.evaluation.finetune:evaluate_finetune",
)

if __name__ == "__main__":
    finetune.main()
