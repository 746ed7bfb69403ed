#!/usr/bin/env bash
# Evaluate a run of moco.train with kNN, linear probes and fine-tuning, beside its untrained and a supervised network:
#   bash scripts/evaluate.sh RUN [PROTOCOL] [field=value ...]
# PROTOCOL is a name in configs/protocol/, moco_v2 by default. The fields go to every command (threads=1, ...). Environment
# variables: SEEDS (fine-tuning, default 5); fields for linear with PROTOCOL (LINEAR), for fine-tuning on 1 and 10 % of
# the labels (FINETUNE) and for the supervised network (SUPERVISED).
# Results: RUN/results.json, and RUN/supervised/results.json for the supervised network. scripts/results_table.py
# prints them as one table.
set -euo pipefail
if [[ -z ${1:-} ]]; then
    echo "the directory of the run is missing: bash scripts/evaluate.sh RUN [PROTOCOL] [field=value ...]" >&2
    exit 2
fi
run=$1
protocol=moco_v2
fields=("${@:2}")
if [[ -n ${2:-} && $2 != *=* ]]; then
    protocol=$2
    fields=("${@:3}")
fi
# Before the first evaluation, which takes a while.
if ! python -m moco.linear protocol="$protocol" --cfg job > /dev/null; then exit 2; fi

number=0
evaluate() {
    number=$((number + 1))
    printf '[%d/13] python -m moco.%s\n' "$number" "$*"
    python -m "moco.$1" "${@:2}"
}

evaluate knn run="$run" 'compare=[untrained]' "${fields[@]}"
evaluate knn run="$run" 'k=[1]' 'temperature=[0.1]' labels_per_class=1 'compare=[untrained]' "${fields[@]}"
evaluate linear run="$run" 'compare=[untrained]' "${fields[@]}"
evaluate linear run="$run" protocol="$protocol" 'compare=[untrained]' ${LINEAR:-} "${fields[@]}"
for fraction in 0.01 0.1; do
    evaluate finetune run="$run" fraction=$fraction seeds="${SEEDS:-5}" ${FINETUNE:-} "${fields[@]}"
done
evaluate finetune run="$run" fraction=1.0 'encoders=[untrained]' ${SUPERVISED:-} "${fields[@]}"

supervised=(checkpoint="$run/finetune/untrained_100percent/encoder.safetensors" output="$run/supervised")
evaluate knn "${supervised[@]}" 'compare=[]' "${fields[@]}"
evaluate knn "${supervised[@]}" 'k=[1]' 'temperature=[0.1]' labels_per_class=1 'compare=[]' "${fields[@]}"
evaluate linear "${supervised[@]}" "${fields[@]}"
evaluate linear "${supervised[@]}" protocol="$protocol" ${LINEAR:-} "${fields[@]}"
for fraction in 0.01 0.1; do
    evaluate finetune "${supervised[@]}" fraction=$fraction seeds="${SEEDS:-5}" ${FINETUNE:-} \
        'encoders=[pretrained]' "${fields[@]}"
done
