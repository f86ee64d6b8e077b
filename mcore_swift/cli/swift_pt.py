"""`swift pt`: pre-train any model of transformers on plain text."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
swift pt --model ./Qwen3-0.6B --train_type full --dataset books.txt --packing true --max_length 4096 \\
    --truncation_strategy split --max_steps 1000
swift pt --model ./shape-only --train_type full --perform_initialization true --dataset books.txt
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("swift-pt", argv, f"{__name__}:train", EXAMPLES)


def train(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    from .backend import train_on_backend

    return train_on_backend(arguments("swift-pt", argv))
