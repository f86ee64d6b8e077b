"""megatron-core's gradient buffers and optimizer, configured from the arguments of a command."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)


def wrap_for_gradients(model: list[Any], args: Any) -> list[DistributedDataParallel]:
    """Wrap each model chunk with the buffers in which gradients are summed over data-parallel ranks."""
    config = model[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the loss is checked before each step instead
    )
    # Interleaved chunks other than the first finish their gradients in bursts: one bucket, no overlap.
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
        if len(wrapped) == 1:
            config.no_sync_func, config.grad_sync_func = config.no_sync_func[0], None
    if args.overlap_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
        if len(wrapped) == 1:
            config.param_sync_func = config.param_sync_func[0]
    return wrapped


def build_optimizer(model: list[DistributedDataParallel], args: Any) -> Any:
    """AdamW or SGD over the trained parameters of the chunks; norms and biases have no weight decay.

    With `--lorap_lr_ratio`, the B matrices of adapters have a multiple of the learning rate.
    """
    dtype = model[0].config.params_dtype
    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        apply_wd_to_qk_layernorm=args.apply_wd_to_qk_layernorm,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        sgd_momentum=args.sgd_momentum,
        clip_grad=args.clip_grad,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config)
    if ratio := getattr(args, "lorap_lr_ratio", None):
        overrides[ParamKey(name="*.lora_B.*")] = {"lr_mult": ratio}
    optimizer = get_megatron_optimizer(
        config, model, config_overrides=overrides, use_gloo_process_groups=False
    )
    model[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_hyperparameters(optimizer: Any, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay in every group, by the group's own factors."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
