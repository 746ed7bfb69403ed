"""Train a segmentation network on an encoder: `python -m moco.segment`, or under torchrun.

Example: `python -m moco.segment run=DIR masks.root=DIR masks.hold_out=0.2`.
"""

from moco.cli import Command, launched_processes
from moco.config.segment import SegmentConfig, check_segment

segment = Command(
    "segment",
    SegmentConfig,
    lambda config: check_segment(config, launched_processes()),
    "moco.segmentation.segment:evaluate_segment",
)

if __name__ == "__main__":
    segment.main()
