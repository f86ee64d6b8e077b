"""Defaults are ms-swift's, but for those that docs/from-ms-swift.md tells with a reason.

The values are those of the argument classes of ms-swift 4.6.
"""

import json
from pathlib import Path

import pytest

from mcore_swift.config import COMMANDS, SWIFT_COMMANDS
from mcore_swift.config.fields import flags_of
from mcore_swift.config.values import same_value

DOCS = Path(__file__).parents[2] / "docs" / "from-ms-swift.md"

BOTH = """
load_args=true split_dataset_ratio=0 data_seed=42 dataset_num_proc=1 load_from_cache_file=false dataset_shuffle=true
streaming=false stopping_strategy=first_exhausted shuffle_buffer_size=1000 strict=false loss_scale=default seed=42
train_dataloader_shuffle=true dataloader_num_workers=4 dataloader_prefetch_factor=2 packing=false packing_length=none
packing_strategy=binpack max_length=none truncation_strategy=delete weight_decay=0.1 adam_beta1=0.9 adam_beta2=0.95
sgd_momentum=0.9 min_lr=0 output_dir=none save_steps=500 save_strategy=steps save_total_limit=none async_save=false
perform_initialization=false model=none model_type=none save_safetensors=true max_shard_size=5GB check_model=true
ddp_backend=nccl ddp_timeout=18000000 report_to=["tensorboard"] logging_steps=5 eval_steps=none add_version=true
target_modules=["all-linear"] target_regex=none modules_to_save=[] adapters=[] lora_rank=8 lora_alpha=32
lora_dropout=0.05 lora_bias=none use_rslora=false use_dora=false system=none columns=none interleave_prob=none
val_dataset=[] freeze_parameters=[] freeze_parameters_regex=none freeze_parameters_ratio=0 trainable_parameters=[]
trainable_parameters_regex=none torch_dtype=none enable_thinking=none ignore_args_error=false
create_checkpoint_symlink=false
"""
MEGATRON = """
micro_batch_size=1 global_batch_size=16 train_iters=none num_train_epochs=none tuner_type=full lr=none
recompute_granularity=selective recompute_method=none recompute_num_layers=none recompute_modules=["core_attn"]
masked_softmax_fusion=true bias_dropout_fusion=true bias_activation_fusion=true apply_rope_fusion=false
gradient_accumulation_fusion=true cross_entropy_loss_fusion=true calculate_per_token_loss=none optimizer=adam
manual_gc=false manual_gc_steps=0 manual_gc_eval=true padding_free=true lr_warmup_init=0 lr_decay_style=cosine
lr_decay_iters=none lr_warmup_iters=0 lr_warmup_fraction=none lr_wsd_decay_style=exponential lr_wsd_decay_iters=none
weight_decay_incr_style=constant start_weight_decay=none end_weight_decay=none clip_grad=1 adam_eps=1e-8
apply_wd_to_qk_layernorm=false no_save_optim=false no_save_rng=false mcore_model=none mcore_adapter=none
no_load_optim=false no_load_rng=false finetune=true metric_for_best_model=none greater_is_better=none merge_lora=none
use_distributed_optimizer=true tensor_model_parallel_size=1 pipeline_model_parallel_size=1 context_parallel_size=1
expert_model_parallel_size=1 expert_tensor_parallel_size=1 sequence_parallel=false overlap_grad_reduce=false
overlap_param_gather=false cp_comm_type=none virtual_pipeline_model_parallel_size=none
pipeline_model_parallel_layout=none decoder_first_pipeline_num_layers=none decoder_last_pipeline_num_layers=none
account_for_embedding_in_pipeline_split=false account_for_loss_in_pipeline_split=false eval_iters=-1
attention_softmax_in_fp32=true accumulate_allreduce_grads_in_fp32=false moe_router_load_balancing_type=none
moe_router_dtype=fp32 moe_token_dispatcher_type=alltoall moe_enable_deepep=false moe_grouped_gemm=true
moe_permute_fusion=false moe_aux_loss_coeff=0 moe_z_loss_coeff=none moe_shared_expert_overlap=false
moe_layer_recompute=false moe_expert_capacity_factor=none moe_pad_expert_input_to_capacity=false
moe_token_drop_policy=probs mtp_num_layers=none mtp_loss_scaling_factor=0.1 use_chat_template=true
"""
SWIFT = """
tuner_type=lora padding_free=false sequence_parallel_size=1 per_device_train_batch_size=1 num_train_epochs=3
gradient_accumulation_steps=none gradient_checkpointing=true use_liger_kernel=false resume_only_model=false
learning_rate=none lr_scheduler_type=cosine max_steps=-1 max_grad_norm=1 warmup_ratio=0 adam_epsilon=1e-8 attn_impl=none
device_map=none max_memory=none resume_from_checkpoint=none save_only_model=false use_galore=false lorap_lr_ratio=none
target_parameters=[] use_chat_template=true
"""
EXPORT = """
to_mcore=false to_hf=false test_convert_precision=false test_convert_dtype=float32 exist_ok=false merge_lora=none
max_shard_size=5GB mcore_model=none mcore_adapter=none adapters=[] output_dir=none
"""
# the default means the same: it says what ms-swift makes of 'not given'
SAME = {"metric_for_best_model", "greater_is_better"}
OTHERS = {
    "load_from_cache_file",
    "strict",
    "ddp_backend",
    "ddp_timeout",
    "accumulate_allreduce_grads_in_fp32",
    "moe_router_load_balancing_type",
}


def table(text):
    pairs = (word.split("=", 1) for word in text.split())
    return {name: json.loads(value) if value.startswith("[") else value for name, value in pairs}


@pytest.mark.parametrize(
    ("flags", "theirs"),
    [
        (flags_of(COMMANDS["sft"]), BOTH + MEGATRON),
        (flags_of(SWIFT_COMMANDS["sft"]), BOTH + SWIFT),
        (flags_of(COMMANDS["export"]), EXPORT),
    ],
    ids=["megatron sft", "swift sft", "megatron export"],
)
def test_each_default_is_that_of_ms_swift(flags, theirs):
    theirs = table(theirs)
    assert [name for name in theirs if name not in flags] == []
    differ = {name for name, value in theirs.items() if not same_value(flags[name].default, value)}
    assert differ <= OTHERS | SAME, {name: (flags[name].default, theirs[name]) for name in differ}


def test_every_other_default_is_told_in_the_docs():
    told = DOCS.read_text(encoding="utf-8").split("## Different flags")[0]
    missing = [name for name in OTHERS | SAME if f"`{name}`" not in told]
    assert missing == []
    rows = [line for line in told.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in OTHERS | SAME | {"mtp_num_layers"} if f"`{name}`" in line}
    assert named == OTHERS | SAME | {"mtp_num_layers"} and len(rows) == len(named) - 1, "no others are told"
