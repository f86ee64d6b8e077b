"""Layer specs: which modules a layer is made of, on a machine with Transformer Engine and on one without."""

import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mcore_swift.errors import UserError
from mcore_swift.models.attention import CoreAttention
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.moe.router import Router
from mcore_swift.models.norm import RMSNorm
from mcore_swift.models.reading import ModelPlan

# The checkpoint keeps Transformer Engine's names, where a norm is part of the linear layer that follows it. What
# follows the norm before experts is a router as well: there it is a module of its own.
_ATTENTION_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_NAMES = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can serve: it is only ever imported where there is CUDA."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def choose_implementation(wanted: str) -> str:
    """'local' or 'transformer_engine', from `--transformer_impl` auto | local | transformer_engine.

    Raises UserError if Transformer Engine is asked for and cannot serve here.
    """
    if wanted == "auto":
        return "transformer_engine" if have_transformer_engine() else "local"
    if wanted == "transformer_engine" and not have_transformer_engine():
        raise UserError(
            "--transformer_impl transformer_engine needs a CUDA device and the package transformer-engine",
            remedy="install mcore-swift[te] on the GPU machine, or use --transformer_impl auto",
        )
    return wanted


def block_spec(plan: ModelPlan, config: Any, implementation: str, vp_stage: int | None) -> Any:
    """The spec of this rank's part of the decoder: its layers, and the norm after the last one."""
    if implementation == "transformer_engine" and config.num_moe_experts:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        first = get_transformer_layer_offset(config, vp_stage)
        for number, layer in enumerate(block.layer_specs, first):
            if plan.family.layer(plan.hf, number).moe:
                _with_our_router(layer.submodules.mlp)
        return block
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    layers = [
        local_layer(config, plan.family.layer(plan.hf, number)) for number in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def core_attention(traits: LayerTraits) -> ModuleSpec:
    """Our attention of a layer's kind, for self-attention and for multi-latent attention."""
    return ModuleSpec(
        module=CoreAttention,
        params={"window": traits.window, "softcap": traits.softcap, "sinks": traits.sinks},
    )


def local_layer(config: Any, traits: LayerTraits) -> ModuleSpec:
    """One decoder layer of plain torch modules."""
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention(traits),
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_local_mlp(config, traits),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_ATTENTION_NAMES | ({} if traits.moe else _MLP_NAMES),
        ),
    )


def _local_mlp(config: Any, traits: LayerTraits) -> Any:
    if not traits.moe:
        return get_mlp_module_spec_for_backend(backend=LocalSpecProvider())
    return _with_our_router(
        get_mlp_module_spec_for_backend(backend=LocalSpecProvider(), num_experts=config.num_moe_experts)
    )


def _with_our_router(mlp: Any) -> Any:
    # a ModuleSpec before megatron-core 0.18, a partial since
    submodules = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    submodules.router = Router
    return mlp
