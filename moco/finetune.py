"""Fine-tune an encoder on few labels or all of them: `python -m moco.finetune run=DIR [field=value ...]`.

It also runs under torchrun.
"""

from moco.cli import Command, launched_processes
from moco.config.finetune import FinetuneConfig, check_finetune


def _check(config: FinetuneConfig) -> None:
    check_finetune(config, launched_processes())


finetune = Command("finetune", FinetuneConfig, _check, "moco.evaluation.finetune:evaluate_finetune")

if __name__ == "__main__":
    finetune.main()
