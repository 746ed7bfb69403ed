#!/usr/bin/env bash
# Train on all GPUs of several machines. Start it once on each machine, with the same arguments:
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/train_multi_node.sh experiment=moco_v3_vit_small_imagenet \
#     data.root=/data/imagenet
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node0 scripts/train_multi_node.sh experiment=moco_v3_vit_small_imagenet \
#     data.root=/data/imagenet
#
#   NODES        number of machines
#   NODE_RANK    number of this machine, from 0; optional under Slurm
#   MASTER_ADDR  name or address of machine 0, reachable from all machines
#   PORT         a free port on machine 0; default 29500
#   GPUS         GPUs per machine; default all
#   RESTARTS     how often all processes restart after one has died or hung; default 0
#
# The run directory (`run=...`) must be on storage that all machines share. Restarted processes resume from the last
# checkpoint. If torchrun has ended on a machine, for example after minutes without network, start the same command
# there again.
# RANK and MASTER are the former names of NODE_RANK and MASTER_ADDR, and are still read.
set -euo pipefail

node_rank=${NODE_RANK:-${RANK:-${SLURM_NODEID:-}}}
master=${MASTER_ADDR:-${MASTER:-}}
lacking=""
[[ $master ]] || lacking+="MASTER_ADDR is not set: set it to the name or address of machine 0"$'\n'
[[ $node_rank =~ ^[0-9]+$ ]] || lacking+="NODE_RANK=$node_rank: set it to the number of this machine, from 0"$'\n'
[[ ${NODES:-} =~ ^[1-9][0-9]*$ ]] || lacking+="NODES=${NODES:-}: set it to the number of machines"$'\n'
if [[ $lacking ]]; then
    printf '%s' "$lacking" >&2
    exit 2
fi
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
if ((gpus == 0)); then
    echo "no NVIDIA GPU was found (nvidia-smi): set GPUS to the number of processes; without a GPU they use the CPU" >&2
    exit 2
fi
# Without this, restarted processes would connect to the addresses that their predecessors left in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# is_host states which machine opens the port; torchrun's own guess compares host names and can be wrong.
exec torchrun \
    --nnodes "$NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$master:${PORT:-29500}" --rdzv-id moco \
    --rdzv-conf "is_host=$((node_rank == 0))" --max-restarts "${RESTARTS:-0}" \
    -m moco.train "$@"
