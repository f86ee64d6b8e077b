"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers behind the decoder that look further.

Layer k makes, of the hidden state of depth k - 1 at a position and the embedding of the token k places on, the hidden
state of depth k there, from which the output layer tells the token after that one. Which tokens and labels these are is
worked out once per microbatch, where samples are still whole: nothing here crosses from one sample into the next.
megatron-core's block of such layers is built around ours, so that copies of the embedding, their gradients and the
names in a checkpoint are its own.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    checkpoint,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mcore_swift.models.norm import RMSNorm


class MultiTokenLayer(MegatronModule):
    """One depth: both inputs normed, projected together, and a decoder layer. Named as megatron-core's is."""

    def __init__(
        self,
        config: Any,
        transformer_layer: ModuleSpec,
        layer_number: int = 1,
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        """layer_number: depth, from 1."""
        super().__init__(config=config)
        self.layer_number = layer_number

        def norm() -> RMSNorm:
            return RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)

        self.enorm, self.hnorm, self.final_layernorm = norm(), norm(), norm()
        self.eh_proj = ColumnParallelLinear(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
        )
        # A layer counts from the first one of its stage.
        after = config.num_layers - get_transformer_layer_offset(config, vp_stage)
        self.transformer_layer = build_module(
            transformer_layer, config=config, layer_number=after + layer_number, vp_stage=vp_stage
        )

    @property
    def mtp_model_layer(self) -> MegatronModule:
        """What megatron-core >= 0.19 calls the decoder layer, though not in a checkpoint."""
        return self.transformer_layer

    def forward(self, hidden_states: Tensor, embedded: Tensor, **attention: Any) -> Tensor:
        """hidden_states of the depth before, embedded: `[s, b, h]`, or `[s / TP, b, h]`; returns the same.

        attention: what the decoder's layers are given as well.
        """

        def run(hidden: Tensor, embedding: Tensor) -> Tensor:
            return self._run(hidden, embedding, attention)

        if self.config.recompute_granularity == "full" and self.training:
            return checkpoint(run, False, hidden_states, embedded)
        return run(hidden_states, embedded)

    def _run(self, hidden: Tensor, embedded: Tensor, attention: dict[str, Any]) -> Tensor:
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        hidden = gather_from_tensor_model_parallel_region(self.eh_proj(both)[0])
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        with get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            hidden, _ = self.transformer_layer(hidden_states=hidden, **attention)
        return self.final_layernorm(hidden)


class ToldByTheBlock(nn.ModuleList):
    """The block's layers. megatron-core's block tells what each of them holds, but first asks its list of them, which
    tells all parameters by their names in memory: beside an adapter these are others than in a checkpoint.
    """

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: the block tells it."""
        return {}


def multi_token_spec(layers: list[ModuleSpec]) -> ModuleSpec:
    """The block of multi-token layers, from the specs of their decoder layers."""
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[
                ModuleSpec(module=MultiTokenLayer, params={"transformer_layer": layer}) for layer in layers
            ]
        ),
    )
