#!/usr/bin/env bash
# Pre-training on plain text with data parallelism: every token counts, no chat template.
#   MODEL=checkpoint DATASET=corpus.txt bash examples/pretrain.sh [further flags]
# DATASET may be rows of {"text": ...}, of messages, or a .txt file with a sample a line. Without MODEL and
# DATASET it trains the demo, on a CPU too.
source "$(dirname "$0")/common.sh"

# Long texts are cut into pieces of --max_length (split) rather than dropped; packing fills the rows.
# The optimizer's state is shared out over the data-parallel processes.
NPROC_PER_NODE=2 megatron pt \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --output_dir "$OUTPUT/pretrain" \
    --use_distributed_optimizer true \
    --truncation_strategy split \
    --packing true \
    --max_length 512 \
    --micro_batch_size 1 \
    --global_batch_size 4 \
    --train_iters 40 \
    --lr 1e-3 \
    --lr_decay_style WSD \
    --lr_wsd_decay_iters 10 \
    --lr_warmup_iters 5 \
    --save_steps 40 \
    --logging_steps 5 \
    "$@"
