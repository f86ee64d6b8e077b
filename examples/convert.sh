#!/usr/bin/env bash
# A Hugging Face checkpoint to a megatron-core one and back, in two layouts, with the precision checked.
#   MODEL=Qwen3-0.6B bash examples/convert.sh
# Megatron checkpoints are only needed to train from or to resume; `megatron sft --model` reads the Hugging
# Face one by itself.
source "$(dirname "$0")/common.sh"

# --test_convert_precision compares the logits with transformers' and fails on a mismatch
NPROC_PER_NODE=2 megatron export \
    --model "$MODEL" \
    --to_mcore true \
    --tensor_model_parallel_size 2 \
    --output_dir "$OUTPUT/convert/mcore" \
    --exist_ok true \
    --test_convert_precision true

# a megatron-core checkpoint does not depend on the layout it was written in
NPROC_PER_NODE=2 megatron export \
    --model "$MODEL" \
    --mcore_model "$OUTPUT/convert/mcore" \
    --to_hf true \
    --pipeline_model_parallel_size 2 \
    --output_dir "$OUTPUT/convert/hf" \
    --exist_ok true \
    --test_convert_precision true

# the weights came back bit for bit
"$PYTHON" - "$MODEL" "$OUTPUT/convert/hf" <<'PYTHON'
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


before, after = weights(sys.argv[1]), weights(sys.argv[2])
assert before.keys() == after.keys(), before.keys() ^ after.keys()
different = [name for name in before if not torch.equal(before[name], after[name])]
assert not different, different
print(f"{len(before)} tensors are equal bit for bit")
PYTHON
