"""Known but unsupported flags: those of RL, those shared with `swift`, and those that v4 removed."""

from .known import ANY, NotYet, refused, settings, table

_NO_RL = "preference learning and RL are not supported yet"

RLHF = table(
    refused(
        _NO_RL,
        flags="rlhf_type beta loss_type mcore_ref_model mcore_ref_adapter ref_model ref_adapters rpo_alpha "
        "desirable_weight undesirable_weight calculate_KL center_rewards_coefficient",
    ),
    settings(_NO_RL, reference_free=False, label_smoothing=0, f_divergence_type="reverse_kl"),
    refused(
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
    refused(
        "generation with vLLM is not supported yet",
        flags="use_vllm vllm_mode vllm_gpu_memory_utilization vllm_tensor_parallel_size "
        "vllm_enable_prefix_caching vllm_max_model_len vllm_enforce_eager vllm_limit_mm_per_prompt "
        "vllm_disable_cascade_attn vllm_max_num_seqs vllm_mm_processor_cache_gb vllm_engine_kwargs "
        "vllm_enable_lora sleep_level offload_optimizer offload_model offload_bridge vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port "
        "vllm_server_pass_dataset",
    ),
    settings("Ray is not supported yet", use_ray=False),
)

SHARED_WITH_SWIFT = table(
    settings("adapters are peft's, or this project's own on megatron-core's layers", tuner_backend="peft"),
    settings("the data settings of a checkpoint are not taken over yet", load_data_args=False),
    settings(
        "not supported yet; give the rows as files to --dataset",
        cached_dataset=None,
        cached_val_dataset=None,
        custom_dataset_info=None,
        val_dataset_shuffle=False,
    ),
    settings("no effect here: columns that are not used are not kept", remove_unused_columns=ANY),
    settings("no effect here: nothing is downloaded", download_mode=ANY, local_repo_path=ANY),
    settings(
        "columns are recognized by their names; give --columns where that goes wrong",
        disable_auto_column_mapping=False,
    ),
    settings(
        "megatron-core's own layers are built, not those of transformers",
        attn_impl=(None, "auto"),
        experts_impl=None,
        device_map=None,
        max_memory=None,
    ),
    settings(
        "the chat template is that of the tokenizer; others are not chosen by name",
        "drop it where it names the model's own, which is used in any case; another goes into chat_template.jinja of "
        "a copy of the checkpoint",
        template=None,
        template_backend=("jinja", "swift"),
    ),
    settings(
        "tools and calls are written as the tokenizer's chat template writes them; other ways are not supported yet",
        "drop it where it names the model's own way, which is used in any case",
        agent_template=None,
    ),
    settings(
        "the chat template says what an answer begins with",
        "write it into the answers of the rows, or into the template of a copy of the checkpoint",
        response_prefix=None,
        add_non_thinking_prefix=True,
    ),
    settings(
        "which thoughts of earlier turns stay is left to the chat template",
        "change it in a copy of the checkpoint",
        preserve_thinking=None,
    ),
    settings(
        "tokens count wholly or not at all; weights are not supported yet", is_binary_loss_scale=(None, True)
    ),
    settings("in training, rows are padded on the right", padding_side="right"),
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
    "optim": "optimizer",
    "bf16": "torch_dtype bfloat16",
    "fp16": "torch_dtype bfloat16",
    "deepspeed": "use_distributed_optimizer",
    "fsdp": "use_distributed_optimizer",
    "seq_length": "max_length",
}

HF_TRAINER = {
    name: NotYet((), "a flag of the HF trainer", f"use --{flag}") for name, flag in _HF_TRAINER.items()
}

SWIFT_NAMES = {
    "micro_batch_size": "per_device_train_batch_size",
    "global_batch_size": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "lr_warmup_fraction": "warmup_ratio",
    "lr_warmup_iters": "warmup_steps",
    "lr_decay_style": "lr_scheduler_type",
    "train_iters": "max_steps",
    "clip_grad": "max_grad_norm",
    "adam_eps": "adam_epsilon",
    "recompute_granularity": "gradient_checkpointing",
    "resume": "resume_from_checkpoint",
    "no_save_optim": "save_only_model",
    "context_parallel_size": "sequence_parallel_size",
}
"""A flag of `megatron sft` -> the flag of `swift sft` that does it."""

# flags of v3 that v4 removed
REMOVED = table(
    settings("implied by --model", load_safetensors=(True,)),
    settings("checkpoints have one form, torch_dist", ckpt_format="torch_dist"),
    refused("removed from ms-swift; it has no effect", flags="dataloader_type"),
    settings("logged in any case", log_throughput=ANY),
    settings(
        "not logged yet",
        log_params_norm=False,
        log_timers_to_tensorboard=False,
        log_memory_to_tensorboard=False,
    ),
    refused(
        "the architecture is that of config.json in --model",
        flags="num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings rotary_base rotary_percent norm_epsilon swiglu qk_layernorm add_qkv_bias "
        "disable_bias_linear untie_embeddings_and_output_weights padded_vocab_size",
    ),
)
