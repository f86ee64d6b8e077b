"""Loading and saving the weights of a transformers model as Hugging Face files.

For some architectures transformers renames or fuses tensors on loading (the experts of a layer become one tensor, for
example). Where it does not, each rank reads its own slices and writes its share of the files; where it does,
`from_pretrained` and `save_pretrained` run on the first rank, which then holds the whole model.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from converters.budget import UNBOUNDED, Budget
from converters.export import check_budget_of_shards, write_shards_as_hf
from converters.hf_reader import HFReader
from converters.pending import disk_errors
from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.errors import UserError
from mcore_swift.models.rules import RuleTable, Same, Shape, as_slices
from mcore_swift.models.shards import LiveShard
from mcore_swift.tuners.residuals import TakenStarts
from mcore_swift.tuners.transformers_adapters import adapter_tensors, save_adapter

logger = logging.getLogger(__name__)


def load(
    model_dir: str,
    model: nn.Module,
    shards: Sequence[LiveShard],
    ranks: Ranks,
    budget: Budget = UNBOUNDED,
) -> str:
    """Fill the shards from the checkpoint in `model_dir`; returns a line for the log. Collective.

    shards: all of this rank's. Raises UserError on every rank if a tensor is missing or has another shape.
    """
    started = time.monotonic()
    shapes = whole_shapes(shards, ranks)
    with ranks.together(lambda: HFReader(model_dir, budget.staging)) as reader:
        names = names_on_disk(shapes, reader.shapes, model)
        if names is not None:
            for shard in shards:
                reader.copy_into(names[shard.key], shard.region, shard.data)
            seconds = time.monotonic() - started
            return f"read {reader.bytes_read / 1e6:.0f} MB of weights in {seconds:.1f} s"
    _load_by_transformers(model_dir, model, shapes, shards, ranks)
    return f"transformers read the weights, converting them, in {time.monotonic() - started:.1f} s"


def whole_shapes(shards: Sequence[LiveShard], ranks: Ranks) -> dict[str, Shape]:
    """Shapes of the whole tensors by name, also of those of which this rank holds no part. Collective."""
    return ranks.union({shard.key: shard.global_shape for shard in shards})


def names_on_disk(
    wanted: Mapping[str, Shape], stored: Mapping[str, Shape], model: Any
) -> dict[str, str] | None:
    """Parameter -> its name in the files; None unless all of them are there with their shapes.

    Checkpoints of a bare model lack the prefix that a causal language model adds ("transformer.").
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for name, shape in wanted.items():
        found = next((n for n in (name, name.removeprefix(prefix)) if stored.get(n) == shape), None)
        if found is None:
            return None
        names[name] = found
    return names


def _load_by_transformers(
    model_dir: str, model: nn.Module, shapes: Mapping[str, Shape], shards: Sequence[LiveShard], ranks: Ranks
) -> None:
    """The first rank loads the whole model into host memory and broadcasts it tensor by tensor."""
    whole = ranks.together(lambda: _from_pretrained(model_dir, shapes), where=ranks.is_first)
    device = get_accelerator().device
    mine: dict[str, list[LiveShard]] = {}
    for shard in shards:
        mine.setdefault(shard.key, []).append(shard)
    for name in sorted(shapes):
        tensor = whole[name].to(device, torch.float32) if ranks.is_first else None
        if ranks.size > 1:
            tensor = torch.empty(shapes[name], device=device) if tensor is None else tensor.contiguous()
            dist.broadcast(tensor, 0)
        for shard in mine.get(name, ()):
            shard.data.copy_(tensor[as_slices(shard.region)])


def _from_pretrained(model_dir: str, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as raised:
        raise UserError(
            f"{model_dir}: {str(raised).strip().splitlines()[0]}", "look at the checkpoint"
        ) from None
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    whole = model.state_dict()
    missing += [name for name, shape in shapes.items() if tuple(whole[name].shape) != shape]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{model_dir} does not hold {', '.join(missing[:5])}{more}",
            "copy or download the checkpoint again",
        )
    return whole


def export(
    folder: Path,
    model: Any,
    shards: Sequence[LiveShard],
    source_dir: str,
    max_shard_bytes: int,
    dtype: torch.dtype,
    ranks: Ranks,
    budget: Budget = UNBOUNDED,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights into `folder` as Hugging Face files. Collective.

    config: entries of config.json that differ from the one in `source_dir`.
    """
    shapes = whole_shapes(shards, ranks)
    order = [name for name in model.state_dict() if name in shapes]  # the same on every rank
    if _is_stored_as_named(model, shapes):
        table = _table(order, config)
        write_shards_as_hf(shards, table, source_dir, folder, max_shard_bytes, dtype, ranks, budget)
        return
    whole = _gather(shards, order, shapes, dtype, ranks)

    def write() -> None:
        with disk_errors(folder):
            model.save_pretrained(folder, state_dict=whole, max_shard_size=max_shard_bytes)

    ranks.together(write, where=ranks.is_first)


def check_budget(model: Any, shards: Sequence[LiveShard], budget: Budget, ranks: Ranks) -> None:
    """Raise UserError, on every rank, if `export` could not keep to the budget. Collective."""
    if budget.nbytes is None:
        return
    shapes = whole_shapes(shards, ranks)
    if not _is_stored_as_named(model, shapes):
        raise UserError(
            "--memory_budget: transformers converts the weights of this model, and holds all of them to do so",
            "drop --memory_budget",
        )
    check_budget_of_shards(shards, _table(shapes), budget, ranks)


def _table(names: Iterable[str], config: Mapping[str, Any] | None = None) -> RuleTable:
    return RuleTable((Same(name, (name,)) for name in names), config=config)


def export_adapter(
    folder: Path, model: Any, shards: Sequence[LiveShard], ranks: Ranks, starts: TakenStarts | None = None
) -> None:
    """Write the trained parameters as a PEFT folder. starts: as `save_adapter` takes them. Collective."""
    shapes = whole_shapes(shards, ranks)
    whole = _gather(shards, sorted(shapes), shapes, torch.float32, ranks)
    ranks.together(lambda: save_adapter(model, folder, whole, starts), where=ranks.is_first)


def load_adapter(folder: str, model: Any, shards: Sequence[LiveShard], ranks: Ranks) -> None:
    """Fill the trained parameters from a PEFT folder. Collective."""
    shapes = {shard.key: shard.global_shape for shard in shards}
    tensors = ranks.together(lambda: adapter_tensors(folder, model, shapes))
    for shard in shards:
        shard.data.copy_(tensors[shard.key][as_slices(shard.region)])


def _is_stored_as_named(model: Any, shapes: Mapping[str, Shape]) -> bool:
    """Whether `save_pretrained` would write the tensors with the names and shapes they have in the model."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    written = revert_weight_conversion(model, dict(tensors))
    return {name: tuple(tensor.shape) for name, tensor in written.items()} == dict(shapes)


def _gather(
    shards: Sequence[LiveShard],
    order: Sequence[str],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Gather whole tensors into the first rank's host memory, by summing shards padded with zeros; {} on others."""
    device = get_accelerator().device
    mine = {shard.key: shard for shard in shards if shard.replica[-1] == 0}
    whole = {}
    for name in order:
        tensor = torch.zeros(shapes[name], dtype=dtype, device=device)
        if name in mine:
            tensor[as_slices(mine[name].region)] = mine[name].data.to(device, dtype)
        if ranks.size > 1:
            dist.reduce(tensor, 0)
        if ranks.is_first:
            whole[name] = tensor.cpu()
    return whole
