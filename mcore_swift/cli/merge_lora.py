"""`swift merge-lora` and `swift export` of an adapter: into the model it was trained beside, or as a PEFT folder."""

from collections.abc import Sequence
from pathlib import Path

from launch import read_place

from ..config import named_flags
from ..config.swift import SwiftExportArguments
from ..errors import UserError, raise_together
from ..plan.adapter import WEIGHTS
from .start import arguments, start

EXAMPLES = """
swift export --adapters out/v0-20260101-120000/checkpoint-100 --merge_lora true --output_dir merged
swift merge-lora --adapters out/v0-20260101-120000/checkpoint-100
swift export --adapters out/v0-20260101-120000/checkpoint-100 --to_peft_format true
swift export --model ./Qwen3-0.6B --to_mcore true          # this and --to_hf: flags of `megatron export --help`
"""


def run(argv: Sequence[str]) -> int:
    """`swift merge-lora`; returns its exit code."""
    if argv and not named_flags(argv) & {"merge_lora", "to_peft_format", "help"}:
        argv = [*argv, "--merge_lora", "true"]
    return run_export(argv)


def run_export(argv: Sequence[str]) -> int:
    """`swift export` of an adapter; returns its exit code."""
    return start("swift-export", argv, f"{__name__}:merge", EXAMPLES)


def merge(argv: Sequence[str]) -> int | None:
    """The command's part in each process."""
    args = arguments("swift-export", argv)
    folder = Path(args.adapters[0])
    by_transformers = _is_of_transformers(folder, args.model)
    if not by_transformers and (args.to_peft_format or not (folder / WEIGHTS).is_file()):
        if args.model is None:
            raise UserError(f"--adapters {folder}: nothing names its base model", "give it with --model")
        return _on_megatron(args)
    if read_place().rank:
        return 0  # peft merges a whole model in one process, whatever NPROC_PER_NODE says
    import torch

    from ..tuners.merge import merge_adapter, write_peft_folder

    if args.to_peft_format:
        written = write_peft_folder(str(folder), args.model, args.output_dir, exist_ok=args.exist_ok)
        print(f"PEFT adapter in {written}")
        return None
    merged = merge_adapter(
        str(folder),
        args.model,
        args.output_dir,
        dtype=getattr(torch, args.torch_dtype) if args.torch_dtype else None,
        max_shard_size=args.max_shard_size,
        exist_ok=args.exist_ok,
    )
    print(f"merged into {merged}")
    return 0


def _is_of_transformers(folder: Path, model: str | None) -> bool:
    """Whether it is a checkpoint without PEFT files of a run on a transformers model, which can be loaded as it is."""
    from converters.manifest import Manifest

    from ..plan.preflight import read_config
    from ..plan.quantization import stored_method

    if not (folder / "manifest.json").is_file() or (folder / WEIGHTS).is_file():
        return False
    is_plain = model is None or stored_method(read_config(Path(model))) is None
    return is_plain and Manifest.read(folder).engine == "fsdp"


def _on_megatron(args: SwiftExportArguments) -> int:
    """Adapters alone, and those that peft cannot read: handled by the converters."""
    from converters.main import export_main

    raise_together(args.as_megatron().problems())
    code = export_main(args.as_megatron())
    print(f"{'merged into' if args.merge_lora else 'PEFT adapter in'} {args.output_dir}")
    return code
