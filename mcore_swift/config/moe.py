"""Mixture-of-experts models: routing, and how experts are distributed over processes."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg


@dataclasses.dataclass(kw_only=True)
class ExpertParallelArguments(Arguments):
    TITLE: ClassVar[str] = "Parallelism"

    expert_model_parallel_size: int = arg(
        1, "processes that divide the experts of every layer among them (EP)", at_least=1
    )
    expert_tensor_parallel_size: int = arg(
        1,
        "processes that divide the matrices of every expert (ETP), independently of --tensor_model_parallel_size, "
        "which divides the rest of the layer",
        at_least=1,
    )


@dataclasses.dataclass(kw_only=True)
class MoEArguments(Arguments):
    TITLE: ClassVar[str] = "Mixture of experts"

    moe_router_load_balancing_type: str = arg(
        "aux_loss",
        "load-balancing loss, with weight --moe_aux_loss_coeff: over each microbatch (aux_loss), over each of its "
        "rows (seq_aux_loss), over the whole batch (global_aux_loss), or none",
        choices=("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
        refused={"sinkhorn": "it does not use the scores of the pre-trained router"},
    )
    moe_aux_loss_coeff: float = arg(0.0, "weight of the load balancing loss of each layer", at_least=0)
    moe_z_loss_coeff: float | None = arg(
        None, "weight of the z-loss, which keeps the router's logits small; 1e-3 is usual", at_least=0
    )
    moe_router_bias_update_rate: float = arg(
        1e-3,
        "for routers with a load-balancing bias: how much the bias of an expert changes per step, up if it had fewer "
        "tokens than average, down if more; 0 leaves it unchanged",
        at_least=0,
    )
    moe_router_dtype: str | None = arg(
        "fp32", "precision of the router; none: that of the model", choices=("fp32", "fp64")
    )
    moe_token_dispatcher_type: str = arg(
        "alltoall",
        "how tokens reach their experts: sent to the processes that have them (alltoall), gathered on every process "
        "(allgather), or by DeepEP (flex)",
        choices=("alltoall", "allgather", "flex"),
    )
    moe_enable_deepep: bool = arg(False, "send tokens with DeepEP; with --moe_token_dispatcher_type flex")
    moe_grouped_gemm: bool = arg(
        True,
        "compute all experts of a process in one kernel, if Transformer Engine is used; otherwise one after another",
    )
    moe_permute_fusion: bool = arg(
        False, "sort tokens by expert in one kernel, if Transformer Engine is used; the result is the same"
    )
    moe_shared_expert_overlap: bool = arg(
        False,
        "compute the shared expert during the all-to-all of tokens; with --moe_token_dispatcher_type alltoall",
    )
    moe_layer_recompute: bool = arg(
        False, "recompute the expert layers in the backward pass: short for --recompute_modules moe"
    )
    moe_expert_capacity_factor: float | None = arg(
        None,
        "maximum number of tokens of an expert, as a multiple of an even share; the others skip it. Not given: no "
        "token is dropped",
        above=0,
    )
    moe_pad_expert_input_to_capacity: bool = arg(
        False, "pad the tokens of each expert to its capacity; with --moe_expert_capacity_factor"
    )
    moe_token_drop_policy: str = arg(
        "probs",
        "which tokens an expert drops: those with the lowest score (probs) or the last (position)",
        choices=("probs", "position"),
    )
    moe_per_layer_logging: bool = arg(False, "log the expert loads of every layer, not only their summary")

    def check(self) -> Iterator[UserError]:
        if self.moe_token_dispatcher_type == "flex" and importlib.util.find_spec("deep_ep") is None:
            yield UserError(
                "--moe_token_dispatcher_type flex needs the package deep_ep, which is not installed",
                "install DeepEP on the GPU machine, or use --moe_token_dispatcher_type alltoall",
            )
        if self.moe_enable_deepep and self.moe_token_dispatcher_type != "flex":
            yield UserError(
                f"--moe_enable_deepep is for --moe_token_dispatcher_type flex, not {self.moe_token_dispatcher_type}",
                "drop it, or add --moe_token_dispatcher_type flex",
            )
        if self.moe_shared_expert_overlap and self.moe_token_dispatcher_type == "allgather":
            yield UserError(
                "--moe_shared_expert_overlap overlaps with the all-to-all of tokens, and --moe_token_dispatcher_type "
                "allgather has none",
                "use --moe_token_dispatcher_type alltoall",
            )
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            yield UserError(
                "--moe_pad_expert_input_to_capacity without a capacity",
                "add --moe_expert_capacity_factor 1.5",
            )
