"""Merging an adapter into its base model with peft."""

from pathlib import Path

import torch

from converters.pending import pending_directory
from converters.ranks import Ranks
from converters.side_files import copy_side_files
from mcore_swift.errors import UserError
from mcore_swift.plan.preflight import read_config
from mcore_swift.plan.quantization import stored_method
from mcore_swift.tuners.transformers_adapters import read_adapter_config


def merge_adapter(
    adapter: str,
    model: str | None,
    output_dir: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    exist_ok: bool = False,
) -> Path:
    """Write the base model with the adapter merged as a Hugging Face checkpoint; returns its folder.

    model: the base; None takes the one that the adapter names. dtype: of the result; None keeps the base's. The sum is
    computed in float32 and rounded once. Runs in one process and holds the whole model in host memory.
    Raises UserError if the base is missing, quantized, or does not fit the adapter.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = read_adapter_config(adapter)
    base = model or config.base_model_name_or_path
    if not base or not Path(base).is_dir():
        raise UserError(f"{adapter} belongs to {base}, which is no folder here", "give the base with --model")
    if method := stored_method(read_config(Path(base))):
        raise UserError(
            f"{base}: its weights are quantized by {method}, and nothing can be added to them",
            "give the checkpoint of the same model that is not quantized with --model",
        )
    try:
        whole = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        stored = whole.dtype
        joined = PeftModel.from_pretrained(whole.float(), adapter, config=config).merge_and_unload(
            safe_merge=True
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{adapter} does not fit {base}: {_reason(error)}",
            "give the base it was trained beside with --model",
        ) from None
    result = dtype or stored
    with pending_directory(output_dir, Ranks(), exist_ok) as folder:
        joined.to(result).save_pretrained(folder, max_shard_size=max_shard_size)
        copy_side_files(base, folder, result)
    return Path(output_dir)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
