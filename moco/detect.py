"""Train an object detector on an encoder: `python -m moco.detect`, or under torchrun.

Example: `python -m moco.detect run=DIR boxes.root=IMAGES boxes.file=FILE.json boxes.hold_out=0.2`.
"""

from moco.cli import Command, launched_processes
from moco.config.detect import DetectConfig, check_detect

detect = Command(
    "detect",
    DetectConfig,
    lambda config: check_detect(config, launched_processes()),
    "moco.detection.detect:evaluate_detect",
)

if __name__ == "__main__":
    detect.main()
