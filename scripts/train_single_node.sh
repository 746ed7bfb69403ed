#!/usr/bin/env bash
# Train on all GPUs of this machine:
#
#   scripts/train_single_node.sh experiment=moco_v2_imagenet data.root=/data/imagenet
#   GPUS=4 scripts/train_single_node.sh ...        # only this many
#   RESTARTS=3 scripts/train_single_node.sh ...    # where a process dies or hangs, all start again from the last checkpoint
#
# The arguments are those of `python -m moco.train`. The global batch and the learning rate do not depend on GPUS.
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
# Otherwise processes that start again would meet at addresses that the ones before them have left in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-0}" -m moco.train "$@"
