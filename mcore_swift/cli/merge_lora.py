"""`swift merge-lora` and `swift export --merge_lora true`: an adapter into the model it was trained beside."""

from collections.abc import Sequence

from .start import arguments, start

EXAMPLES = """
swift export --adapters out/v0-20260101-120000/checkpoint-100 --merge_lora true --output_dir merged
swift merge-lora --adapters out/v0-20260101-120000/checkpoint-100
"""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    asked = any(word.partition("=")[0].replace("-", "_") == "__merge_lora" for word in argv)
    argv = list(argv) if asked or not argv else [*argv, "--merge_lora", "true"]
    return start("swift-export", argv, f"{__name__}:merge", EXAMPLES)


def merge(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    import torch

    from ..config import ARGS_FILE
    from ..config.base import find_args_file, read_args_file
    from ..tuners.merge import merge_adapter

    args = arguments("swift-export", argv)
    model = args.model
    if model is None and args.load_args and (path := find_args_file(args.adapters[0])) is not None:
        model = read_args_file(path).get("model")
        print(f"--model {model}: from {ARGS_FILE}")
    folder = merge_adapter(
        args.adapters[0],
        model,
        args.output_dir,
        dtype=getattr(torch, args.torch_dtype) if args.torch_dtype else None,
        max_shard_size=args.max_shard_size,
        exist_ok=args.exist_ok,
    )
    print(f"merged into {folder}")
    return 0
