#!/usr/bin/env bash
# LoRA with the model as transformers has it: one GPU, a laptop, or any architecture that Megatron-core has not.
#   MODEL=opt-1.3b DATASET=train.jsonl bash examples/lora_one_device.sh [further flags of swift sft]
# With bitsandbytes installed, --quant_method bnb --quant_bits 4 keeps the frozen weights in 4 bits. Without MODEL and
# DATASET it trains the demo.
source "$(dirname "$0")/common.sh"
RUN=$OUTPUT/lora_one_device

# 40 steps is a taste; for a real run replace --max_steps by --num_train_epochs and lower --learning_rate to 1e-4
swift sft \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --split_dataset_ratio 0.01 \
    --output_dir "$RUN" \
    --add_version false \
    --train_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --packing true \
    --max_length 512 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --max_steps 40 \
    --learning_rate 3e-3 \
    --warmup_ratio 0.05 \
    --eval_steps 20 \
    --save_steps 20 \
    --save_total_limit 2 \
    --logging_steps 5 \
    "$@"

# The adapter's folder is enough: its args.json names the base.
swift export --adapters "$RUN/latest" --merge_lora true --output_dir "$RUN/merged" --exist_ok true
