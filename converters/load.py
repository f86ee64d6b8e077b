"""A Hugging Face checkpoint into a live model: each rank reads the byte ranges of its own shards."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from converters.coverage import check_hf, check_model
from converters.hf_reader import HFReader, copy_block
from converters.ranks import Ranks
from converters.regions import numel
from mcore_swift.accelerator import get_accelerator
from mcore_swift.models.rules import RuleTable, Shape
from mcore_swift.models.shards import ADAPTER, LiveShard, live_shards, parameter_shards, unwrap


@dataclass(frozen=True)
class LoadStats:
    """What loading took on this rank. bytes_read: of tensors, from files."""

    bytes_read: int
    seconds: float


def load_hf(
    model_chunks: nn.Module | Sequence[nn.Module],
    reader: HFReader,
    table: RuleTable,
    ranks: Ranks | None = None,
) -> LoadStats:
    """Fill every parameter of the model chunks of this rank, converting to its dtype.

    Rows of vocabulary padding become zero. Collective over `ranks` (the default process group): all ranks
    that share the model call it. Afterwards reload the fp32 main weights of an optimizer, if there is one.

    Raises UserErrors on every rank, before a parameter has changed, if a tensor of the checkpoint is missing,
    not used or of the wrong shape, or a parameter would stay unfilled.
    """
    started, before = time.monotonic(), reader.bytes_read
    chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    check_coverage(live_shards(chunks), reader, table, ranks or Ranks())
    with torch.no_grad():
        for chunk in map(unwrap, chunks):
            _fill_chunk(chunk, reader, table)
    return LoadStats(reader.bytes_read - before, time.monotonic() - started)


def check_coverage(shards: Sequence[LiveShard], reader: HFReader, table: RuleTable, ranks: Ranks) -> None:
    """Raise UserErrors unless checkpoint, table and model fit each other completely. Collective."""
    source = str(reader.model_dir)
    model_shapes = ranks.union({shard.key: shard.global_shape for shard in shards})
    ranks.together(lambda: check_model(table, check_hf(table, reader.shapes, source), model_shapes, source))


def _fill_chunk(chunk: nn.Module, reader: HFReader, table: RuleTable) -> None:
    """Fill parameters; of a layer that keeps its weight in another form, one at a time, for it to take."""
    shapes = reader.shapes
    takers = {module.weight: module.take for module in chunk.modules() if hasattr(module, "take")}
    of_takers: dict[torch.Tensor, list[LiveShard]] = {}
    for parameter, shard in parameter_shards(chunk):
        if parameter in takers:
            of_takers.setdefault(parameter, []).append(shard)
        elif not shard.key.startswith(ADAPTER):
            _fill(shard, reader, table, shapes)
    for parameter, shards in of_takers.items():
        values = parameter.new_empty(parameter.shape, device=get_accelerator().device)
        for shard in shards:
            place = shard.data.storage_offset() - parameter.storage_offset()
            view = values.as_strided(shard.data.shape, shard.data.stride(), place)
            _fill(replace(shard, data=view), reader, table, shapes)
        takers[parameter](values)


def _fill(shard: LiveShard, reader: HFReader, table: RuleTable, shapes: dict[str, Shape]) -> None:
    blocks = list(table.by_mcore[shard.key].blocks(shard.region, shapes))
    if sum(numel(block.mcore) for block in blocks) < shard.data.numel():
        shard.data.zero_()
    for block in blocks:
        copy_block(reader, block, block.of(shard.data))
