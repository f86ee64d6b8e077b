"""Flags of `swift`'s training commands that are known and not there, beside those that no command has yet."""

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
    settings("not a setting here", "use --backend fsdp", fsdp=(None, "")),
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
    settings("settings beyond --min_lr are not supported yet", lr_scheduler_kwargs=None),
    settings(
        "the lowest loss is the best", metric_for_best_model=("loss", "eval_loss"), greater_is_better=False
    ),
    settings(
        "not supported yet",
        load_best_model_at_end=False,
        early_stop_interval=None,
        auto_find_batch_size=False,
    ),
    settings("the last checkpoint is always linked as `latest`", create_checkpoint_symlink=ANY),
    settings("parameters that get no gradient stay as they are", ddp_find_unused_parameters=ANY),
    settings("no effect here: nothing is uploaded, nothing is removed", remove_unused_columns=ANY),
    refused(
        "the Trainer has no part in this",
        flags="optim_args ddp_bucket_cap_mb ddp_broadcast_buffers tf32",
    ),
    settings(
        "--attn_impl says it", vit_gradient_checkpointing=(None, False), attention_backend=("flash", "auto")
    ),
)

NOT_YET_TRAINER: Mapping[str, NotYet] = NOT_YET | _TRAINER
