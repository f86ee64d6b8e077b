"""Known but unsupported flags of `swift`'s training commands, in addition to those that no command supports yet."""

from collections.abc import Mapping

from .known import ANY, NotYet, refused, settings, table
from .not_yet import NOT_YET

_TRAINER = table(
    settings(
        "DeepSpeed is not used here: --backend fsdp shards weights, gradients and optimizer state as ZeRO-3 does, "
        "--backend ddp keeps them whole",
        "use --backend fsdp (with --fsdp_cpu_offload true for offloading)",
        deepspeed=None,
        zero_hpz_partition_size=None,
        deepspeed_autotp_size=None,
    ),
    settings("--backend says it", "use --backend fsdp", fsdp=(None, "")),
    settings("--torch_dtype says it", "use --torch_dtype bfloat16 or float32", bf16=False, fp16=False),
    settings(
        "no effect here: an evaluation takes the batches of training, and the loss, a mean over tokens, does not "
        "depend on their size",
        per_device_eval_batch_size=ANY,
    ),
    settings("in any case only the logits that the loss needs are computed", use_logits_to_keep=ANY),
    settings("the loss of a step is the mean over its tokens", acc_strategy="token"),
    settings("expert load is not balanced by an auxiliary loss here", router_aux_loss_coef=(0, None)),
    settings("fixed", logging_first_step=ANY, logging_strategy="steps"),
    settings(
        "settings of a schedule beyond its end are not supported yet",
        "use --min_lr, for cosine and cosine_with_min_lr alike",
        lr_scheduler_kwargs=None,
    ),
    settings(
        "the lowest loss is the best",
        metric_for_best_model=(None, "loss", "eval_loss"),
        greater_is_better=(None, False),
    ),
    settings(
        "a run ends with its last step; which checkpoint was the best is logged at the end",
        "drop it; the checkpoint stays, also under --save_total_limit",
        load_best_model_at_end=False,
    ),
    settings(
        "a batch that is too large is not made smaller by itself",
        "lower --per_device_train_batch_size",
        auto_find_batch_size=False,
    ),
    settings("parameters that get no gradient stay as they are", ddp_find_unused_parameters=ANY),
    refused(
        "the Trainer has no part in this",
        flags="optim_args ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph tf32 accelerator_config "
        "parallelism_config fsdp_config",
    ),
    settings(
        "optimizers are chosen by --optim",
        "for GaLore --use_galore true, for LoRA+ --lorap_lr_ratio alone, for Muon --optim muon",
        optimizer=(None, "default"),
    ),
    settings(
        "the loss is that of the next token", loss_type=(None, "cross_entropy"), label_smoothing_factor=0
    ),
    settings(
        "an evaluation measures the loss on the validation set, and nothing else yet",
        "drop it, and evaluate checkpoints afterwards",
        eval_metric=None,
        metric=None,
        predict_with_generate=False,
        eval_use_evalscope=False,
        eval_dataset=None,
        eval_dataset_args=None,
        eval_generation_config=None,
        eval_limit=None,
        eval_on_start=False,
        eval_delay=0,
        include_for_metrics=None,
    ),
    settings(
        "an evaluation adds up losses as it goes", eval_accumulation_steps=ANY, prediction_loss_only=ANY
    ),
    settings(
        "flash checkpoints of DLRover are not used",
        "use --async_save true, which writes while training goes on",
        use_flash_ckpt=False,
    ),
    settings(
        "LISA is not supported yet",
        "use --tuner_type lora, or --optim galore_adamw",
        lisa_activated_layers=0,
        lisa_step_interval=20,
    ),
    settings(
        "the start by gradients of LoRA-GA is not supported yet",
        "use --init_weights pissa or olora, which start from the weights",
        lora_ga_batch_size=2,
        lora_ga_iters=2,
        lora_ga_max_length=1024,
        lora_ga_direction="ArB2r",
        lora_ga_scale="stable",
        lora_ga_stable_gamma=16,
    ),
    settings(
        "a setting of a tuner that peft does not have",
        reft_layers=None,
        reft_layer_key=None,
        reft_rank=4,
        reft_intervention_type="LoreftIntervention",
        reft_args=None,
        adapter_act="gelu",
        adapter_length=128,
    ),
    settings("no effect here: a step runs on over the end of an epoch", dataloader_drop_last=ANY),
    settings(
        "a resumed run goes on at its place in the data",
        "start anew from its weights, with --model or --adapters",
        ignore_data_skip=False,
    ),
    settings(
        "--seed fixes all random numbers; kernels that differ run by run are not ruled out",
        full_determinism=False,
    ),
    settings("a run is named by its output folder", run_name=ANY),
    settings("no effect here: the command says what is done", do_train=ANY, do_eval=ANY),
    settings("no effect here: each run has a folder of its own", overwrite_output_dir=ANY),
    settings(
        "no effect here: metrics are means over all processes, and the first one logs them",
        average_tokens_across_devices=ANY,
        disable_tqdm=ANY,
        log_level=ANY,
        log_on_each_node=ANY,
        logging_nan_inf_filter=ANY,
        save_on_each_node=ANY,
        skip_memory_metrics=ANY,
        include_num_input_tokens_seen=ANY,
    ),
    settings("training needs no cache of keys and values", use_cache=False),
    settings(
        "--attn_impl says it", "use --attn_impl sdpa or flash_attn", attention_backend=("flash", "auto")
    ),
    settings("only text models are supported yet", vit_gradient_checkpointing=(None, False)),
    settings("how experts are computed is left to transformers", experts_impl=None),
    settings("adapters are kept in float32 in any case", lora_dtype=(None, "float32")),
    settings(
        "--optim muon has the settings of torch's own",
        muon_momentum=0.95,
        muon_use_nesterov=True,
        muon_num_ns_steps=5,
        muon_lr=None,
    ),
    settings(
        "a flag of the Megatron engine, and not supported there either",
        "use --backend fsdp, and --fsdp_cpu_offload true for offloading",
        use_megatron_fsdp=False,
        optimizer_cpu_offload=False,
    ),
)

NOT_YET_TRAINER: Mapping[str, NotYet] = NOT_YET | _TRAINER
