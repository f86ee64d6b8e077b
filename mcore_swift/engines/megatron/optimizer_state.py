"""The optimizer's state as shards of whole tensors, so that any layout can read what any other wrote.

A data-parallel rank of the distributed optimizer holds a flat range of each parameter: elements a to b of its
rows laid end to end. Such a range is a few rectangles of the tensor (part of a row, whole rows, part of a row),
and rectangles are what a checkpoint stores and finds again. Nothing is gathered, neither to save nor to load.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mcore_swift.models.rules import Region, Shape
from mcore_swift.models.shards import MAIN_WEIGHT, LiveShard, parameter_shards, unwrap

STATE_NAMES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def optimizer_shards(optimizer: Any, chunks: list[Any], *, for_loading: bool = False) -> list[LiveShard]:
    """Views of the fp32 main weights and of Adam's or SGD's moments, named `optimizer.<state>.<weight>`.

    for_loading: make the moments first (zero) where no step has been taken yet.
    """
    shards = []
    for inner in _inner_optimizers(optimizer):
        ranges = _owned_ranges(inner)
        for chunk in chunks:
            for parameter, shard in parameter_shards(unwrap(chunk)):
                if parameter not in ranges:
                    continue
                main, start, stop = ranges[parameter]
                if for_loading:
                    _make_moments(inner.optimizer, main)
                for name, values in _tensors_of(inner.optimizer, main, parameter):
                    shards += _shards_of_range(name, values, start, stop, parameter, shard)
    return shards


def optimizer_step(optimizer: Any) -> int:
    """Steps taken so far, as Adam counts them for its bias correction."""
    for inner in _inner_optimizers(optimizer):
        torch_optimizer = inner.optimizer
        for group in torch_optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for state in torch_optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """The inverse of `optimizer_step`: torch counts for each parameter, fused optimizers for each group."""
    for inner in _inner_optimizers(optimizer):
        torch_optimizer = inner.optimizer
        counts_by_parameter = type(torch_optimizer).__module__.startswith("torch.optim")
        for group in torch_optimizer.param_groups:
            if not counts_by_parameter:
                group["step"] = step
                continue
            for parameter in group["params"]:
                if "exp_avg" in torch_optimizer.state[parameter]:
                    torch_optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _inner_optimizers(optimizer: Any) -> list[Any]:
    found = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [inner for inner in found if getattr(inner, "optimizer", None) is not None]


def _owned_ranges(inner: Any) -> dict[Tensor, tuple[Tensor, int, int]]:
    """Model parameter -> (its main weight or the part of it that this rank updates, first and last+1 element)."""
    if isinstance(inner, DistributedOptimizer):
        owned = {}
        for parameter, (group, order) in inner.model_param_group_index_map.items():
            where = inner._get_model_param_range_map(parameter)["param"]
            owned[parameter] = (inner.optimizer.param_groups[group]["params"][order], where.start, where.end)
        return owned
    owned = {}
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            owned[main] = (main, 0, main.numel())
    for model_group, main_group in zip(
        getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True
    ):
        for parameter, main in zip(model_group, main_group, strict=True):
            owned[parameter] = owned.pop(main)
    return owned


def _make_moments(torch_optimizer: Any, main: Tensor) -> None:
    state = torch_optimizer.state[main]
    if "betas" in torch_optimizer.defaults:
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(main.data))
    elif torch_optimizer.defaults.get("momentum") and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(main.data)


def _tensors_of(torch_optimizer: Any, main: Tensor, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    if main.dtype != parameter.dtype:  # else the weight itself is the main weight
        yield MAIN_WEIGHT, main.detach()
    state = torch_optimizer.state[main]
    for name in STATE_NAMES:
        if state.get(name) is not None:
            yield name, state[name].detach()


def _shards_of_range(
    name: str, values: Tensor, start: int, stop: int, parameter: Tensor, shard: LiveShard
) -> Iterator[LiveShard]:
    """The rectangles of `shard` (a run of whole rows of `parameter`) that elements [start, stop) cover."""
    first = (shard.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    low, high = max(start, first), min(stop, first + shard.data.numel())
    if low >= high:
        return
    flat = values.reshape(-1)
    for region, offset, size in rectangles(tuple(shard.data.shape), low - first, high - first):
        begin = first + offset - start
        view = flat[begin : begin + size].view([b - a for a, b in region])
        placed = tuple(
            (a + origin, b + origin) for (a, b), (origin, _) in zip(region, shard.region, strict=True)
        )
        yield LiveShard(f"optimizer.{name}.{shard.key}", view, placed, shard.global_shape, shard.replica)


def rectangles(shape: Shape, start: int, stop: int) -> Iterator[tuple[Region, int, int]]:
    """Cut elements [start, stop) of a row-major tensor into rectangles, in order.

    Yields (region, its first element, how many elements it has). At most 2 * dimensions - 1 of them.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield tuple((start, stop) for _ in shape), start, stop - start
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _in_row(shape, start // row, start, stop, row)
        return
    if start < first_whole * row:
        yield from _in_row(shape, first_whole - 1, start, first_whole * row, row)
    if first_whole < last_whole:
        region = ((first_whole, last_whole), *((0, size) for size in shape[1:]))
        yield region, first_whole * row, (last_whole - first_whole) * row
    if last_whole * row < stop:
        yield from _in_row(shape, last_whole, last_whole * row, stop, row)


def _in_row(shape: Shape, index: int, start: int, stop: int, row: int) -> Iterator[tuple[Region, int, int]]:
    for region, offset, size in rectangles(shape[1:], start - index * row, stop - index * row):
        yield ((index, index + 1), *region), index * row + offset, size
