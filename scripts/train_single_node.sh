#!/usr/bin/env bash
# Train on all GPUs of this machine:
#
#   scripts/train_single_node.sh experiment=moco_v2_imagenet data.root=/data/imagenet
#   GPUS=4 scripts/train_single_node.sh ...        # on 4 GPUs only
#   RESTARTS=3 scripts/train_single_node.sh ...    # after a process dies or hangs, restart all from the last checkpoint
#
# The arguments are those of `python -m moco.train`. Global batch and learning rate do not depend on GPUS.
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
if ((gpus == 0)); then
    echo "no NVIDIA GPU was found (nvidia-smi): set GPUS to the number of processes; without a GPU they use the CPU" >&2
    exit 2
fi
# Without this, restarted processes would connect to the addresses that their predecessors left in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-0}" -m moco.train "$@"
