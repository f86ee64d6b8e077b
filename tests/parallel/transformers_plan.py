"""The runs on transformers' models that test_transformers_engine.py examines: one job of two processes, one of one.

The second job ends with runs of the Megatron engine on the same rows, for comparison with the others.
"""

from pathlib import Path

from tiny import Tiny

STEPS, SAVED = 6, 3
WORLD_SIZES = (2, 1)  # in this order

COMMON = {
    "model": "{model}",
    "dataset": "{train}",
    "train_type": "full",
    "max_length": 192,
    "packing": "true",
    "global_batch": 4,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "add_version": "false",
    "report_to": "none",
    "save_safetensors": "false",
    "gradient_checkpointing": "false",
    "backend": "fsdp",
}
DDP = {"backend": "ddp"}
BF16 = {"torch_dtype": "bfloat16"}
ONE_STEP = {"max_steps": 1, "save_steps": 1}
EIGHT = ONE_STEP | {"dataset": "{train}#8", "global_batch": 8, "packing": "false"}
GPT2, OPT, MOE = ({"model": f"{{models}}/{name}"} for name in ("gpt2", "opt", "moe"))
RANDOM = {"perform_initialization": "true", "seed": 5} | ONE_STEP
EXPORT = {"save_safetensors": "true"}
LORA = {"train_type": "lora", "lora_dropout": 0}
QLORA = LORA | {"load_in_4bit": "true", "max_steps": 2, "save_steps": 1}
STILL = {"learning_rate": 0} | ONE_STEP
KINDS: dict[str, dict] = {
    "pissa": {"init_weights": "pissa"},
    "lora-plus": {"lorap_lr_ratio": 16, "modules_to_save": "lm_head", "use_rslora": "true"},
    **{kind: {"train_type": kind} for kind in ("loha", "lokr", "ia3")},
    "oft": {"train_type": "oft", "oft_block_size": 8},
    "boft": {"train_type": "boft"},
    "vera": {"train_type": "vera", "vera_rank": 4},
}
"""Adapters, all of which initially change nothing."""
REFUSED: dict[str, tuple[dict, list[str]]] = {
    "no-such-target": (
        LORA | {"target_modules": "q_prj"},
        ["--target_modules q_prj", "nearest names: q_proj"],
    ),
    "another-base": (
        LORA | GPT2 | {"adapters": f"{{runs}}/lora/checkpoint-{STEPS}"},
        ["lora/checkpoint-6", "adapter of another model"],
    ),
    "nothing-so-named": (
        {"freeze_parameters": "model.layer.0"},
        ["--freeze_parameters model.layer.0", "model.layers.0"],
    ),
    "nothing-trains": ({"freeze_parameters_ratio": 1}, ["every parameter is frozen"]),
}

REFUSED_SHARED: dict[str, tuple[dict, list[str]]] = {
    "muon-fsdp2": ({"optim": "muon"}, ["--optim muon needs whole parameters", "--backend ddp"]),
    "shared-bloom": (
        {"model": "{models}/bloom"} | EIGHT | {"sequence_parallel_size": 2},
        ["--sequence_parallel_size", "bloom gives other results"],
    ),
}
"""Runs of two processes. BLOOM encodes positions as a bias in its own attention."""


def resumed(run: str, step: int = SAVED) -> dict[str, str]:
    return {"resume_from_checkpoint": f"{{runs}}/{run}/checkpoint-{step}"}


ADALORA = LORA | {
    "train_type": "adalora",
    "target_modules": "q_proj",
    "learning_rate": 0.05,
    "adalora_tinit": 1,
    "adalora_tfinal": 1,
    "adalora_target_r": 3,
}
LLAMAPRO = {"train_type": "llamapro", "llamapro_num_new_blocks": 2}
STREAMED = {"streaming": "true", "shuffle_buffer_size": 20, "dataloader_num_workers": 0}

SHARED = {"sequence_parallel_size": 2}
WINDOWS = {"model": "{models}/windows"}

SWIFT: dict[int, dict[str, dict]] = {
    2: {
        "shared-fsdp2": SHARED | {"val_dataset": "{val}"},
        "shared-ddp2": SHARED | DDP | {"gradient_checkpointing": "true"},
        "shared-windows-fsdp2": SHARED | WINDOWS | EIGHT | {"per_device_train_batch_size": 4},
        "shared-gpt2-ddp2": SHARED | GPT2 | EIGHT | DDP,
        "shared-lora-fsdp2": SHARED | LORA | ONE_STEP,
        "shared-again": SHARED | resumed("shared-ddp2"),
        "adalora-fsdp2": ADALORA | EXPORT,
        "muon-ddp2": DDP | {"optim": "muon"},
        "llamapro-fsdp2": LLAMAPRO | EXPORT,
        "streamed-fsdp2": STREAMED | {"dataloader_num_workers": 2},
        "fsdp2": EXPORT | {"val_dataset": "{val}"},
        "fsdp2-again": resumed("fsdp2"),
        "ddp2": DDP | {"gradient_checkpointing": "true"},
        "ddp2-to-fsdp2": resumed("ddp2"),
        "fsdp2-bf16": BF16,
        "ddp2-bf16": BF16 | DDP,
        "random-fsdp2": RANDOM,
        "gpt2-packed-fsdp2": GPT2 | EIGHT | {"padding_free": "true", "per_device_train_batch_size": 4},
        "opt-fsdp2": OPT | EIGHT | {"per_device_train_batch_size": 2},
        "moe-still": MOE | EXPORT | STILL,
        "lora-fsdp2": LORA | EXPORT,
        "dora-ddp2": LORA | BF16 | DDP | {"use_dora": "true", "max_steps": 2},
        "qlora-ddp2": QLORA | DDP,
        "dora-fsdp2": LORA | BF16 | {"use_dora": "true", "max_steps": 2},
    },
    1: {
        "one": {"val_dataset": "{val}"},
        "fsdp2-to-one": resumed("fsdp2"),
        "streamed": STREAMED,
        "adalora": ADALORA,
        "muon": {"optim": "muon"},
        "muon-ddp2-to-one": {"optim": "muon"} | resumed("muon-ddp2"),
        "adalora-fsdp2-to-one": ADALORA | resumed("adalora-fsdp2"),
        "llamapro": LLAMAPRO,
        "llamapro-fsdp2-to-one": LLAMAPRO | resumed("llamapro-fsdp2"),
        "fourierft": LORA | {"train_type": "fourierft", "fourier_n_frequency": 50, "learning_rate": 0.05},
        "windows": WINDOWS | EIGHT,
        "streamed-fsdp2-to-one": STREAMED | resumed("streamed-fsdp2"),
        "random": RANDOM,
        "gpt2-padded": GPT2 | EIGHT | EXPORT,
        "opt-packed": OPT | EIGHT | {"padding_free": "true", "per_device_train_batch_size": 8},
        "opt-padded": OPT | EIGHT | {"per_device_train_batch_size": 2},
        "eight-packed": EIGHT | {"packing": "true", "packing_length": 1024, "global_batch": 1},
        "eight-eager": EIGHT
        | {"packing": "true", "packing_length": 1024, "global_batch": 1, "attn_impl": "eager"},
        "eight-padded": EIGHT | {"per_device_train_batch_size": 4},
        "lora": LORA | EXPORT,
        "lora-on": LORA | {"adapters": f"{{runs}}/lora/checkpoint-{SAVED}"},
        "lora-fsdp2-to-one": LORA | resumed("lora-fsdp2"),
        "qlora": QLORA,
        "qlora-again": LORA | {"max_steps": 2} | resumed("qlora-ddp2", 1),
        "opt-lora-bias": OPT | EIGHT | LORA | BF16 | {"lora_bias": "all"},
        "lora-still": LORA | STILL | {"adapters": f"{{runs}}/lora/checkpoint-{STEPS}"},
        "frozen": {"freeze_parameters": "model", "trainable_parameters": "model.layers.3"} | ONE_STEP,
        **{name: LORA | flags | {"max_steps": 3} for name, flags in KINDS.items()},
    },
}
MEGATRON_NAMES = {"max_steps": "train_iters", "learning_rate": "lr", "global_batch": "global_batch_size"}
NOT_MEGATRON = ("train_type", "gradient_checkpointing", "backend")
ON_MEGATRON = {
    "megatron": EXPORT,
    "lora-recomputed": {"tuner_type": "lora", "lora_dropout": 0, "recompute_granularity": "full"} | ONE_STEP,
    "lora-on-megatron": {
        "tuner_type": "lora",
        "lora_dropout": 0,
        "adapters": f"{{runs}}/lora/checkpoint-{SAVED}",
    },
    "fsdp2-to-megatron": {"model": f"{{runs}}/fsdp2/checkpoint-{SAVED}", "max_steps": 1},
}
MERGED = {
    "merged": {"adapters": f"{{runs}}/lora/checkpoint-{STEPS}", "merge_lora": "true"},
    "as-peft": {"adapters": f"{{runs}}/lora-on/checkpoint-{STEPS}", "to_peft_format": "true"},
}
AS_HF = {"as-hf": {"mcore_model": f"{{runs}}/one/checkpoint-{STEPS}", "to_hf": "true"}}
"""Checkpoints written without safetensors, exported in a form that other programs read."""
AFTERWARDS = {
    "llamapro-exported": STILL | {"model": f"{{runs}}/llamapro-fsdp2/checkpoint-{SAVED}"},
    "merged-still": STILL | {"model": "{runs}/merged"},
    "megatron-to-one": {"model": f"{{runs}}/megatron/checkpoint-{SAVED}", "max_steps": 1},
}


AS_CALLS = {
    "called-nowhere": LORA | {"model": "{models}/no-such-model"},
    "called": LORA | {"val_dataset": "{val}", "save_total_limit": 1, "create_checkpoint_symlink": "true"},
    "called-again": LORA | {"backend": "megatron", "train_type": "full", "max_steps": 1},
}
"""Runs through `sft_main`, one after the other in the same two processes; the first has a user's mistake."""


def plan(world_size: int, tiny: Tiny, folder: Path) -> list[dict]:
    """What `transformers_job.py` does at this world size, in order."""
    places = {
        "model": str(tiny.model),
        "models": str(folder / "models"),
        "train": str(tiny.train),
        "val": str(tiny.val),
        "runs": str(folder),
    }

    def case(name: str, flags: dict, do: str = "swift") -> dict:
        given = COMMON | {"output_dir": folder / name, "cache_dir": folder / "cache"} | flags
        if do in ("merge", "export"):
            given = {"output_dir": folder / name} | flags
        elif do == "megatron":
            given = {
                MEGATRON_NAMES.get(key, key): value for key, value in given.items() if key not in NOT_MEGATRON
            }
        else:
            rows = given.pop("global_batch")
            copies = world_size // given.get("sequence_parallel_size", 1)
            given["gradient_accumulation_steps"] = (
                rows // given.get("per_device_train_batch_size", 1) // copies
            )
        argv = [part for key, value in given.items() for part in (f"--{key}", str(value).format(**places))]
        return {
            "name": name,
            "do": do,
            "argv": argv,
            "said": (REFUSED | REFUSED_SHARED)[name][1] if do == "refused" else None,
        }

    cases = [case(name, flags) for name, flags in SWIFT[world_size].items()]
    refusals = REFUSED if world_size == 1 else REFUSED_SHARED
    cases += [case(name, flags, "refused") for name, (flags, _) in refusals.items()]
    if world_size == 2:
        cases += [case(name, flags, "call") for name, flags in AS_CALLS.items()]
    if world_size == 1:
        cases += [case(name, flags, "megatron") for name, flags in ON_MEGATRON.items()]
        cases += [case(name, flags, "merge") for name, flags in MERGED.items()]
        cases += [case(name, flags, "export") for name, flags in AS_HF.items()]
        cases += [case(name, flags) for name, flags in AFTERWARDS.items()]
    return cases


def make_models(folder: Path, tokenizer) -> None:
    """Architectures that the Megatron engine lacks, or that transformers stores in another form."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        BloomConfig,
        GPT2Config,
        OPTConfig,
        Qwen2Config,
        Qwen3MoeConfig,
    )

    size = (len(tokenizer) + 1) | 1
    common = {"vocab_size": size, "bos_token_id": None, "eos_token_id": 0, "dtype": "float32"}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    configs = {
        "gpt2": GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1, **no_dropout, **common
        ),
        "opt": OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, init_std=0.1, dropout=0.0, pad_token_id=1, **common,
        ),
        "moe": Qwen3MoeConfig(
            hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, tie_word_embeddings=False, **common,
        ),
    }  # fmt: skip
    configs["bloom"] = BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1, **common)
    configs["windows"] = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        use_sliding_window=True, sliding_window=6, max_window_layers=1, initializer_range=0.1, **common,
    )  # fmt: skip
    for name, config in configs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
