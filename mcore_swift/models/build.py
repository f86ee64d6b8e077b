"""Build this rank's model chunks from a HF config."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from mcore_swift.accelerator import get_accelerator
from mcore_swift.errors import UserError
from mcore_swift.models.decoder_layer import set_attention_factor
from mcore_swift.models.expert_groups import GroupChoice
from mcore_swift.models.latent_attention import LatentAttention
from mcore_swift.models.layer import OuterTraits
from mcore_swift.models.multi_token import ToldByTheBlock
from mcore_swift.models.reading import ModelPlan
from mcore_swift.models.rope import Rotary
from mcore_swift.models.shards import is_expert
from mcore_swift.models.specs import block_spec, choose_implementation, multi_token_block_spec
from mcore_swift.models.targets import Targets
from mcore_swift.models.token_nll import token_nll, transformed
from mcore_swift.models.without_memory import parameters_on_meta
from mcore_swift.plan.layout import Layout
from mcore_swift.plan.shape import padded_vocab_size
from mcore_swift.plan.stages import megatron_stages


def transformer_config(
    plan: ModelPlan, layout: Layout, dtype: torch.dtype, options: dict[str, Any] | None = None
) -> TransformerConfig:
    """megatron-core's config for a model under a layout, with parameters of `dtype`.

    options: further fields of TransformerConfig (recompute, fusions, loss normalisation); they override ours.
    Raises UserError if experts with biases are split (ETP) under Transformer Engine, and ValueError if sliding
    windows differ in size from layer to layer.
    """
    cuda = get_accelerator().is_cuda
    interleaved = (layout.vpp or 1) > 1
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "mtp_num_layers": plan.multi_token_layers or None,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        # With interleaved stages, forward and backward messages pass between the same two ranks; gloo silently
        # mixes them up if they are batched.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Frees a stage's output once it is sent. gloo sends in the background, so it would send freed memory.
        "deallocate_pipeline_outputs": cuda,
        # Cuts shards from one master weight, so that initial weights do not depend on TP.
        "use_cpu_initialization": not cuda,
        "persist_layer_norm": cuda,
        # These need CUDA kernels, some of them made by torch.compile, which on a CPU takes longer to compile than
        # it saves.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    fields |= plan.family.config(plan.hf) | _windows(plan) | _unturned(plan)
    fields |= {"transformer_impl": choose_implementation("auto", plan)} | (options or {})
    if fields.get("multi_latent_attention"):
        # LatentAttention applies the rotary embedding itself
        return MLATransformerConfig(**(fields | {"rope_type": "rope", "apply_rope_fusion": False}))
    kinds = plan.family.rotary(plan.hf)
    if fields.get("rotary_interleaved") or any(kind.attention_factor != 1.0 for kind in kinds):
        fields["apply_rope_fusion"] = False  # the fused kernels for packed rows support neither
    config = _unsplit_config(fields)
    if len(kinds) == 1 and kinds[0].attention_factor != 1.0:
        set_attention_factor(config, kinds[0].attention_factor)
    return config


def _unsplit_config(fields: dict[str, Any]) -> TransformerConfig:
    """The config, past megatron-core's refusal to split experts that have biases: `ExpertRowLinear` handles those.

    Raises UserError where Transformer Engine would have to split them.
    """
    split = fields["expert_tensor_parallel_size"]
    if split == 1 or not fields.get("num_moe_experts") or not fields.get("add_bias_linear"):
        return TransformerConfig(**fields)
    if fields["transformer_impl"] != "local":
        raise UserError(
            f"--expert_tensor_parallel_size {split}: Transformer Engine adds the bias of an expert once on every "
            "process that has a part of it",
            remedy="add --transformer_impl local, or use --expert_model_parallel_size in its place",
        )
    config = TransformerConfig(**(fields | {"expert_tensor_parallel_size": 1}))
    config.expert_tensor_parallel_size = split
    return config


def _unturned(plan: ModelPlan) -> dict[str, Any]:
    """Layers without rotary embedding, as a field of TransformerConfig; for layers of Transformer Engine."""
    layers = [plan.family.layer(plan.hf, number) for number in range(plan.hf.num_hidden_layers)]
    without = [int(traits.rotary is None) for traits in layers]
    return {"no_rope_freq": without} if any(without) else {}


def _windows(plan: ModelPlan) -> dict[str, Any]:
    """Sliding windows, as fields of TransformerConfig; for Transformer Engine's attention. Ours gets one per layer.

    Raises ValueError if windows differ in size, which these fields cannot express.
    """
    windows = [plan.family.layer(plan.hf, number).window for number in range(plan.hf.num_hidden_layers)]
    sizes = {window for window in windows if window}
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise ValueError(f"sliding windows of several sizes in one model: {sorted(sizes)}")
    return {
        # HF's window includes the token itself; megatron-core's says how far it sees back and ahead.
        "window_size": (sizes.pop() - 1, 0),
        "window_attn_skip_freq": [1 if window else 0 for window in windows],
    }


def pipeline_options(plan: ModelPlan, layout: Layout, args: Any) -> dict[str, Any]:
    """Fields of TransformerConfig for an uneven pipeline, if the flags in `args` ask for one; else empty."""
    stages = megatron_stages(layout, plan.hf.num_hidden_layers, args, mtp=plan.multi_token_layers)
    return {"pipeline_model_parallel_layout": stages} if stages else {}


class Model(GPTModel):
    """megatron-core's GPT model, with a loss computed at the learnt positions only and without vocabulary padding.

    With labels, `loss_mask` is a Targets, and the result is fp32 `[1 + depths, b, s]`: `token_nll` of the next token,
    then of the token that each multi-token layer predicts. Without labels the result is logits `[b, s, v / TP]`.
    """

    def __init__(self, *args: Any, real_vocab_size: int, traits: OuterTraits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.traits = traits
        if self.mtp_process:
            self.mtp.layers = ToldByTheBlock(self.mtp.layers)
        if self.pre_process or self.mtp_process:  # megatron-core uses hidden_dropout for embeddings
            self.embedding.embedding_dropout.p = traits.embedding_dropout
        if (self.pre_process or self.mtp_process) and traits.embedding_scale != 1.0:
            self.embedding.register_forward_hook(self._scale_embedding)

    def _scale_embedding(self, embedding: Any, args: Any, output: Tensor) -> Tensor:
        # The factor is rounded to the embedding's dtype, as in transformers' Gemma.
        return output * torch.tensor(self.traits.embedding_scale, dtype=output.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """padding_mask: bool `[b, s]`, true at padding, which the routers of experts leave out."""
        rotary = self.rotary_pos_emb
        if any(kind.by_length for kind in rotary.kinds):
            packed = kwargs.get("packed_seq_params") is not None
            rotary.lengths = None if packed else _lengths(position_ids, padding_mask)
        targets, local = kwargs.get("loss_mask"), padding_mask
        if padding_mask is not None and self.config.sequence_parallel:
            rank, size = (
                parallel_state.get_tensor_model_parallel_rank(),
                self.config.tensor_model_parallel_size,
            )
            local = padding_mask.chunk(size, dim=1)[rank]
        if isinstance(targets, Targets):
            targets.padding_mask = local
        # megatron-core splits it over sequence-parallel ranks on the first stage only
        mask = padding_mask if self.pre_process else local
        return super().forward(input_ids, position_ids, *args, padding_mask=mask, **kwargs)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        targets = kwargs.get("loss_mask")
        ahead = targets.ahead if isinstance(targets, Targets) else []
        if not self.post_process:
            depths = self._depths(hidden_states, targets, kwargs) if self.mtp_process and ahead else []
            return torch.cat([hidden_states, *depths]) if depths else hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if labels is None:
            logits, _ = self.output_layer(hidden_states, weight=weight if tied else None)
            logits = logits.transpose(0, 1).contiguous()
            return transformed(logits, self.traits.logit_scale, self.traits.logit_softcap)
        # The loss uses the output layer's weight without calling the module. So call its hooks, which wait for a
        # weight that is still being gathered (--overlap_param_gather).
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        nll = partial(
            token_nll,
            weight=weight,
            vocab_size=self.real_vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.config.sequence_parallel,
            scale=self.traits.logit_scale,
            softcap=self.traits.logit_softcap,
            logits_of=getattr(self.output_layer, "logits_of_gathered", None),  # if it has an adapter
        )
        depths = [hidden_states]
        if ahead and self.mtp_process:
            depths += self._depths(hidden_states, targets, kwargs)
        elif ahead:  # an earlier stage has computed them
            depths = list(hidden_states.chunk(1 + len(ahead)))
        losses = [nll(depths[0], labels=labels, positions=targets.positions)]
        for hidden, step in zip(depths[1:], ahead, strict=True):
            losses.append(nll(hidden, labels=step.labels, positions=step.positions))
        return torch.stack(losses)

    def _depths(self, hidden: Tensor, targets: Targets, given: dict[str, Any]) -> list[Tensor]:
        """Hidden states `[s, b, h]` of each multi-token layer in turn, computed from the decoder's `hidden`."""
        context = ("attention_mask", "rotary_pos_emb", "packed_seq_params")
        attention = {name: given[name] for name in context} | {"padding_mask": targets.padding_mask}
        depths = []
        for layer, ahead in zip(self.mtp.layers, targets.ahead, strict=True):
            embedded = self.embedding(input_ids=ahead.input_ids, position_ids=given["position_ids"])
            hidden = layer(hidden, embedded, **attention)
            depths.append(hidden)
        return depths


def _lengths(position_ids: Tensor, padding: Tensor | None) -> list[int]:
    """Number of tokens in each row, over all context-parallel ranks. position_ids, padding: `[b, s / CP]`.

    Without `padding`, the position of padding tokens must be 0.
    """
    last = (position_ids if padding is None else position_ids.masked_fill(padding, 0)).amax(dim=1)
    if parallel_state.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(
            last, torch.distributed.ReduceOp.MAX, parallel_state.get_context_parallel_group()
        )
    return (last + 1).tolist()


def build_model(
    plan: ModelPlan,
    config: TransformerConfig,
    implementation: str = "auto",
    vocab_divisible_by: int = 128,
    *,
    linears_on_meta: bool = False,
) -> list[Model]:
    """The model chunks of this rank, one for each virtual pipeline stage, on the accelerator's device.

    The vocabulary is padded to a multiple of `vocab_divisible_by` and of TP. megatron-core's process groups must exist.
    linears_on_meta: the layers' weight matrices get no memory yet, for callers that quantize them while loading.
    """
    implementation = choose_implementation(implementation, plan)
    virtual = config.virtual_pipeline_model_parallel_size
    device = get_accelerator().device
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        model_fields = plan.family.model(plan.hf)
        vocab_size = model_fields.pop("vocab_size")
        padded = padded_vocab_size(vocab_size, vocab_divisible_by, config.tensor_model_parallel_size)
        with parameters_on_meta(partial(_is_matrix, padded)) if linears_on_meta else nullcontext():
            model = Model(
                config=config,
                transformer_layer_spec=block_spec(plan, config, implementation, vp_stage),
                mtp_block_spec=multi_token_block_spec(plan, config, implementation, vp_stage),
                real_vocab_size=vocab_size,
                traits=plan.family.outer(plan.hf),
                vocab_size=padded,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                parallel_output=True,
                vp_stage=vp_stage,
                **model_fields,
            )
        rotary = Rotary(plan.family.rotary(plan.hf), device, interleaved=config.rotary_interleaved)
        model.rotary_pos_emb = rotary
        best = plan.family.best_of_group(plan.hf)
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.rotary_pos_emb = rotary
            if isinstance(module, TopKRouter) and best:
                module.router_replay = GroupChoice(best)
        _mark_experts(model, config)
        chunks.append(model._apply(_move))
    return chunks


def _move(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(get_accelerator().device)


def _is_matrix(vocab_size: int, module: torch.nn.Module, name: str) -> bool:
    """Whether a parameter is a linear layer's weight, except the output layer's, which stages may share."""
    is_linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
    return is_linear and name == "weight" and module.output_size != vocab_size


def _mark_experts(model: Model, config: TransformerConfig) -> None:
    """Have gradients of experts reduced over the ranks that hold the same experts.

    megatron-core 0.16 does not mark them if ETP differs from TP and EP is 1; copies of an expert would then
    drift apart.
    """
    if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        for name, parameter in model.named_parameters():
            if is_expert(name):
                parameter.allreduce = False
