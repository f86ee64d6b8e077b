"""Mixture-of-experts models in the engine: options, the scale of router losses, and expert loads in the log."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.errors import UserError
from mcore_swift.models.moe.router import Router
from mcore_swift.models.specs import have_transformer_engine
from mcore_swift.objectives.base import Objective


def moe_options(args: Any) -> dict[str, Any]:
    """Fields of TransformerConfig for experts, from the user's flags (`megatron export` has none of them).

    Raises UserError for recomputation that needs Transformer Engine where it is not used.
    """
    if not hasattr(args, "moe_token_dispatcher_type"):
        return {"moe_token_dispatcher_type": "alltoall"}
    options: dict[str, Any] = {name: getattr(args, name) for name in _PLAIN}
    # Kernels that come with Transformer Engine; without them the plain operations give the same result.
    options["moe_grouped_gemm"] = args.moe_grouped_gemm and have_transformer_engine()
    options["moe_permute_fusion"] = args.moe_permute_fusion and have_transformer_engine()
    if not options["moe_grouped_gemm"] and "moe_act" in args.recompute_modules:
        raise UserError(
            "--recompute_modules moe_act recomputes inside Transformer Engine's grouped kernel, which is not used here",
            remedy="use --recompute_modules moe, which recomputes whole expert layers",
        )
    return options


_PLAIN = (
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_token_dispatcher_type",
    "moe_enable_deepep",
    "moe_shared_expert_overlap",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
)


class Routers:
    """The routers of this rank's model chunks, by index of their layer: decoder layers first, then those of MTP."""

    def __init__(self, chunks: Sequence[nn.Module], config: Any, *, per_layer: bool = False) -> None:
        """per_layer: report the loads of each layer too."""
        self.config = config
        self.per_layer = per_layer
        self.by_layer: dict[int, Router] = {}
        mtp = 0
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if not isinstance(module, Router):
                    continue
                if name.startswith("mtp."):
                    self.by_layer[config.num_layers + mtp] = module
                    mtp += 1
                else:
                    self.by_layer[module.layer_number - 1] = module

    def begin_step(self, microbatches: Sequence[Batch], objective: Objective) -> None:
        """Tell every router by what the main loss of a microbatch will be divided. Collective over data-parallel ranks.

        At the end of the step, all gradients are divided by the number of terms in the whole batch. Router losses,
        which are means over a microbatch, are scaled so that a mean over microbatches results.
        """
        terms = sum(objective.count(batch) for batch in microbatches)
        total = terms.to(device=get_accelerator().device, dtype=torch.float32)
        group = parallel_state.get_data_parallel_group()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        for router in self.by_layer.values():
            router.begin_step(total / (len(microbatches) * group.size()))

    def tallies(self) -> Tensor:
        """fp64 `[layers, experts + 2]`: loads and losses counted by this rank's routers, zero for other layers.

        The sum over all ranks is that of the step, because ranks have different tokens or layers.
        """
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        width = self.config.num_moe_experts + 2
        tallies = torch.zeros(layers, width, dtype=torch.float64, device=get_accelerator().device)
        for layer, router in self.by_layer.items():
            tallies[layer] = router.tally
        return tallies

    def metrics(self, tallies: Tensor, microbatches: int) -> dict[str, float]:
        """Metrics of a step for the log. tallies: summed over all ranks. microbatches: of all data-parallel ranks.

        expert_load_max: load of a layer's busiest expert relative to an even share, averaged over layers;
        expert_load_worst: of the layer where it is largest. load_balancing_loss, router_z_loss: without coefficient,
        averaged over microbatches and layers.
        """
        loads, losses = tallies[:, :-2].cpu(), tallies[:, -2:].cpu() / microbatches
        sparse = loads.sum(dim=-1) > 0
        if not sparse.any():
            return {}
        uneven = loads.amax(dim=-1) / loads.mean(dim=-1).clamp(min=1e-9)
        metrics = {
            "expert_load_max": uneven[sparse].mean().item(),
            "expert_load_worst": uneven[sparse].max().item(),
        }
        balanced = self.config.moe_aux_loss_coeff and self.config.moe_router_load_balancing_type != "none"
        if balanced:
            metrics["load_balancing_loss"] = losses[sparse, 0].mean().item()
        if self.config.moe_z_loss_coeff:
            metrics["router_z_loss"] = losses[sparse, 1].mean().item()
        if self.per_layer:
            for layer in sparse.nonzero().flatten().tolist():
                metrics[f"expert_load_max/layer_{layer}"] = uneven[layer].item()
                if balanced:
                    metrics[f"load_balancing_loss/layer_{layer}"] = losses[layer, 0].item()
        return metrics
