"""Flags of ms-swift that we know and do not have yet.

A value that asks for nothing (a size of 1, a switch that is off, the default of a feature's setting) is
accepted; any other is refused by name with the reason. So no flag is read and then ignored.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError
from .values import same_value

ANY = object()  # every value is accepted, with a notice that it has no effect


@dataclasses.dataclass(frozen=True)
class NotYet:
    """One flag of the table.

    harmless: values that ask for nothing, or ANY. reason: why any other is refused, or why it has no effect.
    remedy: what to do instead.
    """

    harmless: tuple[Any, ...] | object
    reason: str
    remedy: str = ""

    @property
    def is_moot(self) -> bool:
        """Accepted whatever it says, since it has no effect here; the user is told so."""
        return self.harmless is ANY

    def accepts(self, value: Any) -> bool:
        return self.is_moot or any(same_value(value, fine) for fine in self.harmless)

    def refusal(self, label: str, value: Any) -> UserError:
        """The error for a value that asks for something. label: the flag as the user wrote it."""
        shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
        return UserError(f"{label}{shown}: {self.reason}", self.remedy or f"drop {label}")


def _settings(reason: str, remedy: str = "", **defaults: Any) -> Iterator[tuple[str, NotYet]]:
    """An entry for each keyword: a flag, and the value that asks for nothing (a tuple: several values)."""
    for name, harmless in defaults.items():
        values = harmless if isinstance(harmless, tuple) or harmless is ANY else (harmless,)
        yield name, NotYet(values, reason, remedy)


def _refused(reason: str, remedy: str = "", *, flags: str) -> Iterator[tuple[str, NotYet]]:
    """Flags for which only "not given" is harmless."""
    return _settings(reason, remedy, **dict.fromkeys(flags.split(), (None, [])))


def _table(*parts: Iterator[tuple[str, NotYet]]) -> dict[str, NotYet]:
    return dict(entry for part in parts for entry in part)


_NO_ADAPTERS = "LoRA is not supported yet"
_NO_RL = "preference learning and RL are not supported yet"
_NO_MULTIMODAL = "only text models are supported yet"
_NO_LOW_PRECISION = "FP8 and FP4 training are not supported yet"
_NO_MOE = "mixture-of-experts models are not supported yet"

_MEGATRON = _table(
    # parallelism
    _settings("context parallelism is not supported yet", context_parallel_size=1, sequence_parallel_size=1),
    _settings(
        "a setting of context parallelism, which is not supported yet",
        cp_comm_type=None,
        cp_partition_mode="zigzag",
        sequence_packing_scheduler=None,
    ),
    _settings(
        "expert parallelism is not supported yet", expert_model_parallel_size=1, expert_tensor_parallel_size=1
    ),
    _settings(
        "uneven pipelines are not supported yet; layers are spread evenly over the stages",
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        pipeline_model_parallel_layout=None,
    ),
    _settings(
        "interleaved pipelines run microbatches in groups of the pipeline's size; other groups are not "
        "supported yet",
        microbatch_group_size_per_vp_stage=None,
    ),
    _settings(
        "pipeline stages overlap their messages with compute; other ways of sending are not supported yet",
        overlap_p2p_comm=True,
        batch_p2p_comm=(None, False),
    ),
    _settings(
        "Megatron FSDP is not supported yet; --use_distributed_optimizer shards the optimizer state",
        use_megatron_fsdp=False,
        data_parallel_sharding_strategy="optim_grads_params",
        strict_fsdp_dtensor_load=True,
    ),
    _settings(
        "not supported yet",
        overlap_param_gather_with_optimizer_step=False,
        align_param_gather=True,
        align_grad_reduce=True,
        tp_comm_overlap=False,
        data_parallel_random_init=False,
        te_rng_tracker=False,
    ),
    _settings("no effect here: process groups connect at start", nccl_comm_warmup=ANY),
    # training
    _settings(
        "the fused kernel of Transformer Engine is not supported yet", cross_entropy_fusion_impl="native"
    ),
    _settings(
        "attention takes the fastest kernel it finds; naming one is not supported yet",
        attention_backend=("flash", "auto"),
    ),
    _settings(
        "optimizer offload and optimizer state in low precision are not supported yet",
        optimizer_cpu_offload=False,
        optimizer_offload_fraction=1.0,
        optimizer_cuda_graph=False,
        use_precision_aware_optimizer=False,
        main_grads_dtype="fp32",
        main_params_dtype="fp32",
        exp_avg_dtype="fp32",
        exp_avg_sq_dtype="fp32",
    ),
    _settings("this loss is not supported yet", enable_dft_loss=False, enable_channel_loss=False),
    _settings("callbacks from the command line are not supported yet", callbacks=(None, [])),
    _settings("plug-ins are not supported yet", external_plugins=(None, [])),
    _settings(
        "a setting of the muon optimizer, which is not supported yet",
        muon_momentum=0.9,
        muon_split_qkv=True,
        muon_use_nesterov=False,
        muon_scale_mode="spectral",
        muon_fp32_matmul_prec="medium",
        muon_coefficient_type="quintic",
        muon_num_ns_steps=5,
        muon_tp_mode="blockwise",
        muon_extra_scale_factor=1,
        muon_scalar_optimizer="adam",
        muon_lr=None,
        muon_min_lr=None,
    ),
    # data
    _settings(
        "no effect here: batches are cut from memory-mapped tokens by threads",
        dataloader_pin_memory=ANY,
        dataloader_persistent_workers=ANY,
        dataloader_multiprocessing_context=ANY,
        packing_num_proc=ANY,
    ),
    _settings("shuffling within a shard of the data is not supported yet", data_sharding=False),
    _settings(
        "grouping samples by length is not supported yet; --packing wastes less", group_by_length=False
    ),
    _settings("not supported yet", mlp_padding_free=False),
    _settings(
        "streaming is not supported yet; tokens are read from disk, not kept in memory", streaming=False
    ),
    _settings("samples are tokenized once, before training", lazy_tokenize=(None, False)),
    # checkpoints
    _settings(
        "no effect here: one form of checkpoint resumes under every layout",
        dist_ckpt_optim_fully_reshardable=ANY,
        distrib_optim_fully_reshardable_mem_efficient=ANY,
        use_persistent_ckpt_worker=ANY,
    ),
    _settings("checkpoints are written in the current form only", dist_ckpt_save_pre_mcore_014=False),
    _settings(
        "weights are converted by this project's own converters; mcore-bridge's name is accepted for them",
        bridge_backend="mcore-bridge",
    ),
    _settings("every weight of the Hugging Face checkpoint is written in any case", save_missing_weights=ANY),
    _settings(
        "no effect here: models and data are read from local folders, nothing is downloaded", use_hf=ANY
    ),
    _refused("nothing is downloaded or uploaded", flags="hub_token hub_model_id hub_revision model_revision"),
    _settings("uploading is not supported yet", push_to_hub=False),
    # logging
    _settings("fixed at its default", tensorboard_queue_size=50),
    _settings(
        "a setting of a tracker that is not supported yet",
        wandb_project="megatron-swift",
        wandb_exp_name=None,
        swanlab_project="megatron-swift",
        swanlab_exp_name=None,
    ),
    # precision
    _settings("not supported yet", apply_query_key_layer_scaling=(None, False)),
    _settings(
        _NO_LOW_PRECISION,
        fp8_format=None,
        fp8_recipe="delayed",
        fp8_param_gather=False,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        fp4_format=None,
        fp4_recipe="nvfp4",
        fp4_param_gather=False,
    ),
    # architectures
    _settings(
        _NO_MOE,
        moe_router_load_balancing_type=None,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_enable_deepep=False,
        moe_grouped_gemm=True,
        moe_permute_fusion=False,
        moe_aux_loss_coeff=(0.0, None),
        moe_z_loss_coeff=None,
        moe_shared_expert_overlap=False,
        moe_layer_recompute=False,
        moe_expert_capacity_factor=None,
        moe_pad_expert_input_to_capacity=False,
        moe_token_drop_policy="probs",
    ),
    _settings(
        "multi-token prediction is not supported yet",
        mtp_num_layers=(None, 0),
        mtp_loss_scaling_factor=0.1,
        mtp_decoder_input_detach=False,
        mtp_shared_weights=False,
    ),
    _settings(
        "this kind of attention or connection is not supported yet",
        dsa_indexer_loss_coeff=0,
        dsa_indexer_use_sparse_loss=False,
        apply_dsa_kernel_fusion=False,
        csa_dense_mode=False,
        use_fused_mhc=False,
        mhc_recompute_layer_num=None,
        engram_tokenizer_map=None,
        linear_decoupled_in_proj=False,
    ),
    _settings(
        _NO_MULTIMODAL,
        freeze_llm=False,
        freeze_vit=True,
        freeze_aligner=True,
        vit_gradient_checkpointing=(None, False),
        vit_gradient_checkpointing_kwargs=None,
        vit_attn_impl=None,
        vit_lr=None,
        aligner_lr=None,
        language_model_only=False,
        max_pixels=None,
        norm_bbox=None,
    ),
    # tuners
    _settings(
        _NO_ADAPTERS,
        adapters=(None, []),
        mcore_adapter=None,
        merge_lora=(None, False, True),  # with no adapter there is nothing to merge
        target_modules=("all-linear", ["all-linear"]),
        target_regex=None,
        modules_to_save=(None, []),
        lora_rank=8,
        lora_alpha=32,
        lora_dropout=0.05,
        lora_bias="none",
        lora_dtype=None,
        use_rslora=False,
    ),
    _settings(
        "freezing a part of the parameters is not supported yet",
        freeze_parameters=(None, []),
        freeze_parameters_regex=None,
        freeze_parameters_ratio=0,
        trainable_parameters=(None, []),
        trainable_parameters_regex=None,
    ),
    # heads and overrides
    _settings(
        "only language modelling is supported yet",
        task_type=(None, "causal_lm"),
        num_labels=None,
        problem_type=None,
        mrl_dims=None,
    ),
    _settings(
        "the architecture is that of config.json; overriding it is not supported yet",
        "change config.json in a copy of the checkpoint",
        megatron_extra_kwargs=(None, {}),
        rope_scaling=None,
        model_kwargs=(None, {}),
        max_model_len=None,
        new_special_tokens=(None, []),
        init_strategy=None,
    ),
)

_RLHF = _table(
    _refused(
        _NO_RL,
        flags="rlhf_type beta loss_type mcore_ref_model mcore_ref_adapter ref_model ref_adapters rpo_alpha "
        "desirable_weight undesirable_weight calculate_KL center_rewards_coefficient",
    ),
    _settings(_NO_RL, reference_free=False, label_smoothing=0, f_divergence_type="reverse_kl"),
    _refused(
        _NO_RL,
        flags="num_generations num_generations_eval generation_batch_size steps_per_generation "
        "max_completion_length temperature top_k top_p repetition_penalty importance_sampling_level "
        "epsilon epsilon_high delta tau_pos tau_neg real_tau fipo_decay_rate fipo_clip_range "
        "fipo_clip_high_only fipo_safety_threshold advantage_estimator scale_rewards kl_in_reward "
        "dynamic_sample max_resample_times overlong_filter reward_funcs reward_weights "
        "cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct "
        "cosine_max_len_value_correct cosine_max_len repetition_n_grams repetition_max_penalty "
        "soft_max_length soft_cache_length log_completions log_entropy top_entropy_quantile "
        "rollout_importance_sampling_mode rollout_importance_sampling_threshold "
        "log_rollout_offpolicy_metrics off_policy_sequence_mask_delta router_replay_mode "
        "multi_turn_scheduler max_turns completion_length_limit_scope use_gym_env gym_env teacher_model "
        "teacher_model_server teacher_tag_key teacher_kl_coef offload_teacher_model lmbda sft_alpha "
        "gkd_logits_topk seq_kd async_generate sync_ref_model num_iterations reward_model "
        "reward_model_plugin move_model_batches",
    ),
    _refused(
        "generation with vLLM is not supported yet",
        flags="use_vllm vllm_mode vllm_gpu_memory_utilization vllm_tensor_parallel_size "
        "vllm_enable_prefix_caching vllm_max_model_len vllm_enforce_eager vllm_limit_mm_per_prompt "
        "vllm_disable_cascade_attn vllm_max_num_seqs vllm_mm_processor_cache_gb vllm_engine_kwargs "
        "vllm_enable_lora sleep_level offload_optimizer offload_model offload_bridge vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port "
        "vllm_server_pass_dataset",
    ),
    _settings("Ray is not supported yet", use_ray=False),
)

_SHARED_WITH_SWIFT = _table(
    _settings(_NO_ADAPTERS, tuner_backend="peft"),
    _settings("the data settings of a checkpoint are not taken over yet", load_data_args=False),
    _settings(
        "not supported yet; give the rows as files to --dataset",
        cached_dataset=(None, []),
        cached_val_dataset=(None, []),
        interleave_prob=None,
        stopping_strategy="first_exhausted",
        shuffle_buffer_size=1000,
        custom_dataset_info=(None, []),
        val_dataset_shuffle=False,
        model_name=None,
        model_author=None,
    ),
    _settings("no effect here: columns that are not used are not kept", remove_unused_columns=ANY),
    _settings("no effect here: nothing is downloaded", download_mode=ANY, local_repo_path=ANY),
    _settings(
        "columns are recognized by their names; give --columns where that goes wrong",
        disable_auto_column_mapping=False,
    ),
    _settings(
        "megatron-core's own layers are built, not those of transformers",
        attn_impl=(None, "auto"),
        experts_impl=None,
        device_map=None,
        max_memory=None,
    ),
    _settings(
        "the chat template is that of the tokenizer; choosing another is not supported yet",
        "put the template into a copy of the checkpoint",
        template=None,
        template_backend=("jinja", "swift"),
        agent_template=None,
        response_prefix=None,
        enable_thinking=None,
        preserve_thinking=None,
        add_non_thinking_prefix=True,
        is_binary_loss_scale=None,
        padding_side="right",
    ),
    _settings(
        "quantized weights are not supported yet",
        quant_method=None,
        quant_bits=None,
        hqq_axis=None,
        bnb_4bit_compute_dtype=None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=None,
    ),
)

# flags of `swift sft` (the HF trainer) that people carry over, with the flag of `megatron sft` that does it
_HF_TRAINER = {
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size (samples of a whole step, over all processes)",
    "learning_rate": "lr",
    "warmup_ratio": "lr_warmup_fraction",
    "warmup_steps": "lr_warmup_iters",
    "lr_scheduler_type": "lr_decay_style",
    "max_steps": "train_iters",
    "max_grad_norm": "clip_grad",
    "gradient_checkpointing": "recompute_granularity",
    "resume_from_checkpoint": "resume",
    "resume_only_model": "mcore_model",
    "eval_strategy": "eval_steps",
    "logging_dir": "output_dir (tensorboard files go to its runs/)",
    "optim": "optimizer",
    "bf16": "torch_dtype bfloat16",
    "fp16": "torch_dtype bfloat16",
    "deepspeed": "use_distributed_optimizer",
    "fsdp": "use_distributed_optimizer",
    "seq_length": "max_length",
}

_REMOVED = _table(
    _settings("implied by --model", load_safetensors=(True,)),
    _settings("checkpoints have one form, torch_dist", ckpt_format="torch_dist"),
    _refused("removed from ms-swift; it has no effect", flags="dataloader_type"),
    _settings("logged in any case", log_throughput=ANY),
    _settings(
        "not logged yet",
        log_params_norm=False,
        log_timers_to_tensorboard=False,
        log_memory_to_tensorboard=False,
    ),
    _refused(
        "the architecture is that of config.json in --model",
        flags="num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings rotary_base rotary_percent norm_epsilon swiglu qk_layernorm add_qkv_bias "
        "disable_bias_linear untie_embeddings_and_output_weights padded_vocab_size",
    ),
)

NOT_YET: Mapping[str, NotYet] = (
    {name: NotYet((), "a flag of the HF trainer", f"use --{flag}") for name, flag in _HF_TRAINER.items()}
    | _REMOVED
    | _SHARED_WITH_SWIFT
    | _RLHF
    | _MEGATRON
)

# what users repeat from training or from ms-swift's notes when they export, and what export does anyway
EXPORT_HARMLESS: Mapping[str, NotYet] = _table(
    _settings(
        "export saves no state of training and runs no backward pass",
        no_save_optim=True,
        no_save_rng=True,
        no_load_optim=True,
        no_load_rng=True,
        finetune=True,
        recompute_granularity="none",
    ),
    _settings("export compares plain rows", padding_free=False, packing=False),
    _settings(
        "attention takes the fastest kernel it finds; naming one is not supported yet",
        attention_backend=("unfused", "flash", "auto"),
    ),
    _settings("no adapters are supported yet, so all parameters are exported", tuner_type="full"),
    _settings("export to Hugging Face always writes safetensors", save_safetensors=True),
)
