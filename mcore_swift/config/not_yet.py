"""Flags of ms-swift that we know but do not support yet.

A value that requests nothing (a size of 1, a switch that is off, the default of a feature's setting) is
accepted; any other is refused by name, with the reason. So no flag is parsed and then ignored.
"""

from collections.abc import Mapping

from .known import ANY, NotYet, refused, settings, table
from .not_yet_swift import HF_TRAINER, REMOVED, RLHF, SHARED_WITH_SWIFT

_NO_MULTIMODAL = "only text models are supported yet"
_NO_LOW_PRECISION = "FP8 and FP4 training are not supported yet"

_MEGATRON = table(
    # parallelism
    settings(
        "the name that context parallelism has without Megatron",
        "use --context_parallel_size",
        sequence_parallel_size=1,
    ),
    settings("rows are dealt to context-parallel processes in zigzag only", cp_partition_mode="zigzag"),
    settings(
        "samples are packed before training, the same for every layout", sequence_packing_scheduler=None
    ),
    settings(
        "interleaved pipelines run microbatches in groups of the pipeline's size; other groups are not "
        "supported yet",
        microbatch_group_size_per_vp_stage=None,
    ),
    settings(
        "pipeline stages overlap their messages with compute; other ways of sending are not supported yet",
        overlap_p2p_comm=True,
        batch_p2p_comm=(None, False),
    ),
    settings(
        "Megatron FSDP is not supported yet; --use_distributed_optimizer shards the optimizer state",
        use_megatron_fsdp=False,
        data_parallel_sharding_strategy="optim_grads_params",
        strict_fsdp_dtensor_load=True,
    ),
    settings(
        "not supported yet",
        overlap_param_gather_with_optimizer_step=False,
        align_param_gather=True,
        align_grad_reduce=True,
        tp_comm_overlap=False,
        data_parallel_random_init=False,
        te_rng_tracker=False,
    ),
    settings("no effect here: process groups connect at start", nccl_comm_warmup=ANY),
    # training
    settings(
        "the fused kernel of Transformer Engine is not supported yet", cross_entropy_fusion_impl="native"
    ),
    settings(
        "attention takes the fastest kernel it finds; naming one is not supported yet",
        attention_backend=("flash", "auto"),
    ),
    settings(
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
    settings(
        "no effect here: random weights are drawn the same under every layout", use_cpu_initialization=ANY
    ),
    settings("this loss is not supported yet", enable_dft_loss=False, enable_channel_loss=False),
    settings("callbacks from the command line are not supported yet", callbacks=None),
    settings("plug-ins are not supported yet", external_plugins=None),
    settings(
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
    settings(
        "no effect here: batches are cut from memory-mapped tokens by threads",
        dataloader_pin_memory=ANY,
        dataloader_persistent_workers=ANY,
        dataloader_multiprocessing_context=ANY,
        packing_num_proc=ANY,
    ),
    refused(
        "a flag of Megatron-LM",
        "give the paths to --dataset and their weights to --interleave_prob",
        flags="data_path train_data_path",
    ),
    settings("shuffling within a shard of the data is not supported yet", data_sharding=False),
    settings("grouping samples by length is not supported yet; --packing wastes less", group_by_length=False),
    settings("not supported yet", mlp_padding_free=False),
    settings("samples are tokenized once, before training", lazy_tokenize=(None, False)),
    # checkpoints
    settings(
        "no effect here: one form of checkpoint resumes under every layout",
        dist_ckpt_optim_fully_reshardable=ANY,
        distrib_optim_fully_reshardable_mem_efficient=ANY,
        use_persistent_ckpt_worker=ANY,
    ),
    settings("checkpoints are written in the current form only", dist_ckpt_save_pre_mcore_014=False),
    settings(
        "weights are converted by this project's own converters; mcore-bridge's name is accepted for them",
        bridge_backend="mcore-bridge",
    ),
    settings("every weight of the Hugging Face checkpoint is written in any case", save_missing_weights=ANY),
    settings(
        "no effect here: models and data are read from local folders, nothing is downloaded", use_hf=ANY
    ),
    refused("nothing is downloaded or uploaded", flags="hub_token hub_model_id hub_revision model_revision"),
    settings("uploading is not supported yet", push_to_hub=False),
    # logging
    settings("fixed at its default", tensorboard_queue_size=50),
    settings(
        "a setting of a tracker that is not supported yet",
        wandb_project="megatron-swift",
        wandb_exp_name=None,
        swanlab_project="megatron-swift",
        swanlab_exp_name=None,
    ),
    # precision
    settings("not supported yet", apply_query_key_layer_scaling=(None, False)),
    settings(
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
    settings(
        "this form of multi-token prediction is not supported yet",
        mtp_decoder_input_detach=False,
        mtp_shared_weights=False,
    ),
    settings(
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
    settings(
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
    settings(
        "adapters have the type of the weights beside them; the optimizer steps fp32 copies of them in any case",
        lora_dtype=None,
    ),
    # heads and overrides
    settings(
        "only language modelling is supported yet",
        task_type=(None, "causal_lm"),
        num_labels=None,
        problem_type=None,
        mrl_dims=None,
    ),
    settings(
        "the architecture is that of config.json; overriding it is not supported yet",
        "change config.json in a copy of the checkpoint",
        megatron_extra_kwargs=None,
        rope_scaling=None,
        model_kwargs=None,
        max_model_len=None,
        new_special_tokens=None,
        init_strategy=None,
    ),
)

NOT_YET: Mapping[str, NotYet] = HF_TRAINER | REMOVED | SHARED_WITH_SWIFT | RLHF | _MEGATRON
