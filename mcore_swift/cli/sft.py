"""`megatron sft`: fine-tune on conversations."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
NPROC_PER_NODE=2 megatron sft --model ./Qwen3-0.6B --dataset train.jsonl --num_train_epochs 1 \\
    --tensor_model_parallel_size 2 --max_length 2048 --packing true --lr 1e-5 --output_dir out
megatron sft run.yaml --lr 2e-5
megatron sft run.yaml --resume out/v0-20260101-120000
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("sft", argv, f"{__name__}:train", EXAMPLES)


def train(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    from ..training import train_main

    return train_main(arguments("sft", argv))
