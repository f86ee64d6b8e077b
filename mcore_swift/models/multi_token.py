"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers after the decoder that predict further.

At each position, layer k combines the hidden state of depth k - 1 with the embedding of the token k places on into the
hidden state of depth k, from which the output layer predicts the token after that one. Tokens and labels for this are
chosen once per microbatch, while samples are still whole, so nothing crosses from one sample into the next.
megatron-core's own block of such layers holds ours, so that it takes care of the copies of the embedding, their
gradients and the names in a checkpoint.
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
    """One depth: norm both inputs, project them together, run a decoder layer. Parts are named as in megatron-core."""

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
        # Layer numbers are relative to the stage's first layer.
        after = config.num_layers - get_transformer_layer_offset(config, vp_stage)
        self.transformer_layer = build_module(
            transformer_layer, config=config, layer_number=after + layer_number, vp_stage=vp_stage
        )

    @property
    def mtp_model_layer(self) -> MegatronModule:
        """The decoder layer, under the name that megatron-core >= 0.19 uses for it (though not in a checkpoint)."""
        return self.transformer_layer

    def forward(self, hidden_states: Tensor, embedded: Tensor, **attention: Any) -> Tensor:
        """hidden_states of the previous depth, embedded: `[s, b, h]`, or `[s / TP, b, h]` with sequence parallelism.

        Returns the same shape. attention: further arguments of the decoder layer, as the decoder passes them.
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
    """The block's layers. megatron-core's block adds the sharded state of each layer itself, but first asks its list of
    layers, which would give parameters their names in memory. With an adapter those differ from a checkpoint's.
    """

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: the block asks each layer itself."""
        return {}


def multi_token_spec(layers: list[ModuleSpec]) -> ModuleSpec:
    """The spec of the block of multi-token layers, from the specs of their decoder layers."""
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[
                ModuleSpec(module=MultiTokenLayer, params={"transformer_layer": layer}) for layer in layers
            ]
        ),
    )
