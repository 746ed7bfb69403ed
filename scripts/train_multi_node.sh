#!/usr/bin/env bash
# Train on all GPUs of several machines; start it once on each, with the same arguments:
#
#   NODES=2 RANK=0 MASTER=node0 scripts/train_multi_node.sh experiment=moco_v2_imagenet data.root=/data/imagenet
#   NODES=2 RANK=1 MASTER=node0 scripts/train_multi_node.sh experiment=moco_v2_imagenet data.root=/data/imagenet
#
#   NODES   how many machines
#   RANK    this one's number, from 0; under Slurm it is known
#   MASTER  name or address of machine 0, reachable from all
#   PORT    free on machine 0, 29500 unless set
#   GPUS    GPUs a machine, all unless set
#   RESTARTS  how often all processes start again after one has died or hung, 0 unless set
#
# The run directory (`run=...`) must lie on storage that all machines share. What starts again goes on from the last checkpoint.
# A machine whose torchrun has given up, as after minutes without network, takes part again by the same line.
set -euo pipefail

: "${NODES:?how many machines}" "${MASTER:?name or address of machine 0}"
rank=${RANK:-${SLURM_NODEID:?RANK is not set: the number of this machine, from 0}}
gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
# Otherwise processes that start again would meet at addresses that the ones before them have left in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# is_host says outright who opens the port; torchrun's own guess compares host names and can miss.
exec torchrun \
    --nnodes "$NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER:${PORT:-29500}" --rdzv-id moco \
    --rdzv-conf "is_host=$((rank == 0))" --max-restarts "${RESTARTS:-0}" \
    -m moco.train "$@"
