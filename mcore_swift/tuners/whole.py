"""Which weights of a megatron-core model are trained, chosen by their Hugging Face names.

Megatron-core fuses several HF weights into one tensor (queries, keys and values; gate and up). Such a tensor has one
gradient, one main weight and one weight decay: it is trained or frozen as a whole, and a choice that divides it is
refused.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from converters.ranks import Ranks
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Rule, RuleTable, Vocab
from mcore_swift.models.shards import LiveShard, parameter_shards, unwrap
from mcore_swift.tuners.freezing import frozen_names

Names = tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, without buffers.

    held: for each parameter of this rank, the HF weights of which it contains at least a part.
    fused: the same for the whole model, in order from the input, each combination once.
    sizes: number of elements of each whole HF weight, in the same order.
    """

    held: dict[nn.Parameter, Names]
    fused: list[Names]
    sizes: dict[str, int]


def weights_of(chunks: Iterable[nn.Module], table: RuleTable, ranks: Ranks | None = None) -> Weights:
    """The HF weights in the parameters of all ranks. Collective."""
    names: dict[Tensor, dict[str, int]] = {}
    for chunk in chunks:
        for parameter, shard in parameter_shards(unwrap(chunk)):
            if isinstance(parameter, nn.Parameter) and shard.key in table.by_mcore:
                names.setdefault(parameter, {}).update(_hf_sizes(table.by_mcore[shard.key], shard))
    place = {name: number for number, name in enumerate(name for rule in table.rules for name in rule.hf)}
    held = {parameter: tuple(sorted(of_one, key=place.get)) for parameter, of_one in names.items()}
    sizes: dict[str, int] = {}
    fused: dict[Names, None] = {}
    for of_rank in (ranks or Ranks()).gather([(held[parameter], names[parameter]) for parameter in held]):
        for together, of_one in of_rank:
            sizes.update(of_one)
            fused[together] = None
    ordered = sorted(fused, key=lambda together: place[together[0]])
    return Weights(
        held=held,
        fused=ordered,
        sizes={name: sizes[name] for together in ordered for name in together},
    )


def _hf_sizes(rule: Rule, shard: LiveShard) -> dict[str, int]:
    shapes = rule.hf_shapes(shard.global_shape)
    if isinstance(rule, Vocab):  # tied copies are not counted, and a rank's rows may all be padding
        return {rule.hf[0]: math.prod(shapes[rule.hf[0]])}
    return {block.name: math.prod(shapes[block.name]) for block in rule.blocks(shard.region, shapes)}


def freeze(chunks: Sequence[nn.Module], table: RuleTable, args: Any) -> float:
    """Freeze the weights that the flags of `tuners.freezing` name; returns the trained fraction of the parameters.

    Collective. Raises UserError as `frozen_names` does, and for a choice that divides a tensor.
    """
    weights = weights_of(chunks, table)
    stays = frozen_names(weights.sizes, args, weights.fused)
    train_only(chunks, weights, weights.sizes.keys() - stays)
    for chunk in chunks:
        if _recomputes(chunk.config):
            start_gradients(chunk)
    kept = sum(weights.sizes[name] for name in stays)
    return 1 - kept / sum(weights.sizes.values())


def train_only(chunks: Iterable[nn.Module], weights: Weights, wanted: Collection[str]) -> None:
    """Train the parameters that contain the `wanted` HF weights, and freeze all others.

    chunks: the model of `weights`. Raises UserError, on every rank, if a parameter contains wanted and other weights.
    """
    for together in weights.fused:
        trains = [name for name in together if name in wanted]
        if trains and len(trains) < len(together):
            stays = next(name for name in together if name not in wanted)
            raise UserError(
                f"{trains[0]} would train and {stays} would be frozen, and megatron-core keeps them in one tensor",
                f"train or freeze all of {', '.join(together)}; `swift sft --backend fsdp` keeps them separate",
            )
    for parameter, names in weights.held.items():
        parameter.requires_grad_(names[0] in wanted)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ColumnParallelLinear):
                _let_bias_train(module)


def _let_bias_train(layer: ColumnParallelLinear) -> None:
    """megatron-core's product with a frozen weight computes no gradient for the bias it adds: add the bias outside."""
    bias = layer.bias
    if bias is not None and bias.requires_grad and not (layer.weight.requires_grad or layer.skip_bias_add):
        layer.skip_bias_add = True
        layer.register_forward_hook(_add_bias)


def _add_bias(layer: Any, inputs: Any, results: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
    output, bias = results
    if layer.gather_output:
        bias = gather_from_tensor_model_parallel_region(bias, group=layer.tp_group)
    return output + bias, None


def start_gradients(chunk: nn.Module) -> None:
    """Make the embedding output require a gradient: recomputed layers get none unless their input does."""
    if getattr(chunk, "embedding", None) is not None:
        chunk.embedding.register_forward_hook(_start_gradient)


def _start_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _recomputes(config: Any) -> bool:
    """Whether layers with weights are recomputed; core_attn has none."""
    if config.recompute_granularity == "selective":
        return bool(set(config.recompute_modules) - {"core_attn"})
    return config.recompute_granularity is not None
