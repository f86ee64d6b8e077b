#!/usr/bin/env bash
# Full-parameter SFT on four processes: two pipeline stages of two tensor-parallel processes each.
#   MODEL=Qwen3-0.6B DATASET=train.jsonl bash examples/sft_tp_pp.sh [further flags]
# Without MODEL and DATASET it trains the demo, on a CPU too.
source "$(dirname "$0")/common.sh"

# 40 steps is a taste; for a real run replace --train_iters by --num_train_epochs and lower --lr to 1e-5
NPROC_PER_NODE=4 megatron sft \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --split_dataset_ratio 0.01 \
    --output_dir "$OUTPUT/sft_tp_pp" \
    --tensor_model_parallel_size 2 \
    --pipeline_model_parallel_size 2 \
    --sequence_parallel true \
    --packing true \
    --max_length 512 \
    --micro_batch_size 1 \
    --global_batch_size 4 \
    --train_iters 40 \
    --lr 3e-3 \
    --lr_warmup_fraction 0.05 \
    --eval_steps 20 \
    --save_steps 20 \
    --save_total_limit 2 \
    --save_safetensors true \
    --logging_steps 5 \
    "$@"
