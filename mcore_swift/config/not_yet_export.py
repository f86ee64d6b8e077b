"""Flags of ms-swift that `megatron export` and `swift export` know but do not support."""

from collections.abc import Mapping

from .known import ANY, NotYet, refused, settings, table

# flags that users copy from training or from ms-swift's documentation, or whose effect export always has
EXPORT_HARMLESS: Mapping[str, NotYet] = table(
    settings(
        "export saves no state of training and runs no backward pass",
        no_save_optim=True,
        no_save_rng=True,
        no_load_optim=True,
        no_load_rng=True,
        finetune=True,
        recompute_granularity="none",
    ),
    settings("export compares plain rows", padding_free=False, packing=False),
    settings(
        "attention takes the fastest kernel it finds; naming one is not supported yet",
        attention_backend=("unfused", "flash", "auto"),
    ),
    settings(
        "what is converted is told by --adapters and --mcore_adapter",
        tuner_type=("full", "lora"),
    ),
    settings(
        "export to Hugging Face always writes safetensors", save_safetensors=True, safe_serialization=True
    ),
    settings("no effect here: weights are converted in host memory", device_map=ANY, max_memory=ANY),
    settings(
        "no effect here: rows and their text play no part in a conversion",
        dataset=ANY,
        val_dataset=ANY,
        split_dataset_ratio=ANY,
        data_seed=ANY,
        dataset_num_proc=ANY,
        load_from_cache_file=ANY,
        load_data_args=ANY,
        columns=ANY,
        model_name=ANY,
        model_author=ANY,
        system=ANY,
        max_length=ANY,
        truncation_strategy=ANY,
        loss_scale=ANY,
        use_chat_template=ANY,
        enable_thinking=ANY,
        template=ANY,
        template_backend=ANY,
        agent_template=ANY,
        attn_impl=ANY,
    ),
    settings(
        "quantizing a checkpoint is not supported yet",
        "drop it; `swift sft --load_in_4bit true` quantizes while it trains",
        quant_method=None,
        quant_bits=None,
        load_in_4bit=False,
        load_in_8bit=False,
        quant_n_samples=256,
        quant_batch_size=1,
        group_size=128,
        bnb_4bit_compute_dtype=None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=None,
        hqq_axis=None,
    ),
    settings(
        "not supported yet",
        "drop it: training tokenizes once and keeps the tokens in --cache_dir",
        to_cached_dataset=False,
        template_mode="train",
    ),
    settings("not supported yet", to_ollama=False),
    refused(
        "v3's name of a folder of adapters or weights",
        "use --adapters for adapters, --model for a whole checkpoint",
        flags="ckpt_dir",
    ),
)

MERGE_HARMLESS: Mapping[str, NotYet] = EXPORT_HARMLESS | table(
    settings(
        "no effect here: the adapter and config.json tell what is merged",
        model_type=ANY,
        check_model=ANY,
        seed=ANY,
    )
)
