"""Attaching adapters to a model that has been built, and finding their tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.errors import UserError
from mcore_swift.models.moe.router import Router
from mcore_swift.models.rules import RuleTable
from mcore_swift.models.shards import ADAPTER, LiveShard, MergedShard, parameter_shards, unwrap
from mcore_swift.models.shards import is_expert as in_expert
from mcore_swift.models.without_memory import given_memory
from mcore_swift.tuners.beside import beside, whole_shards
from mcore_swift.tuners.engine_layers import adapt, kind_of, weights_in
from mcore_swift.tuners.lora import LoraLinear
from mcore_swift.tuners.lora_outer import LoraEmbedding, LoraOutput, RouterAdapter
from mcore_swift.tuners.parts import Part, parts_by_weight
from mcore_swift.tuners.quantized import FourBit, QuantizedLinear
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import chosen_modules, embedding_module
from mcore_swift.tuners.whole import start_gradients, train_only, weights_of

Adapter = LoraLinear | LoraEmbedding | RouterAdapter


def attach(
    chunks: Sequence[nn.Module], table: RuleTable, settings: LoraSettings, four_bit: FourBit | None = None
) -> list[Adapter]:
    """Freeze the model and attach an adapter to every target module of this rank; returns the adapters.

    four_bit: how frozen linear layers, with or without an adapter, keep their weights; they are filled afterwards.

    The targets are chosen from the names of the whole model, so every rank chooses the same. Collective.
    Raises UserError for a target that matches nothing or is in a layer that supports no adapter, and for modules that
    cannot be trained in full beside adapters.
    """
    chosen = chosen_modules(table, settings)
    for chunk in chunks:
        chunk.requires_grad_(False)
        start_gradients(chunk)
    train_only(chunks, weights_of(chunks, table), beside(table, settings).files)
    parts = parts_by_weight(chunks, table)
    adapted: list[Adapter] = []
    for chunk in chunks:
        for parent, name, layer, is_expert in list(_linears(chunk)):
            kind = kind_of(layer)
            held = [parts.get(weight, []) for weight in weights_in(layer, kind)]
            if four_bit is not None and not kind.grouped and QuantizedLinear.fits(layer, held[0]):
                layer = QuantizedLinear(layer, held[0], four_bit)
                setattr(parent, name, layer)
            wanted = [[part for part in of_one if part.module in chosen] for of_one in held]
            if any(wanted):
                adapter = adapt(layer, kind, wanted, settings, is_expert=is_expert)
                setattr(parent, name, adapter)
                adapted += adapter.adapters
        adapted += _outer(chunk, parts, chosen, settings)
        if four_bit is not None:
            _give_rest_memory(chunk)
    Ranks().agree(_left_out(chunks, parts, chosen, adapted))
    return adapted


def _outer(
    chunk: nn.Module,
    parts: Mapping[nn.Parameter, list[Part]],
    chosen: Collection[str],
    settings: LoraSettings,
) -> list[Adapter]:
    """Attach adapters to embedding, output layer and routers, where they are chosen."""

    def wanted(weight: nn.Parameter) -> list[Part]:
        return [part for part in parts.get(weight, []) if part.module in chosen]

    adapted: list[Adapter] = []
    embedding, output = getattr(chunk, "embedding", None), getattr(chunk, "output_layer", None)
    if embedding is not None and (own := wanted(embedding.word_embeddings.weight)):
        embedding.word_embeddings = LoraEmbedding(embedding.word_embeddings, own[0], settings)
        adapted.append(embedding.word_embeddings)
    if output is not None and output.weight is not None and (own := wanted(output.weight)):
        chunk.output_layer = LoraOutput(output, own, settings)
        adapted.append(chunk.output_layer)
    for router in [module for module in chunk.modules() if isinstance(module, Router)]:
        if own := wanted(router.weight):
            router.adapter = RouterAdapter(router, own[0], settings)
            adapted.append(router.adapter)
    return adapted


def _left_out(
    chunks: Iterable[nn.Module],
    parts: Mapping[nn.Parameter, Sequence[Part]],
    chosen: Collection[str],
    adapted: Iterable[Adapter],
) -> UserError | None:
    """The error for a layer that should have an adapter and is of a class that supports none."""
    done = {layer.weight for layer in adapted}
    for chunk in chunks:
        for module in chunk.modules():
            for parameter in module._parameters.values():
                names = [part.module for part in parts.get(parameter, ()) if part.module in chosen]
                if names and parameter not in done:
                    return UserError(
                        f"{names[0]} is in a layer of class {type(module).__name__}, which supports no adapter yet",
                        "use --transformer_impl local, or leave it out of --target_modules",
                    )
    return None


def _give_rest_memory(chunk: nn.Module) -> None:
    """Allocate the weights that are on the meta device and are not quantized."""
    quantized = {id(module.base) for module in chunk.modules() if isinstance(module, QuantizedLinear)}
    for module in chunk.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(module) not in quantized:
                module._parameters[name] = given_memory(parameter, get_accelerator().device)


def adapter_names(table: RuleTable, settings: LoraSettings) -> list[str]:
    """Keys of the adapter's tensors in the whole model, over all ranks."""
    chosen = chosen_modules(table, settings)
    embedding = embedding_module(table)
    names = []
    for module in sorted(chosen):
        form = "lora_embedding_{}" if module == embedding else "lora_{}.weight"
        names += [f"{ADAPTER}{module}.{form.format(matrix)}" for matrix in "AB"]
        if settings.use_dora:
            names.append(f"{ADAPTER}{module}.lora_magnitude_vector")
    return names


def trained_shards(chunks: Sequence[nn.Module]) -> list[LiveShard]:
    """This rank's shards of the adapters, and of the modules trained in full beside them."""
    return adapter_shards(chunks) + whole_shards(chunks)


def adapter_shards(chunks: Iterable[nn.Module]) -> list[LiveShard]:
    """This rank's shards of the adapters."""
    return [
        shard
        for chunk in chunks
        for _, shard in parameter_shards(unwrap(chunk))
        if shard.key.startswith(ADAPTER)
    ]


def merged_shards(chunks: Iterable[nn.Module]) -> list[LiveShard]:
    """The model's weights like `live_shards`, with adapters merged.

    Merging is lazy: whoever reads a `MergedShard` computes its layer's weight, uses it and frees it.
    """
    shards = []
    for chunk in map(unwrap, chunks):
        adapted: dict[nn.Parameter, nn.Module] = {}
        for layer in chunk.modules():  # parents first: an adapter comes before the quantized layer it wraps
            if isinstance(layer, Adapter | QuantizedLinear):
                adapted.setdefault(layer.weight, layer)
        for parameter, shard in parameter_shards(chunk):
            if parameter in adapted:
                shard = MergedShard(**vars(shard), layer=adapted[parameter])
            if not shard.key.startswith(ADAPTER):
                shards.append(shard)
    return shards


def _linears(chunk: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, bool]]:
    """(parent, attribute, layer, whether it is an expert's) of every linear layer that supports adapters."""
    for place, parent in chunk.named_modules():
        for name, child in parent.named_children():
            if (
                name.startswith("linear_")
                and kind_of(child) is not None
                and weights_in(child, kind_of(child))
            ):
                yield parent, name, child, in_expert(f"{place}.{name}")
