"""`megatron pt`: pre-train on plain text."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
NPROC_PER_NODE=4 megatron pt --model ./Qwen3-0.6B --dataset books.txt --train_iters 1000 --packing true \\
    --max_length 4096 --truncation_strategy split --pipeline_model_parallel_size 2 --output_dir out
megatron pt --model ./shape-only --perform_initialization true --dataset books.txt --num_train_epochs 1
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("pt", argv, f"{__name__}:train", EXAMPLES)


def train(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    from ..training import train_main

    return train_main(arguments("pt", argv))
