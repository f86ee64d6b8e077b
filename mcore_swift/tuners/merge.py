"""Merging an adapter into its base model with peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from converters.pending import pending_directory
from converters.ranks import Ranks
from converters.side_files import copy_side_files
from converters.torch_dist_reader import MCoreReader
from mcore_swift.errors import UserError
from mcore_swift.models.rules import full_region
from mcore_swift.plan.preflight import read_config
from mcore_swift.plan.quantization import stored_method
from mcore_swift.tuners.residuals import TakenStarts, check_start, takes_start
from mcore_swift.tuners.transformers_adapters import (
    ADAPTER,
    WEIGHTS_FILE,
    read_adapter_config,
    save_adapter,
)


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
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config, base = _config_and_base(adapter, model)
    check_start(config, adapter)
    if method := stored_method(read_config(Path(base))):
        raise UserError(
            f"{base}: its weights are quantized by {method}, and nothing can be added to them",
            "give the checkpoint of the same model that is not quantized with --model",
        )
    with _misfits_named(adapter, base):
        whole = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        stored = whole.dtype
        joined = _joined(whole.float(), adapter, config)[0].merge_and_unload(safe_merge=True)
    result = dtype or stored
    with pending_directory(output_dir, Ranks(), exist_ok) as folder:
        joined.to(result).save_pretrained(folder, max_shard_size=max_shard_size)
        copy_side_files(base, folder, result)
    return Path(output_dir)


def write_peft_folder(adapter: str, model: str | None, output_dir: str, *, exist_ok: bool = False) -> Path:
    """Write the adapter in a checkpoint of a transformers model as a PEFT folder; returns the folder.

    One process; holds the whole model in host memory. Raises UserError as `merge_adapter`.
    """
    from transformers import AutoModelForCausalLM

    config, base = _config_and_base(adapter, model)
    check_start(config, adapter)
    with _misfits_named(adapter, base):
        whole = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        joined, starts = _joined(whole, adapter, config)
    trained = {name: p.detach() for name, p in joined.named_parameters() if p.requires_grad}
    with pending_directory(output_dir, Ranks(), exist_ok) as folder:
        save_adapter(joined, folder, trained, starts)
    return Path(output_dir)


def _config_and_base(adapter: str, model: str | None) -> tuple[Any, str]:
    config = read_adapter_config(adapter)
    base = model or config.base_model_name_or_path
    if not base or not Path(base).is_dir():
        raise UserError(f"{adapter} belongs to {base}, which is no folder here", "give the base with --model")
    return config, base


@contextmanager
def _misfits_named(adapter: str, base: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{adapter} does not fit {base}: {_reason(error)}",
            "give the base it was trained beside with --model",
        ) from None


@torch.no_grad()
def _joined(whole: Any, adapter: str, config: Any) -> tuple[Any, TakenStarts | None]:
    """The model with the adapter beside its weights, of a PEFT folder or a checkpoint; and what its files begin with.

    A checkpoint has the tensors under the names peft has for them in memory, whatever the kind of adapter.
    """
    from peft import PeftModel, get_peft_model

    if (Path(adapter) / WEIGHTS_FILE).is_file():
        return PeftModel.from_pretrained(whole, adapter, config=config), None
    joined = get_peft_model(whole, config, adapter_name=ADAPTER)
    starts = TakenStarts(joined) if takes_start(getattr(config, "init_lora_weights", None)) else None
    trained = {name: p for name, p in joined.named_parameters() if p.requires_grad}
    reader = MCoreReader(Path(adapter) / "mcore", frozenset({"base_model"}))
    for name, parameter in trained.items():
        shape = tuple(parameter.shape)
        if name not in reader.specs or tuple(reader.specs[name].shape) != shape:
            raise ValueError(f"the checkpoint does not hold {name} of shape {list(shape)}")
        values = torch.empty(shape, dtype=reader.specs[name].dtype)
        reader.copy_into(name, full_region(shape), values)
        parameter.copy_(values)
    return joined, starts


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
