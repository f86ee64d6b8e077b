"""Our replacements for parts of megatron-core's transformer layer: adding to the residual stream, attention and MLP in
parallel, and the norms and rotary embedding of queries and keys.

Each replaces one module of megatron-core's layer, so that recomputation, sequence parallelism and pipelines work as
in any other layer.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional

from mcore_swift.models.head_norms import EachHeadNorm, FullNorm
from mcore_swift.models.layer import LayerTraits


class Residual(MegatronModule):
    """residual + dropout(scale * norm(x + bias)), in place of megatron-core's bias-dropout-add function."""

    def __init__(self, config: Any, norm: type | None, scale: float) -> None:
        super().__init__(config=config)
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon) if norm else IdentityOp()
        self.scale = scale

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function that megatron-core calls with `(x, bias)`, the residual `[s, b, h]` and the dropout rate."""

        def add(x_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_and_bias
            x = self.norm(x if bias is None else x + bias)
            if self.scale != 1.0:
                x = x * self.scale
            return residual + functional.dropout(x, p=dropout, training=training)

        return add


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + MLP(norm(x)): the MLP has the same input as attention (GPT-J; arXiv:2204.02311)."""

    def __init__(self, config: Any, submodules: Any, *, one_norm: bool, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)
        self.one_norm = one_norm
        self._entered: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._entered = None

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        if self.one_norm:
            return self.input_layernorm(self._entered)
        return super()._forward_pre_mlp_layernorm(self._entered)


class FamilyAttention(SelfAttention):
    """megatron-core's self-attention with a family's query and key norms and its rotary embedding."""

    def __init__(
        self, config: Any, submodules: Any, *, traits: LayerTraits, attention_factor: float, **kwargs: Any
    ) -> None:
        if attention_factor != 1.0:  # may differ by layer, but megatron-core reads it from the config
            config = copy.copy(config)
            set_attention_factor(config, attention_factor)
        super().__init__(config, submodules, **kwargs)
        self.rotary = traits.rotary
        if traits.qk_norm == "turned":
            self.core_attention = NormsThenAttention(
                config, self.core_attention, self.q_layernorm, self.k_layernorm
            )
            self.q_layernorm = self.k_layernorm = None
        elif traits.qk_norm:
            kind = {"full": FullNorm, "each": EachHeadNorm}[traits.qk_norm]
            sizes = {"head_dim": config.kv_channels, "eps": config.layernorm_epsilon}
            self.q_layernorm = kind(config, heads=config.num_attention_heads, **sizes)
            self.k_layernorm = kind(config, heads=config.num_query_groups, **sizes)

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """rotary_pos_emb: `[s, 1, rotary embeddings of the model, dim]`."""
        if self.rotary is None:
            rotary_pos_emb = None
        elif rotary_pos_emb is not None and rotary_pos_emb.size(2) > 1:
            rotary_pos_emb = rotary_pos_emb[:, :, self.rotary : self.rotary + 1]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


class NormsThenAttention(MegatronModule):
    """Core attention that normalises queries and keys itself: after the rotary embedding, not before."""

    def __init__(self, config: Any, core: MegatronModule, query_norm: Any, key_norm: Any) -> None:
        super().__init__(config=config)
        self.core = core
        self.q_layernorm, self.k_layernorm = query_norm, key_norm

    def forward(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query `[s, b, heads / TP, d]`, key `[s, b, groups / TP, d]`; other arguments and result: the core's."""
        return self.core(self.q_layernorm(query), self.k_layernorm(key), *args, **kwargs)


class ColumnLinearWithBias(ColumnParallelLinear):
    """A linear layer with a bias, also where the config gives linear layers none."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class RowLinearWithBias(RowParallelLinear):
    """A linear layer with a bias, also where the config gives linear layers none."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


def set_attention_factor(config: Any, factor: float) -> None:
    """Make megatron-core's rotary embedding multiply cosine and sine by `factor` (YaRN; arXiv:2309.00071).

    It computes the factor as (0.1 * yarn_mscale * ln(scaling) + 1) / (0.1 * yarn_mscale_all_dim * ln(scaling) + 1).
    """
    config.yarn_rotary_scaling_factor = math.e
    config.yarn_mscale = 10 * (factor - 1)
    config.yarn_mscale_all_dim = 0.0
