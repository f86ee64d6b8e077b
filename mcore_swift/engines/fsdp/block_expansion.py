"""Block expansion (LLaMA Pro, arXiv:2401.02415): insert decoder layers into a model and train only those.

Each new layer is initialized as a copy of the layer before it with zeroed output projections, so that the expanded
model initially computes what the original does.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mcore_swift.engines.fsdp.model import TransformersPlan
from mcore_swift.errors import UserError
from mcore_swift.models.shards import LiveShard

_OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "dense_4h_to_h", "w2"}
"""Names of the output projections of attention and MLP, over the architectures of transformers."""
# settings that select layers by index, and would be wrong once layers are inserted
_BY_NUMBER = (
    "mlp_only_layers",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "moe_layers",
    "attn_layer_period",
)


def expanded(plan: TransformersPlan, new_blocks: int, groups: int | None) -> TransformersPlan:
    """The plan of a model with `new_blocks` more layers, an equal number behind each of `groups` groups of layers.

    groups: None means as many as new layers. Raises UserError if the layers cannot be divided into such groups, or if
    the config selects layers by index.
    """
    config = plan.hf
    layers, groups = config.num_hidden_layers, groups or new_blocks
    if layers % groups or new_blocks % groups:
        raise UserError(
            f"--llamapro_num_new_blocks {new_blocks}: {groups} groups must divide both the new layers and the model's "
            f"{layers} layers evenly",
            f"choose a number that divides {layers}, and --llamapro_num_groups that divides it",
        )
    numbered = [
        name for name in _BY_NUMBER if getattr(config, name, None) not in (None, 0, 1, []) and layers > 1
    ]
    if numbered:
        raise UserError(
            f"--tuner_type llamapro: {', '.join(numbered)} in config.json selects layers by their index",
            "use another --tuner_type",
        )
    sources = _sources(layers, new_blocks, groups)
    changes: dict[str, Any] = {
        name: [value[source] for source in sources]
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == layers
    }
    changes[_name_of_layers(config)] = len(sources)
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return replace(plan, hf=type(config)(**(values | changes)), config_changes=changes)


def _name_of_layers(config: Any) -> str:
    """What config.json calls the number of layers."""
    return getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")


def _sources(layers: int, new_blocks: int, groups: int) -> list[int]:
    """For each layer of the expanded model, the original layer whose weights initialize it."""
    size, more = layers // groups, new_blocks // groups
    return [
        source
        for group in range(groups)
        for source in (*range(group * size, (group + 1) * size), *[(group + 1) * size - 1] * more)
    ]


class Expansion:
    """Which parameters of an expanded model are new, and which weights of the checkpoint initialize each."""

    def __init__(self, model: nn.Module, new_blocks: int, groups: int | None) -> None:
        """Raises UserError if the decoder layers of the model, or their output projections, are not found."""
        total = model.config.num_hidden_layers
        lists = [
            (name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total
        ]
        if not lists:
            raise UserError(
                "--tuner_type llamapro: the decoder layers of this model are not found",
                "use another --tuner_type",
            )
        self._prefix, blocks = f"{lists[0][0]}.", lists[0][1]
        sources = _sources(total - new_blocks, new_blocks, groups or new_blocks)
        self._sources = sources
        self.new = {n for n, source in enumerate(sources) if n and sources[n - 1] == source}
        first = blocks[min(self.new)]
        outputs = [n for n, _ in first.named_parameters() if _is_output(n)]
        if len({name.split(".")[0] for name in outputs}) < 2:
            raise UserError(
                "--tuner_type llamapro: the output projections of attention and MLP of this model are not found",
                "use another --tuner_type",
            )

    def freeze(self, model: nn.Module) -> None:
        """Freeze everything but the new layers."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._number(name) in self.new)

    def sources(self, shards: list[LiveShard]) -> list[LiveShard]:
        """The shards under the names of the weights that initialize them."""
        return [replace(shard, key=self._source(shard.key)) for shard in shards]

    @torch.no_grad()
    def silence(self, shards: list[LiveShard]) -> None:
        """Zero the output projections of the new layers."""
        for shard in shards:
            if self._number(shard.key) in self.new and _is_output(shard.key):
                shard.data.zero_()

    def _number(self, name: str) -> int | None:
        """The index of the layer that a parameter belongs to, if any."""
        if not name.startswith(self._prefix):
            return None
        return int(name.removeprefix(self._prefix).split(".")[0])

    def _source(self, name: str) -> str:
        number = self._number(name)
        if number is None:
            return name
        rest = name.removeprefix(self._prefix).split(".", 1)[1]
        return f"{self._prefix}{self._sources[number]}.{rest}"


def _is_output(name: str) -> bool:
    return not _OUTPUTS.isdisjoint(name.split("."))
