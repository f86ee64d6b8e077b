"""Layer specs: which modules a layer is made of, on a machine with Transformer Engine and on one without."""

import dataclasses
import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import get_mtp_num_layers_to_build
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
from mcore_swift.models.attention import CP_COMM_TYPES, CoreAttention
from mcore_swift.models.decoder_layer import (
    ColumnLinearWithBias,
    FamilyAttention,
    ParallelLayer,
    Residual,
    RowLinearWithBias,
)
from mcore_swift.models.expert_bias import ExpertRowLinear
from mcore_swift.models.latent_attention import LatentAttention
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.moe.router import Router
from mcore_swift.models.multi_token import multi_token_spec
from mcore_swift.models.norm import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from mcore_swift.models.reading import ModelPlan

# Checkpoints use Transformer Engine's names, where a norm is part of the linear layer that follows it. The norm before
# experts also feeds the router, so it is a separate module.
_ATTENTION_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "self_attn_bda.norm.": "post_self_attn_layernorm.",
    "mlp_bda.norm.": "post_mlp_layernorm.",
}
_MLP_NAMES = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
# The norm before latent attention is always a separate module; those inside it are fused.
_LATENT_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is imported only where there is CUDA."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def choose_implementation(wanted: str, plan: ModelPlan | None = None) -> str:
    """'local' or 'transformer_engine', from `--transformer_impl` auto | local | transformer_engine.

    plan: the model, which may have features that the Transformer Engine spec lacks.
    Raises UserError if Transformer Engine is asked for and cannot be used here.
    """
    unknown = only_local(plan) if plan is not None else ""
    if wanted == "auto":
        return "transformer_engine" if have_transformer_engine() and not unknown else "local"
    if wanted == "transformer_engine" and not have_transformer_engine():
        raise UserError(
            "--transformer_impl transformer_engine needs a CUDA device and the package transformer-engine",
            remedy="install mcore-swift[te] on the GPU machine, or use --transformer_impl auto",
        )
    if wanted == "transformer_engine" and unknown:
        raise UserError(
            f"--transformer_impl transformer_engine does not know what {plan.family.name} models have: {unknown}",
            remedy="use --transformer_impl auto or local",
        )
    return wanted


def only_local(plan: ModelPlan) -> str:
    """The model's features that the Transformer Engine spec lacks, as text; empty if it has them all."""
    hf, family = plan.hf, plan.family
    layers = [family.layer(hf, number) for number in range(hf.num_hidden_layers)]
    plain = {field.name: field.default for field in dataclasses.fields(LayerTraits)}
    known = ("window", "moe", "latent", *(["rotary"] if len(family.rotary(hf)) == 1 else []))
    found = {
        name.replace("_", " ")
        for traits in layers
        for name, value in plain.items()
        if name not in known and getattr(traits, name) != value
    }
    if any(kind.by_length for kind in family.rotary(hf)):
        found.add("rotary angles that depend on the length of the text")
    if norm_of(plan) not in (RMSNorm, ZeroCentredRMSNorm, LayerNorm):
        found.add(norm_of(plan).__name__)
    return ", ".join(sorted(found))


def choose_cp_comm_type(wanted: str | None, implementation: str) -> str:
    """How context-parallel ranks exchange data, from `--cp_comm_type`; None: the implementation's default.

    Raises UserError for a type that only Transformer Engine's attention has, if that is not in use.
    """
    if implementation == "transformer_engine":
        return wanted or "p2p"
    if wanted is not None and wanted not in CP_COMM_TYPES:
        raise UserError(
            f"--cp_comm_type {wanted} is done by Transformer Engine's attention, which does not serve here",
            remedy=f"use --cp_comm_type {' or '.join(CP_COMM_TYPES)}, or install mcore-swift[te] on a GPU machine",
        )
    return wanted or CP_COMM_TYPES[0]


def block_spec(plan: ModelPlan, config: Any, implementation: str, vp_stage: int | None) -> Any:
    """The spec of this rank's part of the decoder: its layers, and the norm after the last one."""
    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layers = [_te_layer(plan, config, number) for number in numbers]
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    layers = [local_layer(plan, config, number) for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(plan))


def core_attention(traits: LayerTraits) -> ModuleSpec:
    """The spec of our core attention for a layer, in self-attention and in multi-latent attention alike."""
    return ModuleSpec(
        module=CoreAttention,
        params={"window": traits.window, "softcap": traits.softcap, "sinks": traits.sinks},
    )


def multi_token_block_spec(
    plan: ModelPlan, config: Any, implementation: str, vp_stage: int | None
) -> ModuleSpec | None:
    """The spec of the multi-token layers, which follow the decoder's last layer; None if this chunk has none."""
    if not get_mtp_num_layers_to_build(config, vp_stage):
        return None
    first = plan.hf.num_hidden_layers
    numbers = range(first, first + plan.multi_token_layers)
    if implementation == "transformer_engine":
        return multi_token_spec([_te_layer(plan, config, number) for number in numbers])
    return multi_token_spec([local_layer(plan, config, number) for number in numbers])


def _te_layer(plan: ModelPlan, config: Any, number: int) -> ModuleSpec:
    traits = plan.family.layer(plan.hf, number)
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if traits.moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    _use_latent_attention(layer, config, traits)
    if traits.moe:
        _with_our_router(layer.submodules.mlp)
    return layer


def norm_of(plan: ModelPlan) -> type:
    """Class of the model's norms over the hidden dimension."""
    return plan.family.outer(plan.hf).norm


def local_layer(plan: ModelPlan, config: Any, number: int) -> ModuleSpec:
    """The spec of decoder layer `number`, counted from 0 over the whole model, without Transformer Engine."""
    traits, norm = plan.family.layer(plan.hf, number), norm_of(plan)
    first = norm if traits.norms != "post" else IdentityOp
    return ModuleSpec(
        module=ParallelLayer if traits.parallel else TransformerLayer,
        params={"one_norm": traits.parallel == "one_norm"} if traits.parallel else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=first,
            self_attention=_local_latent_attention(config, traits)
            if traits.latent
            else _local_attention(plan, config, traits),
            self_attn_bda=_residual(config, traits, norm),
            pre_mlp_layernorm=IdentityOp if traits.parallel == "one_norm" else first,
            mlp=_local_mlp(config, traits),
            mlp_bda=_residual(config, traits, norm),
            sharded_state_dict_keys_map=(_LATENT_NAMES if traits.latent else _ATTENTION_NAMES)
            | ({} if traits.moe else _MLP_NAMES),
        ),
    )


def _use_latent_attention(layer: ModuleSpec, config: Any, traits: LayerTraits) -> None:
    """Put our latent attention into a Transformer Engine spec; its linear layers and core attention stay."""
    if traits.latent is None:
        return
    attention = layer.submodules.self_attention
    attention.module = LatentAttention
    attention.params = {**attention.params, "latent": traits.latent}
    attention.submodules.q_layernorm = RMSNorm if config.q_lora_rank is not None else IdentityOp
    attention.submodules.kv_layernorm = RMSNorm
    layer.submodules.sharded_state_dict_keys_map = {
        **layer.submodules.sharded_state_dict_keys_map,
        **_LATENT_NAMES,
    }


def _local_latent_attention(config: Any, traits: LayerTraits) -> ModuleSpec:
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "latent": traits.latent},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=core_attention(traits),
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if config.q_lora_rank is not None else IdentityOp,
            kv_layernorm=RMSNorm,
        ),
    )


def _local_attention(plan: ModelPlan, config: Any, traits: LayerTraits) -> ModuleSpec:
    head_norm = norm_of(plan) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=FamilyAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "traits": traits,
            "attention_factor": plan.family.rotary(plan.hf)[traits.rotary or 0].attention_factor,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention(traits),
            linear_proj=RowLinearWithBias if traits.output_bias else RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _local_mlp(config: Any, traits: LayerTraits) -> Any:
    if not traits.moe:
        return get_mlp_module_spec_for_backend(
            backend=_BiasedLinears() if traits.mlp_bias else LocalSpecProvider()
        )
    mlp = _with_our_router(
        get_mlp_module_spec_for_backend(backend=LocalSpecProvider(), num_experts=config.num_moe_experts)
    )
    if config.add_bias_linear:
        _submodules(_submodules(mlp).experts).linear_fc2 = ExpertRowLinear
    return mlp


def _submodules(spec: Any) -> Any:
    # a ModuleSpec before megatron-core 0.18, a partial since
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def _with_our_router(mlp: Any) -> Any:
    _submodules(mlp).router = Router
    return mlp


class _BiasedLinears(LocalSpecProvider):
    """Provides linear layers with biases, for an MLP."""

    def column_parallel_linear(self) -> type:
        return ColumnLinearWithBias

    def row_parallel_linear(self) -> type:
        return RowLinearWithBias


def _residual(config: Any, traits: LayerTraits, norm: type) -> Any:
    """How the output of attention or MLP is added to the residual stream."""
    if traits.norms == "pre" and traits.residual_scale == 1.0:
        return get_bias_dropout_add
    after = norm if traits.norms != "pre" else None
    return ModuleSpec(
        module=Residual, params={"config": config, "norm": after, "scale": traits.residual_scale}
    )
