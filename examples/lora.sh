#!/usr/bin/env bash
# LoRA on Megatron-core's layers under tensor parallelism, then the adapter merged into a Hugging Face checkpoint.
#   MODEL=Qwen3-0.6B DATASET=train.jsonl bash examples/lora.sh [further flags of megatron sft]
# Without MODEL and DATASET it trains the demo, on a CPU too.
source "$(dirname "$0")/common.sh"
RUN=$OUTPUT/lora

# 40 steps is a taste; for a real run replace --train_iters by --num_train_epochs and lower --lr to 1e-4
NPROC_PER_NODE=2 megatron sft \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --split_dataset_ratio 0.01 \
    --output_dir "$RUN" \
    --add_version false \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --tensor_model_parallel_size 2 \
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
    --merge_lora false \
    --logging_steps 5 \
    "$@"

# Each checkpoint is a PEFT folder. The base it was trained on is in its args.json.
megatron export --adapters "$RUN/latest" --to_hf true --output_dir "$RUN/merged" --exist_ok true
