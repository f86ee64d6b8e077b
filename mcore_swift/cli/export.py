"""`megatron export`: Hugging Face checkpoints to megatron-core's and back."""

from collections.abc import Sequence

from launch import read_place

from .start import arguments, start

EXAMPLES = """
megatron export --model ./Qwen3-0.6B --to_mcore true --output_dir Qwen3-0.6B-mcore
NPROC_PER_NODE=2 megatron export --mcore_model out/checkpoint-100 --to_hf true --output_dir out-hf \\
    --tensor_model_parallel_size 2 --test_convert_precision true
megatron export --model ./Qwen3-235B-A22B --to_mcore true --dry_run true
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return start("export", argv, f"{__name__}:convert", EXAMPLES, instead=dry_run)


def convert(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    if (code := dry_run(argv)) is not None:
        return code
    from converters.main import export_main

    return export_main(arguments("export", argv))


def dry_run(argv: Sequence[str]) -> int | None:
    """With `--dry_run true`, run the whole command in one process on behalf of all; otherwise return None."""
    args = arguments("export", argv)
    if not args.dry_run:
        return None
    place = read_place()
    if place.rank:
        return 0
    from converters.dry_run import dry_run

    return dry_run(args, place.world_size)
