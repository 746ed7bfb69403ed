#!/usr/bin/env bash
# Judges a run of moco.train in every way, next to the same network untrained and trained with all labels:
#   bash scripts/judge.sh RUN [moco_v2_digits] [field=value ...]
# The further fields go to every command (threads=1, images_at_once=...); SEEDS, LINEAR, FINETUNE and SUPERVISED hold what
# goes to some alone, as in docs/results.md. Figures: RUN/results.json, and for the supervised network
# RUN/supervised/results.json; scripts/results_table.py prints them in one table.
set -euo pipefail
run=$1
protocol=${2:-moco_v2}
fields=("${@:3}")

python -m moco.knn run="$run" 'compare=[untrained]' "${fields[@]}"
python -m moco.knn run="$run" 'k=[1]' 'temperature=[0.1]' labels_per_class=1 'compare=[untrained]' "${fields[@]}"
python -m moco.linear run="$run" 'compare=[untrained]' "${fields[@]}"
python -m moco.linear run="$run" protocol="$protocol" 'compare=[untrained]' ${LINEAR:-} "${fields[@]}"
python -m moco.finetune run="$run" fraction=0.01 seeds="${SEEDS:-5}" ${FINETUNE:-} "${fields[@]}"
python -m moco.finetune run="$run" fraction=0.1 seeds="${SEEDS:-5}" ${FINETUNE:-} "${fields[@]}"
python -m moco.finetune run="$run" fraction=1.0 'encoders=[untrained]' ${SUPERVISED:-} "${fields[@]}"

supervised=(checkpoint="$run/finetune/untrained_100percent/encoder.safetensors" output="$run/supervised")
python -m moco.knn "${supervised[@]}" 'compare=[]' "${fields[@]}"
python -m moco.knn "${supervised[@]}" 'k=[1]' 'temperature=[0.1]' labels_per_class=1 'compare=[]' "${fields[@]}"
python -m moco.linear "${supervised[@]}" "${fields[@]}"
python -m moco.linear "${supervised[@]}" protocol="$protocol" ${LINEAR:-} "${fields[@]}"
python -m moco.finetune "${supervised[@]}" fraction=0.01 seeds="${SEEDS:-5}" ${FINETUNE:-} 'encoders=[pretrained]' "${fields[@]}"
python -m moco.finetune "${supervised[@]}" fraction=0.1 seeds="${SEEDS:-5}" ${FINETUNE:-} 'encoders=[pretrained]' "${fields[@]}"
