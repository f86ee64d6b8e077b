"""`megatron export`: Hugging Face checkpoints to megatron-core's and back."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
megatron export --model ./Qwen3-0.6B --to_mcore true --output_dir Qwen3-0.6B-mcore
NPROC_PER_NODE=2 megatron export --mcore_model out/checkpoint-100 --to_hf true --output_dir out-hf \\
    --tensor_model_parallel_size 2 --test_convert_precision true
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("export", argv, f"{__name__}:convert", EXAMPLES)


def convert(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    from converters.main import export_main

    return export_main(arguments("export", argv))
