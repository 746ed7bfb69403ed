#!/usr/bin/env bash
# Train on all GPUs of this machine:
#
#   scripts/train_single_node.sh experiment=moco_v2_imagenet data.root=/data/imagenet
#   GPUS=4 scripts/train_single_node.sh ...        # only this many
#
# The arguments are those of `python -m moco.train`. The global batch and the learning rate do not depend on GPUS.
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
exec torchrun --standalone --nproc-per-node "$gpus" -m moco.train "$@"
