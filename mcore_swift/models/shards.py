"""Which part of each megatron-core tensor a live model holds, as the model itself reports it.

megatron-core's `sharded_state_dict` names every parameter and persistent buffer by its checkpoint key and gives its
place in the whole tensor, in any layout. So code that copies weights need not know about TP, PP or EP.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mcore_swift.models.rules import Region, Shape

METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""Asks megatron-core for one key per layer, by global number, and one key for both halves of a gated MLP."""

MAIN_WEIGHT = "fp32_param"
"""Optimizer state with the exact weight, of which the model's is rounded: `optimizer.fp32_param.<key>`."""


ADAPTER = "adapter."
"""Prefix of adapter keys: 'adapter.<HF module>.lora_A.weight', with shapes and places as in the HF module."""


@dataclass(frozen=True)
class LiveShard:
    """One rank's part of one tensor of a checkpoint.

    data: the values, a view of the parameter: writing to it changes the model.
    region: the part of the whole tensor (of shape `global_shape`, vocabulary padding included) that it holds.
    replica: megatron-core's coordinates among the ranks that hold the same values, (stage, tensor, data) parallel.
    """

    key: str
    data: torch.Tensor
    region: Region
    global_shape: Shape
    replica: tuple[int, ...] = (0, 0, 0)


@dataclass(frozen=True)
class MergedShard(LiveShard):
    """A shard of a weight that has an adapter. `data` is the frozen weight's; to read, use `layer.merged()` and `of`.

    layer: has `weight`, of which `data` is a view, and `merged()`, which returns a new tensor of its shape and dtype.
    All ranks of the layer's tensor-parallel group must call `merged()` together.
    """

    layer: Any = None

    def of(self, merged: torch.Tensor) -> torch.Tensor:
        """The shard's values in the result of `layer.merged()`: a view."""
        weight, view = self.layer.weight, self.data
        place = merged.storage_offset() + view.storage_offset() - weight.storage_offset()
        return merged.as_strided(view.shape, view.stride(), place)


def is_expert(key: str) -> bool:
    """Whether a parameter or checkpoint key is a weight of routed experts, which EP and ETP divide."""
    return ".experts." in key


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and mixed-precision wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


@torch.no_grad()
def live_shards(model_chunks: nn.Module | Sequence[nn.Module]) -> list[LiveShard]:
    """All shards of this rank's model chunks. A tied output layer appears under the embedding's key.

    Adapters are not weights of the model and are left out; see `tuners.attach.adapter_shards`.
    Extra state (`..._extra_state`: FP8 scales of Transformer Engine) has no Hugging Face counterpart and is
    left out.
    """
    chunks: Iterable[nn.Module] = [model_chunks] if isinstance(model_chunks, nn.Module) else model_chunks
    return [
        shard
        for chunk in chunks
        for _, shard in parameter_shards(unwrap(chunk))
        if not shard.key.startswith(ADAPTER)
    ]


def parameter_shards(model: nn.Module) -> Iterator[tuple[torch.Tensor, LiveShard]]:
    """(parameter or buffer, shard that is a view of it) for all of a model chunk; gate and up are separate shards."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in nested_values(model.sharded_state_dict(metadata=dict(METADATA))):
        if isinstance(value, ShardedTensorFactory):
            for part in nested_values(value.build()):
                yield value.data, _shard(part)
        elif isinstance(value, ShardedTensor):
            yield value.data, _shard(value)
    for module in model.modules():
        if hasattr(module, "own_shards"):
            yield from module.own_shards()


def _shard(tensor) -> LiveShard:
    data = tensor.data.detach()
    for _ in range(tensor.prepend_axis_num):
        data = data.unsqueeze(0)
    region = tuple(
        (start, start + size) for start, size in zip(tensor.global_offset, data.shape, strict=True)
    )
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (0, 0, tensor.replica_id)
    return LiveShard(tensor.key, data, region, tuple(tensor.global_shape), replica)
