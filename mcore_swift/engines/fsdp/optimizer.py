"""The optimizer of a transformers model: groups by weight decay, the norm of sharded gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.config.trainer import ELEMENTWISE
from mcore_swift.engines.fsdp.dtensor import local, shard_group
from mcore_swift.engines.fsdp.whole_optimizers import build_whole_optimizer
from mcore_swift.errors import UserError


def build_optimizer(
    model: nn.Module, args: Any, lr_factors: Mapping[str, float] | None = None, *, is_sharded: bool = False
) -> Any:
    """The optimizer `args.optimizer` over the trained parameters; norms and biases have no weight decay.

    lr_factors: parameter name -> factor of the learning rate (LoRA+). is_sharded: processes hold parts of parameters.
    Raises UserError for an optimizer that needs whole parameters if they are sharded, or whose package is missing.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 1.0 if parameter.dim() > 1 and not name.endswith("bias") else 0.0
            members.setdefault((decay, (lr_factors or {}).get(name, 1.0)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": args.weight_decay * decay, "wd_mult": decay, "lr_mult": lr}
        for (decay, lr), parameters in members.items()
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.sgd_momentum)
    if args.optimizer not in ELEMENTWISE:
        if is_sharded:
            raise UserError(
                f"--optim {args.optimizer} needs whole parameters, and --backend fsdp shards them over the processes",
                "use --backend ddp, or --optim adamw_torch",
            )
        return build_whole_optimizer(model, groups, args)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.adam_eps)


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay in every group, by the group's own factors."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def scale_and_clip(parameters: Iterable[nn.Parameter], divisor: float, limit: float) -> float:
    """Divide summed gradients by `divisor` and clip them to the norm `limit` (0: no clipping).

    Returns the norm of the divided gradient before clipping. Collective.
    """
    parameters = list(parameters)
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([gradient.float() for gradient in gradients]) if gradients else []
    device = get_accelerator().device
    square = torch.zeros((), device=device)
    if norms:
        square = torch.stack([norm.to(device) for norm in norms]).square().sum()
    group = shard_group(parameters)
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = float(square.sqrt()) / divisor
    scale = 1.0 / divisor
    if limit > 0 and norm > limit:
        scale *= limit / (norm + 1e-6)
    if gradients:
        torch._foreach_mul_(gradients, scale)
    return norm
