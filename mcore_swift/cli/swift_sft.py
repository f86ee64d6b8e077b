"""`swift sft`: fine-tune any model of transformers on conversations."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
swift sft --model ./Qwen3-0.6B --train_type full --dataset train.jsonl --num_train_epochs 1 \\
    --learning_rate 1e-5 --max_length 2048 --packing true --output_dir out
NPROC_PER_NODE=2 swift sft --model ./Qwen3-8B --train_type full --dataset train.jsonl --backend fsdp
swift sft run.yaml --resume_from_checkpoint out/v0-20260101-120000
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("swift-sft", argv, f"{__name__}:train", EXAMPLES)


def train(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    from .backend import train_on_backend

    return train_on_backend(arguments("swift-sft", argv))
