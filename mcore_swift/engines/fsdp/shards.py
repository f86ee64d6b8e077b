"""This rank's part of a transformers model and its optimizer, as regions of whole tensors.

The checkpoint format is therefore that of the Megatron engine, and any number of processes can read what any other
number wrote. Tensors have transformers' parameter names.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mcore_swift.engines.fsdp import rank_allocation
from mcore_swift.engines.fsdp.dtensor import local, local_region
from mcore_swift.engines.fsdp.whole_optimizers import WholeTensorOptimizer
from mcore_swift.models.rules import full_region
from mcore_swift.models.shards import LiveShard

STATE_NAMES = ("exp_avg", "exp_avg_sq", "momentum_buffer", *rank_allocation.STATES)


def weight_shards(model: nn.Module, rank: int, *, only_trained: bool = False) -> list[LiveShard]:
    """Parameters (tied ones once) and persistent buffers, or only the trained parameters."""
    shards = [
        shard
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not only_trained
        for shard in _shards(name, parameter)
    ]
    return shards if only_trained else shards + list(_buffer_shards(model, rank))


def optimizer_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, for_loading: bool = False
) -> list[LiveShard]:
    """Optimizer state of every trained parameter, named `optimizer.<state>.<parameter>`.

    for_loading: create it (zero) if no step has been taken yet.
    """
    shards = []
    if isinstance(optimizer, WholeTensorOptimizer):
        return list(_whole_tensors(model, optimizer, for_loading=for_loading))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state: dict[str, Any] = optimizer.state[parameter]
        if for_loading:
            _make_moments(optimizer, parameter)
        for key in STATE_NAMES:
            if isinstance(state.get(key), Tensor):
                shards += _shards(f"optimizer.{key}.{name}", state[key])
    return shards


def _whole_tensors(
    model: nn.Module, optimizer: WholeTensorOptimizer, *, for_loading: bool
) -> Iterator[LiveShard]:
    """State that every process has a replica of."""
    if for_loading:
        optimizer.make_states()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for key, tensor in optimizer.tensors(parameter).items():
                shape = tuple(tensor.shape)
                place = (0, 0, dist.get_rank())
                yield LiveShard(f"optimizer.{key}.{name}", tensor, full_region(shape), shape, place)


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """Number of steps taken, by Adam's counter for bias correction."""
    for state in _states(optimizer):
        if "step" in state:
            return int(state["step"])
    return 0


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """The inverse of `optimizer_step`."""
    for state in _states(optimizer):
        if "step" in state:  # packages have numbers, torch has tensors
            state["step"] = torch.tensor(float(step)) if isinstance(state["step"], Tensor) else step


def _states(optimizer: Any) -> Iterable[dict[str, Any]]:
    is_whole = isinstance(optimizer, WholeTensorOptimizer)
    return optimizer.states() if is_whole else optimizer.state.values()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong in a checkpoint, without those that the model computes from its config."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _make_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    if "betas" in optimizer.defaults:
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter.data))
        state.setdefault("step", torch.tensor(0.0))
    elif optimizer.defaults.get("momentum") and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter.data)


def _shards(key: str, tensor: Tensor) -> Iterator[LiveShard]:
    data, shape = local(tensor).detach(), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        yield LiveShard(key, data, full_region(shape), shape)
        return
    if data.numel() == 0:  # fewer rows than ranks
        return
    mesh = tensor.device_mesh
    copy = mesh.get_local_rank("replicate") if "replicate" in mesh.mesh_dim_names else 0
    yield LiveShard(key, data, local_region(tensor), shape, (0, 0, copy))


def _buffer_shards(model: nn.Module, rank: int) -> Iterator[LiveShard]:
    for name, buffer in persistent_buffers(model).items():
        shape = tuple(buffer.shape)
        yield LiveShard(name, buffer.detach(), full_region(shape), shape, (0, 0, rank))
