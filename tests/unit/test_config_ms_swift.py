"""Every name of ms-swift's Megatron arguments is known: a field, an alias, or a flag that is not there yet.

The names are those of `MegatronArguments` in ms-swift 4.6, by group.
"""

import pytest

from mcore_swift.config import (
    COMMANDS,
    MegatronExportArguments,
    MegatronSftArguments,
    SwiftPretrainArguments,
    SwiftSftArguments,
    parse,
)
from mcore_swift.config.aliases import ALIASES, LAYERS_PER_STAGE
from mcore_swift.config.fields import flags_of
from mcore_swift.config.not_yet import NOT_YET
from mcore_swift.config.not_yet_export import EXPORT_HARMLESS, MERGE_HARMLESS
from mcore_swift.config.not_yet_trainer import NOT_YET_TRAINER
from mcore_swift.config.swift import SwiftExportArguments
from mcore_swift.errors import UserError


def words(text):
    return text.split()


MS_SWIFT = words(
    """
micro_batch_size global_batch_size train_iters num_train_epochs tuner_type recompute_granularity
recompute_method recompute_num_layers recompute_modules masked_softmax_fusion bias_dropout_fusion
bias_activation_fusion apply_rope_fusion gradient_accumulation_fusion cross_entropy_loss_fusion
cross_entropy_fusion_impl calculate_per_token_loss attention_backend optimizer optimizer_cpu_offload
optimizer_offload_fraction optimizer_cuda_graph use_precision_aware_optimizer main_grads_dtype
main_params_dtype exp_avg_dtype exp_avg_sq_dtype manual_gc manual_gc_steps manual_gc_eval enable_dft_loss
enable_channel_loss callbacks seed data_seed train_dataloader_shuffle dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context data_sharding group_by_length te_rng_tracker data_parallel_random_init
padding_free mlp_padding_free packing packing_length packing_num_proc packing_strategy streaming
lazy_tokenize max_length truncation_strategy lr lr_warmup_init lr_decay_style lr_decay_iters lr_warmup_iters
lr_warmup_fraction min_lr lr_wsd_decay_style lr_wsd_decay_iters weight_decay weight_decay_incr_style
start_weight_decay end_weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum vit_lr aligner_lr
apply_wd_to_qk_layernorm muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode
muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor
muon_scalar_optimizer muon_lr muon_min_lr output_dir save_steps save_strategy no_save_optim no_save_rng
mcore_model mcore_adapter no_load_optim no_load_rng finetune perform_initialization use_cpu_initialization
async_save save_total_limit metric_for_best_model greater_is_better use_persistent_ckpt_worker
dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient
strict_fsdp_dtensor_load add_version bridge_backend model model_type save_safetensors save_missing_weights
adapters ref_model ref_adapters merge_lora max_shard_size use_hf hub_token check_model ddp_backend
ddp_timeout use_distributed_optimizer use_megatron_fsdp data_parallel_sharding_strategy
tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
expert_tensor_parallel_size sequence_parallel decoder_first_pipeline_num_layers
decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
overlap_p2p_comm batch_p2p_comm align_param_gather align_grad_reduce overlap_grad_reduce
overlap_param_gather overlap_param_gather_with_optimizer_step tp_comm_overlap cp_comm_type cp_partition_mode
sequence_packing_scheduler nccl_comm_warmup virtual_pipeline_model_parallel_size
microbatch_group_size_per_vp_stage pipeline_model_parallel_layout report_to logging_steps
tensorboard_queue_size wandb_project swanlab_project eval_iters eval_steps torch_dtype
apply_query_key_layer_scaling attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 fp8_format
fp8_recipe fp8_param_gather fp8_amax_history_len fp8_amax_compute_algo fp4_format fp4_recipe
fp4_param_gather moe_router_load_balancing_type moe_router_dtype moe_token_dispatcher_type moe_enable_deepep
moe_grouped_gemm moe_permute_fusion moe_aux_loss_coeff moe_z_loss_coeff moe_shared_expert_overlap
moe_layer_recompute moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
mtp_num_layers mtp_loss_scaling_factor mtp_decoder_input_detach mtp_shared_weights dsa_indexer_loss_coeff
dsa_indexer_use_sparse_loss apply_dsa_kernel_fusion csa_dense_mode use_fused_mhc mhc_recompute_layer_num
engram_tokenizer_map linear_decoupled_in_proj freeze_llm freeze_vit freeze_aligner
vit_gradient_checkpointing vit_gradient_checkpointing_kwargs vit_attn_impl language_model_only
target_modules target_regex modules_to_save lora_rank lora_alpha lora_dropout lora_bias lora_dtype
use_rslora freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters
trainable_parameters_regex task_type num_labels problem_type mrl_dims megatron_extra_kwargs rope_scaling
rlhf_type beta loss_type loss_scale mcore_ref_model mcore_ref_adapter rpo_alpha reference_free
label_smoothing f_divergence_type desirable_weight undesirable_weight calculate_KL
center_rewards_coefficient num_generations num_generations_eval generation_batch_size steps_per_generation
max_completion_length temperature top_k top_p repetition_penalty importance_sampling_level epsilon
epsilon_high delta tau_pos tau_neg real_tau fipo_decay_rate fipo_clip_range fipo_clip_high_only
fipo_safety_threshold advantage_estimator scale_rewards kl_in_reward dynamic_sample max_resample_times
overlong_filter reward_funcs reward_weights soft_max_length soft_cache_length log_completions log_entropy
top_entropy_quantile rollout_importance_sampling_mode rollout_importance_sampling_threshold
log_rollout_offpolicy_metrics off_policy_sequence_mask_delta router_replay_mode multi_turn_scheduler
max_turns completion_length_limit_scope use_gym_env gym_env teacher_model teacher_model_server
teacher_tag_key teacher_kl_coef offload_teacher_model use_vllm vllm_mode vllm_gpu_memory_utilization
vllm_tensor_parallel_size vllm_enable_prefix_caching vllm_max_model_len vllm_enforce_eager
vllm_limit_mm_per_prompt vllm_disable_cascade_attn vllm_max_num_seqs vllm_mm_processor_cache_gb
vllm_engine_kwargs vllm_enable_lora sleep_level offload_optimizer offload_model offload_bridge
vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port
vllm_server_pass_dataset use_ray lmbda sft_alpha gkd_logits_topk seq_kd async_generate sync_ref_model
num_iterations reward_model reward_model_plugin move_model_batches dataset val_dataset cached_dataset
cached_val_dataset split_dataset_ratio dataset_num_proc load_from_cache_file dataset_shuffle
val_dataset_shuffle interleave_prob stopping_strategy shuffle_buffer_size download_mode columns strict
remove_unused_columns disable_auto_column_mapping model_name model_author custom_dataset_info tuner_backend
external_plugins model_kwargs load_args load_data_args model_revision attn_impl experts_impl
new_special_tokens device_map max_memory max_model_len local_repo_path init_strategy template system
max_pixels agent_template norm_bbox use_chat_template padding_side sequence_parallel_size
is_binary_loss_scale template_backend response_prefix enable_thinking preserve_thinking
add_non_thinking_prefix ignore_args_error
"""
)

EXPORT = words(
    """
model mcore_model output_dir to_mcore to_hf test_convert_precision test_convert_dtype exist_ok merge_lora
padding_free attention_backend recompute_granularity no_save_optim no_save_rng no_load_optim no_load_rng
finetune max_shard_size tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
mtp_num_layers mcore_adapter adapters torch_dtype
"""
)

SWIFT = words(
    """
tuner_backend tuner_type adapters external_plugins seed model_kwargs load_args load_data_args use_hf dataset val_dataset
cached_dataset cached_val_dataset split_dataset_ratio data_seed dataset_num_proc load_from_cache_file dataset_shuffle
val_dataset_shuffle streaming interleave_prob stopping_strategy shuffle_buffer_size download_mode columns strict
remove_unused_columns disable_auto_column_mapping model_name model_author custom_dataset_info model model_type
model_revision task_type torch_dtype attn_impl experts_impl new_special_tokens num_labels problem_type rope_scaling
device_map max_memory max_model_len local_repo_path init_strategy template system max_length truncation_strategy
max_pixels agent_template norm_bbox use_chat_template padding_side padding_free loss_scale sequence_parallel_size
is_binary_loss_scale template_backend response_prefix enable_thinking preserve_thinking add_non_thinking_prefix
quant_method quant_bits hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant
bnb_4bit_quant_storage per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs logging_steps weight_decay adam_beta1 adam_beta2 adam_epsilon
num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps max_grad_norm
optim optimizer save_steps save_strategy save_total_limit save_only_model eval_steps eval_strategy report_to
logging_dir acc_strategy use_liger_kernel enable_dft_loss enable_channel_loss router_aux_loss_coef vit_lr aligner_lr
use_logits_to_keep resume_only_model resume_from_checkpoint loss_type eval_metric callbacks early_stop_interval
eval_use_evalscope eval_dataset eval_limit use_galore galore_rank galore_update_proj_gap galore_scale galore_proj_type
lisa_activated_layers lisa_step_interval use_flash_ckpt deepspeed fsdp use_dora use_rslora lorap_lr_ratio
lora_ga_batch_size lora_ga_iters lora_ga_max_length lora_ga_direction lora_ga_scale lora_ga_stable_gamma init_weights
adalora_target_r adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT adalora_beta1 adalora_beta2
adalora_orth_reg_weight llamapro_num_new_blocks llamapro_num_groups reft_layers reft_layer_key reft_rank
reft_intervention_type reft_args vera_rank vera_projection_prng_key vera_dropout vera_d_initial boft_block_size
boft_block_num boft_n_butterfly_factor boft_dropout fourier_n_frequency fourier_scaling target_modules target_regex
target_parameters modules_to_save lora_rank lora_alpha lora_dropout lora_bias lora_dtype freeze_parameters
freeze_parameters_regex freeze_parameters_ratio trainable_parameters trainable_parameters_regex freeze_llm freeze_vit
freeze_aligner metric_for_best_model greater_is_better load_best_model_at_end create_checkpoint_symlink add_version
ignore_args_error check_model output_dir packing packing_length packing_num_proc lazy_tokenize group_by_length
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_drop_last ddp_backend ddp_timeout ddp_find_unused_parameters neftune_noise_alpha torch_compile
torch_compile_backend push_to_hub hub_model_id hub_token run_name logging_first_step bf16 fp16 overwrite_output_dir
"""
)

V3 = words(
    """
train_type load adapter_load ref_load ref_adapter_load save save_interval eval_interval log_interval
distributed_backend distributed_timeout_minutes manual_gc_interval num_layers_per_virtual_pipeline_stage
num_virtual_stages_per_pipeline_rank num_workers max_epochs no_initialization no_masked_softmax_fusion
no_bias_dropout_fusion no_bias_swiglu_fusion no_rope_fusion no_gradient_accumulation_fusion no_data_sharding
gradient_checkpointing_kwargs microbatch_group_size_per_virtual_pipeline_stage custom_register_path
"""
)

MINIMAL = ["--model", "m", "--dataset", "d.jsonl", "--train_iters", "10"]


def parsed(*argv, notices=None):
    return parse(
        MegatronSftArguments, [*MINIMAL, *argv], notify=(notices if notices is not None else []).append
    )


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    return str(caught.value)


def test_every_name_of_ms_swift_is_known():
    known = {*flags_of(MegatronSftArguments), *NOT_YET}
    assert [name for name in MS_SWIFT if name not in known] == []


def test_every_name_of_its_export_is_known():
    known = {*flags_of(MegatronExportArguments), *NOT_YET, *EXPORT_HARMLESS}
    assert [name for name in EXPORT if name not in known] == []


def test_every_name_of_its_trainers_is_known():
    known = {*flags_of(SwiftSftArguments), *NOT_YET_TRAINER}
    assert [name for name in SWIFT if name not in known] == []


def test_every_name_of_v3_is_known():
    assert [name for name in V3 if name not in ALIASES and name != LAYERS_PER_STAGE] == []


def test_an_alias_leads_to_a_name_that_is_known():
    known = {*flags_of(MegatronSftArguments), *NOT_YET}
    assert [alias.name for alias in ALIASES.values() if alias.name not in known] == []


def test_a_flag_that_is_there_is_not_refused():
    for cls in COMMANDS.values():
        assert set(flags_of(cls)).isdisjoint(ALIASES)
    assert set(flags_of(MegatronSftArguments)).isdisjoint(NOT_YET)
    assert set(flags_of(MegatronExportArguments)).isdisjoint(EXPORT_HARMLESS)
    assert set(flags_of(SwiftExportArguments)).isdisjoint(MERGE_HARMLESS)
    for cls in (SwiftSftArguments, SwiftPretrainArguments):
        assert set(flags_of(cls)).isdisjoint(set(NOT_YET_TRAINER) - set(NOT_YET)), "said twice"


@pytest.mark.parametrize(
    "argv",
    [
        ["--context_parallel_size", "1"],
        ["--expert_model_parallel_size=1"],
        ["--attention_backend", "flash"],
        ["--moe_aux_loss_coeff", "0"],
        ["--fp8_format", "none"],
        ["--target_modules", "all-linear"],
        ["--mlp_padding_free", "False"],
        ["--callbacks", "[]"],
        ["--moe_grouped_gemm"],
        ["--tensorboard_queue_size", "50.0"],
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted_silently(argv):
    notices = []
    assert parsed(*argv, notices=notices) == parsed()
    assert notices == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cp_comm_type", "a2a+p2p"], ["--cp_comm_type a2a+p2p", "within a ring"]),
        (["--cp_partition_mode", "contiguous"], ["--cp_partition_mode contiguous", "zigzag"]),
        (["--sequence_parallel_size", "2"], ["--sequence_parallel_size 2", "--context_parallel_size"]),
        (["--moe_token_dispatcher_type", "flex"], ["flex", "deep_ep"]),
        (["--moe_enable_deepep", "true"], ["--moe_enable_deepep", "not alltoall"]),
        (
            ["--moe_shared_expert_overlap", "true", "--moe_token_dispatcher_type", "allgather"],
            ["--moe_shared_expert_overlap", "use --moe_token_dispatcher_type alltoall"],
        ),
        (["--moe_pad_expert_input_to_capacity", "true"], ["add --moe_expert_capacity_factor"]),
        (["--moe_router_load_balancing_type", "sinkhorn"], ["sinkhorn", "scores of the pre-trained router"]),
        (["--tuner_type", "vera"], ["vera", "not supported"]),
        (["--lora_bias", "all"], ["--lora_bias", "--tuner_type lora"]),
        (["--fp8_format", "hybrid"], ["--fp8_format hybrid", "FP8"]),
        (["--reward_funcs", "a", "b"], ["--reward_funcs a b", "RL"]),
        (["--learning_rate", "1e-4"], ["--learning_rate", "--lr"]),
        (["--gradient_accumulation_steps", "4"], ["--global_batch_size"]),
        (["--num_layers", "4"], ["--num_layers", "config.json"]),
        (["--callbacks", "mine"], ["--callbacks mine"]),
    ],
)
def test_a_value_that_asks_for_what_is_missing_is_refused_by_name(argv, words):
    told = refusal(*argv)
    assert all(word in told for word in words), told


def test_a_flag_without_effect_is_accepted_with_a_notice():
    notices = []
    assert parsed("--use_hf", "true", notices=notices) == parsed()
    assert len(notices) == 1 and "--use_hf" in notices[0] and "downloaded" in notices[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--save_interval", "7"], {"save_steps": 7, "eval_steps": 7}),
        (["--load", "c"], {"mcore_model": "c"}),
        (["--save", "o"], {"output_dir": "o"}),
        (["--train_type", "full"], {"tuner_type": "full"}),
        (["--no_masked_softmax_fusion", "true"], {"masked_softmax_fusion": False}),
        (["--no_masked_softmax_fusion", "false"], {"masked_softmax_fusion": True}),
        (["--no_initialization"], {"perform_initialization": False}),
        (["--no_initialization", "false"], {"perform_initialization": True}),
        (["--distributed_timeout_minutes", "2"], {"ddp_timeout": 120}),
        (["--num_workers", "0"], {"dataloader_num_workers": 0}),
        (
            ["--num_virtual_stages_per_pipeline_rank", "2", "--pipeline_model_parallel_size", "2"],
            {"virtual_pipeline_model_parallel_size": 2},
        ),
    ],
)
def test_a_name_of_v3_is_accepted_with_a_notice(old, new):
    notices = []
    args = parsed(*old, notices=notices)
    assert {name: getattr(args, name) for name in new} == new
    assert len(notices) == 1 and old[0] in notices[0] and f"--{next(iter(new))}" in notices[0]


def test_mistakes_under_an_old_name_tell_both_names():
    assert "--save_interval (now --save_steps) takes an integer" in refusal("--save_interval", "often")
    assert "--train_type (now --tuner_type) vera" in refusal("--train_type", "vera")
    assert "--no_rope_fusion takes true or false" in refusal("--no_rope_fusion", "perhaps")
    assert "--distributed_timeout_minutes takes a number" in refusal("--distributed_timeout_minutes", "long")
    assert "--save (now --output_dir) needs a value" in refusal("--save")


@pytest.mark.parametrize(("per_stage", "stages"), [(2, 2), (1, 4)])
def test_layers_of_a_virtual_stage_become_virtual_stages(tmp_path, per_stage, stages):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    argv = ["--pipeline_model_parallel_size", "2", "--num_layers_per_virtual_pipeline_stage", str(per_stage)]
    args = parsed("--model", str(tmp_path), *argv)
    assert args.virtual_pipeline_model_parallel_size == stages


@pytest.mark.parametrize("per_stage", ["3", "0", "some"])
def test_layers_that_do_not_divide_are_refused(tmp_path, per_stage):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    told = refusal("--model", str(tmp_path), "--num_layers_per_virtual_pipeline_stage", per_stage)
    assert (
        "--num_layers_per_virtual_pipeline_stage" in told and "--virtual_pipeline_model_parallel_size" in told
    )


def test_export_accepts_what_it_does_anyway_and_refuses_the_rest():
    base = ["--model", "m", "--to_mcore", "true"]
    plain = parse(MegatronExportArguments, base)
    same = ["--no_save_optim", "true", "--recompute_granularity", "none", "--attention_backend", "unfused"]
    assert parse(MegatronExportArguments, base + same) == plain
    with pytest.raises(UserError, match="recompute_granularity full"):
        parse(MegatronExportArguments, [*base, "--recompute_granularity", "full"])
