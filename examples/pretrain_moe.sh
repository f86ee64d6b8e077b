#!/usr/bin/env bash
# Pre-training of a mixture of experts from random weights, experts shared by two processes.
#   MODEL=folder DATASET="a.jsonl corpus_text_document" WEIGHTS="0.7 0.3" bash examples/pretrain_moe.sh [flags]
# MODEL holds config.json and a tokenizer; no weights are read. DATASET are files of text (.txt, .jsonl, ...) or token
# ids that Megatron has written (.bin and .idx); WEIGHTS blends several. Without them a demo is made, which trains on a
# CPU in a minute.
set -euo pipefail
EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
OUTPUT=${OUTPUT:-quickstart_output}
if [ -z "${MODEL:-}" ] || [ -z "${DATASET:-}" ]; then
    "$PYTHON" "$EXAMPLES/moe_demo.py" "$OUTPUT/moe_demo"
fi
if [ -z "${DATASET:-}" ]; then
    DATASET="$OUTPUT/moe_demo/stories.jsonl $OUTPUT/moe_demo/sums.txt"
    WEIGHTS=${WEIGHTS:-0.7 0.3}
fi
MODEL=${MODEL:-$OUTPUT/moe_demo/model}
source "$EXAMPLES/common.sh"

# word splitting is wanted: several files, a weight for each
# shellcheck disable=SC2086
NPROC_PER_NODE=${NPROC_PER_NODE:-2} megatron pt "$EXAMPLES/pretrain_moe.yaml" \
    --model "$MODEL" \
    --dataset $DATASET \
    ${WEIGHTS:+--interleave_prob $WEIGHTS} \
    --output_dir "$OUTPUT/pretrain_moe" \
    "$@"
