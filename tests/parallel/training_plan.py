"""The runs that the tests of resuming, checkpoints and reproducibility examine: a few jobs for all of them.

Starting processes and importing libraries takes longer than all these runs together, so one job per world size does
them in order; a later job resumes what an earlier one has saved.
"""

from pathlib import Path

from tiny import Tiny

STEPS, SAVED = 6, 3
WORLD_SIZES = (4, 2, 1)  # in this order

COMMON = {
    "max_length": 192,
    "packing": "true",
    "global_batch_size": 4,
    "train_iters": STEPS,
    "save_steps": SAVED,
    "lr": 2e-3,
    "logging_steps": 1,
    "add_version": "false",
    "report_to": "none",
    "save_safetensors": "false",
    "recompute_granularity": "none",
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2, "cp_comm_type": "a2a"}
BF16 = {"torch_dtype": "bfloat16"}
WHOLE = {"use_distributed_optimizer": "false"}
OVERLAP = {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}
STILL = {"lr": 0}  # if weights do not move, the loss shows which samples a step took
UNPACKED = {
    "packing": "false",
    "num_train_epochs": 2,
    "train_iters": None,
    "global_batch_size": 30,
    "micro_batch_size": 10,
}
RANDOM = {"perform_initialization": "true", "train_iters": 1, "seed": 5}
EIGHT = {"dataset": "{train}#8", "train_iters": 1, "max_length": 192}


def checkpoint(run: str, step: int = SAVED) -> dict[str, str]:
    return {"resume": f"{{runs}}/{run}/checkpoint-{step}"}


TRAIN: dict[int, dict[str, dict]] = {
    4: {
        "tp2-pp2": TP2 | PP2,
        "tp2-pp2-again": TP2 | PP2 | checkpoint("tp2-pp2"),
        "tp2-dp2-bf16": TP2 | BF16 | {"sequence_parallel": "true"},
        "tp2-dp2-bf16-again": TP2 | BF16 | {"sequence_parallel": "true"} | checkpoint("tp2-dp2-bf16"),
    },
    2: {
        "tp2": TP2,
        "tp2-again": TP2 | checkpoint("tp2"),
        "dp2-bf16": BF16,
        "dp2-bf16-again": BF16 | checkpoint("dp2-bf16"),
        "dp2-overlap": BF16 | OVERLAP,
        "pp2-vpp2": PP2 | VPP2,
        "pp2-vpp2-again": PP2 | VPP2 | checkpoint("pp2-vpp2"),
        "cp2": CP2,
        "cp2-again": CP2 | checkpoint("cp2"),
        "tp2-pp2-to-cp2": CP2 | checkpoint("tp2-pp2"),
        "dp2": {"save_total_limit": 2},
        "dp2-whole": WHOLE,
        "spread-to-whole": WHOLE | checkpoint("dp2"),
        "whole-to-spread": checkpoint("dp2-whole"),
        "tp2-pp2-to-dp2": checkpoint("tp2-pp2"),
        "pp2-vpp2-to-tp2": TP2 | checkpoint("pp2-vpp2"),
        "pp2-first": PP2 | {"decoder_first_pipeline_num_layers": 1},
        "pp2-first-to-letters": PP2
        | {"pipeline_model_parallel_layout": "E|tt|t|tL"}
        | checkpoint("pp2-first"),
        "stalled": PP2 | STILL | {"val_dataset": "{val}", "save_steps": 1, "early_stop_interval": 2},
        "random-tp2": RANDOM | TP2,
        "random-pp2": RANDOM | PP2,
    },
    1: {
        "one": {"save_total_limit": 2, "save_steps": 2},
        "one-again": checkpoint("one", 4),
        "one-async": {"async_save": "true", "save_steps": 2, "save_total_limit": 2},
        "one-async-again": checkpoint("one-async", 4),
        "tp2-pp2-to-one": checkpoint("tp2-pp2"),
        "cp2-to-one": checkpoint("cp2"),
        "without-optimizer": checkpoint("tp2-pp2") | {"no_load_optim": "true"},
        "sgd": {"optimizer": "sgd"} | WHOLE,
        "sgd-again": {"optimizer": "sgd"} | WHOLE | checkpoint("sgd"),
        "bf16": BF16 | {"train_iters": 15, "save_steps": 15},
        "weights-only": {"no_save_optim": "true"},
        "still": STILL | {"logging_steps": 2, "save_steps": 2},
        "still-larger-batch": STILL | {"global_batch_size": 8} | checkpoint("still", 2),
        "one-step-at-once": STILL | {"train_iters": 2},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full"},
        "epochs": UNPACKED | {"save_strategy": "epoch"},
        "iterations": UNPACKED | {"num_train_epochs": None, "train_iters": 6},
        "random": RANDOM,
        "other-random": RANDOM | {"seed": 6},
        "eight-packed": EIGHT | {"packing_length": 1024, "global_batch_size": 1},
        "eight-end-to-end": EIGHT | {"packing": "false", "global_batch_size": 8, "micro_batch_size": 4},
        "eight-padded": EIGHT
        | {"packing": "false", "padding_free": "false", "global_batch_size": 8, "micro_batch_size": 2},
        "eval-by-four": STILL | {"val_dataset": "{val}", "packing": "false", "train_iters": 1},
        "eval-at-once": STILL
        | {"val_dataset": "{val}", "packing": "false", "train_iters": 1, "global_batch_size": 13},
    },
}
SAVE_AGAIN: dict[int, dict[str, dict]] = {
    4: {},
    2: {
        "copy-in-dp2": checkpoint("tp2-pp2"),
        "copy-in-pp2-vpp2-bf16": PP2 | VPP2 | BF16 | checkpoint("tp2-dp2-bf16"),
    },
    1: {
        "copy-in-one": checkpoint("tp2-pp2"),
        "copy-in-one-bf16": BF16 | checkpoint("dp2-bf16"),
        "copy-of-whole": checkpoint("dp2-whole"),
    },
}
COPIED = {
    "copy-in-dp2": "tp2-pp2",
    "copy-in-pp2-vpp2-bf16": "tp2-dp2-bf16",
    "copy-in-one": "tp2-pp2",
    "copy-in-one-bf16": "dp2-bf16",
    "copy-of-whole": "dp2-whole",
}
MEGATRON_LOADS: dict[int, dict[str, dict]] = {
    4: {},
    2: {
        "megatron-reads-tp2-pp2-in-pp2-vpp2": PP2 | VPP2 | checkpoint("tp2-pp2"),
        "megatron-reads-tp2-dp2-in-dp2": BF16 | checkpoint("tp2-dp2-bf16"),
    },
    1: {"megatron-reads-pp2-vpp2-in-one": checkpoint("pp2-vpp2")},
}
REFUSED: dict[int, dict[str, tuple[dict, list[str]]]] = {
    4: {},
    2: {
        "refused-optimizer-not-saved": (
            TP2 | {"resume": "{runs}/dp2-no-optimizer"},
            ["holds weights and rng and data", "no optimizer", "--no_load_optim true"],
        )
    },
    1: {},
}
# the checkpoint for the refused run above
TRAIN[4]["dp2-no-optimizer"] = TP2 | {"no_save_optim": "true", "train_iters": 1}


def plan(world_size: int, tiny: Tiny, folder: Path) -> list[dict]:
    """What `train_job.py` does at this world size, in order."""
    places = {"train": str(tiny.train), "val": str(tiny.val), "runs": str(folder)}

    def case(name: str, do: str, flags: dict, **options) -> dict:
        return {"name": name, "do": do, "argv": argv(name, flags, tiny, folder, places), "options": options}

    return [
        *(case(name, "train", flags) for name, flags in TRAIN[world_size].items()),
        *(case(name, "save", flags) for name, flags in SAVE_AGAIN[world_size].items()),
        *(case(name, "megatron-load", flags) for name, flags in MEGATRON_LOADS[world_size].items()),
        *(case(name, "refused", flags, said=said) for name, (flags, said) in REFUSED[world_size].items()),
    ]


def argv(name: str, flags: dict, tiny: Tiny, folder: Path, places: dict[str, str]) -> list[str]:
    given = COMMON | {
        "model": tiny.model,
        "dataset": tiny.train,
        "output_dir": folder / name,
        "cache_dir": folder / "cache",
    }
    given = {key: value for key, value in (given | flags).items() if value is not None}
    return [part for key, value in given.items() for part in (f"--{key}", str(value).format(**places))]
