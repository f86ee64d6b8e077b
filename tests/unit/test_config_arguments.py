"""What follows from the values, and what contradicts what."""

import pytest

from mcore_swift.config import (
    MegatronExportArguments,
    MegatronPretrainArguments,
    MegatronSftArguments,
    parse,
    size_bytes,
)
from mcore_swift.config.fields import flags_of

ALL = (MegatronSftArguments, MegatronPretrainArguments, MegatronExportArguments)


def sft(**values):
    return MegatronSftArguments(**{"model": "m", "dataset": ["d"], "train_iters": 10} | values)


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        ({}, {"lr": 1e-5, "calculate_per_token_loss": True, "eval_steps": 500, "end_weight_decay": 0.1}),
        ({"save_steps": 7}, {"eval_steps": 7}),
        ({"sequence_parallel": True}, {"sequence_parallel": False}),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, {"sequence_parallel": True}),
        ({"recompute_granularity": "full"}, {"recompute_method": "uniform", "recompute_num_layers": 1}),
        ({"mcore_model": "c", "finetune": False}, {"resume": "c", "mcore_model": None}),
        ({"mcore_model": "c"}, {"resume": "none", "mcore_model": "c"}),
        ({"resume": "auto"}, {"add_version": False, "output_dir": "megatron_output/m"}),
        ({"resume": "out/v0-1"}, {"output_dir": "out/v0-1"}),
        ({"resume": "out/v0-1", "output_dir": "o"}, {"output_dir": "o"}),
        ({"model": "a/b/Qwen3-0.6B/"}, {"output_dir": "megatron_output/Qwen3-0.6B"}),
    ],
)
def test_what_is_not_given_follows_from_the_rest(given, follows):
    args = sft(**given)
    assert {name: getattr(args, name) for name in follows} == follows
    assert args.problems() == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_iters": None}, ["--num_train_epochs", "--train_iters"]),
        ({"num_train_epochs": 1}, ["--num_train_epochs", "--train_iters"]),
        ({"micro_batch_size": 3}, ["--global_batch_size 16", "18"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["--pipeline_model_parallel_size"]),
        ({"overlap_param_gather": True}, ["--overlap_grad_reduce"]),
        ({"packing": True, "padding_free": False}, ["--packing", "--padding_free"]),
        ({"packing_length": 100}, ["--packing_length", "--packing true"]),
        ({"packing": True, "packing_length": 100, "max_length": 200}, ["--packing_length 100", "200"]),
        ({"truncation_strategy": "split"}, ["split", "megatron pt"]),
        ({"val_dataset": ["v"], "split_dataset_ratio": 0.1}, ["--val_dataset", "--split_dataset_ratio"]),
        ({"min_lr": 1.0}, ["--min_lr", "--lr"]),
        ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, ["--lr_warmup_iters", "--lr_warmup_fraction"]),
        ({"lr_warmup_iters": 5, "lr_decay_iters": 5}, ["--lr_decay_iters 5"]),
        ({"lr_decay_style": "WSD"}, ["--lr_wsd_decay_iters"]),
        ({"lr_wsd_decay_iters": 5}, ["WSD"]),
        ({"weight_decay_incr_style": "linear", "end_weight_decay": 0.1}, ["--start_weight_decay"]),
        ({"start_weight_decay": 0.5}, ["--weight_decay_incr_style"]),
        ({"recompute_num_layers": 1}, ["--recompute_granularity"]),
        ({"mcore_model": "c", "resume": "d"}, ["--mcore_model", "--resume"]),
        ({"finetune": False}, ["--finetune false", "--resume"]),
        ({"max_shard_size": "5 potatoes"}, ["--max_shard_size", "potatoes"]),
        ({"greater_is_better": True}, ["--greater_is_better"]),
        (
            {"tuner_type": "lora", "freeze_parameters": ["model"]},
            ["--freeze_parameters", "--tuner_type full"],
        ),
        ({"trainable_parameters": ["lm_head"]}, ["--trainable_parameters", "--freeze_parameters_ratio 1"]),
        ({"model": None}, ["--model is missing"]),
        ({"dataset": []}, ["--dataset is missing"]),
    ],
)
def test_a_contradiction_is_one_problem_that_names_its_flags(given, words):
    problems = sft(**given).problems()
    assert len(problems) == 1
    assert all(word in str(problems[0]) for word in words), str(problems[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["--to_mcore"]),
        ({"to_mcore": True, "to_hf": True, "mcore_model": "c"}, ["--to_mcore", "--to_hf"]),
        ({"to_hf": True}, ["--mcore_model"]),
        ({"to_mcore": True, "mcore_model": "c"}, ["--mcore_model"]),
    ],
)
def test_an_export_has_one_direction_and_its_source(given, words):
    problems = MegatronExportArguments(model="m", **given).problems()
    assert len(problems) == 1 and all(word in str(problems[0]) for word in words)


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"model": "a/m", "to_mcore": True}, "a/m-mcore"),
        ({"model": "m", "to_hf": True, "mcore_model": "out/checkpoint-5/"}, "out/checkpoint-5-hf"),
        ({"model": "m", "to_mcore": True, "output_dir": "x"}, "x"),
    ],
)
def test_an_export_names_its_folder_after_the_source(given, folder):
    assert MegatronExportArguments(**given).output_dir == folder


def test_pre_training_takes_plain_text_and_may_split_it():
    args = parse(
        MegatronPretrainArguments,
        ["--model", "m", "--dataset", "d", "--train_iters", "1", "--truncation_strategy", "split"],
    )
    assert (args.use_chat_template, args.loss_scale) == (False, "all")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5e9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), ("200", 200), ("1TiB", 2**40)],
)
def test_sizes_count_as_hugging_face_counts_them(text, expected):
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5GBs", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="no size"):
        size_bytes(text)


@pytest.mark.parametrize("cls", ALL)
def test_every_flag_can_be_explained(cls):
    for flag in flags_of(cls).values():
        assert flag.help and not flag.help.endswith("."), flag.name
        defaults = flag.default if flag.is_list else [flag.default]
        assert flag.choices is None or all(one is None or one in flag.choices for one in defaults), flag.name
        assert not set(flag.refused) & set(flag.choices or ()), flag.name
