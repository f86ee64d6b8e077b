"""`swift sft`: names and defaults of the Trainer, and what the training loop makes of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from mcore_swift.config import MegatronPretrainArguments, SwiftPretrainArguments, SwiftSftArguments, parse
from mcore_swift.errors import UserError, UserErrors
from mcore_swift.plan.backend import choose_backend

NEEDED = ["--model", "m", "--dataset", "d.jsonl"]


def arguments(*argv: str, cls=SwiftSftArguments) -> SwiftSftArguments:
    return parse(cls, [*NEEDED, *argv], notify=lambda notice: None)


@pytest.mark.parametrize(
    ("argv", "world_size", "micro", "whole"),
    [
        ([], 1, 1, 16),
        ([], 3, 1, 18),  # 6 rounds of 3: the smallest step of 16 or more
        (["--per_device_train_batch_size", "32"], 2, 32, 64),
        (["--gradient_accumulation_steps", "2"], 4, 1, 8),
    ],
)
def test_a_step_has_sixteen_samples_unless_it_is_said(argv, world_size, micro, whole):
    loop = arguments(*argv).for_loop(world_size, "fsdp")
    assert (loop.micro_batch_size, loop.global_batch_size) == (micro, whole)


def test_defaults_are_those_of_ms_swift():
    args = arguments()
    assert (args.tuner_type, args.lora_rank, args.lora_alpha, args.lora_dropout) == ("lora", 8, 32, 0.05)
    loop = args.for_loop(1, "fsdp")
    assert (loop.lr, loop.num_train_epochs, loop.train_iters) == (1e-4, 3, None)
    assert (loop.weight_decay, loop.adam_beta2, loop.clip_grad) == (0.1, 0.95, 1.0)
    assert (loop.lr_decay_style, loop.save_steps, loop.logging_steps) == ("cosine", 500, 5)
    assert arguments("--train_type", "full").for_loop(1, "fsdp").lr == 1e-5


def test_names_of_the_trainer_reach_the_loop():
    argv = ["--max_steps", "7", "--warmup_ratio", "0.1", "--max_grad_norm", "2", "--optim", "sgd"]
    argv += [
        "--lr_scheduler_type",
        "constant_with_warmup",
        "--save_only_model",
        "true",
        "--eval_strategy",
        "no",
    ]
    loop = arguments(*argv).for_loop(1, "ddp")
    assert (loop.train_iters, loop.num_train_epochs, loop.lr_warmup_fraction) == (7, None, 0.1)
    assert (loop.clip_grad, loop.optimizer, loop.lr_decay_style) == (2, "sgd", "constant")
    assert (loop.no_save_optim, loop.eval_iters, loop.backend) == (True, 0, "ddp")


def test_for_the_megatron_engine_they_become_its_own():
    args = arguments("--train_type", "full", "--max_steps", "7", cls=SwiftPretrainArguments)
    loop = args.for_loop(2, "megatron")
    assert type(loop) is MegatronPretrainArguments and loop.problems() == []
    assert (loop.train_iters, loop.global_batch_size, loop.loss_scale) == (7, 16, "all")
    assert loop.recompute_granularity == "full", "gradient checkpointing"


def test_args_json_keeps_what_the_user_gave(tmp_path):
    args = arguments("--packing", "true", "--use_flash_attn", "true")
    args.for_loop(2, "fsdp").save(tmp_path)
    assert json.loads((tmp_path / "args.json").read_text())["per_device_train_batch_size"] == 1
    again = SwiftSftArguments.load(tmp_path)
    assert again == args and again.padding_free and again.attn_impl == "flash_attn"


def test_short_names_of_quantization_are_its_long_ones(tmp_path):
    args = arguments("--load_in_8bit", "true")
    assert (args.quant_method, args.quant_bits) == ("bnb", 8)
    args.save(tmp_path)
    again = arguments("--resume_from_checkpoint", str(tmp_path))
    assert (again.quant_method, again.quant_bits) == ("bnb", 8), "adapters go on beside what they were beside"


def test_a_resumed_run_trains_what_it_has_trained(tmp_path):
    arguments("--train_type", "full", "--freeze_parameters", "model.embed").save(tmp_path)
    args = arguments("--resume_from_checkpoint", str(tmp_path))
    assert (args.tuner_type, args.freeze_parameters) == ("full", ["model.embed"])
    changed = ["--resume_from_checkpoint", str(tmp_path), "--freeze_parameters_ratio", "0.5"]
    with pytest.raises(UserError, match=r"--freeze_parameters_ratio 0.5: the checkpoint .* trained with 0.0"):
        arguments(*changed)
    args = arguments(*changed, "--resume_only_model", "true")
    assert args.freeze_parameters_ratio == 0.5, "the optimizer starts anew"


def test_an_adapter_brings_the_model_and_the_text_it_was_trained_with(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.chdir(tmp_path)
    args = parse(
        SwiftSftArguments,
        ["--model", "model", "--dataset", "d", "--system", "Be brief.", "--max_length", "99"],
    )
    (tmp_path / "adapter").mkdir()
    args.save(tmp_path / "adapter")
    monkeypatch.chdir("/")
    notices = []
    adapter = ["--dataset", "e", "--adapters", str(tmp_path / "adapter")]
    again = parse(SwiftSftArguments, [*adapter, "--max_length", "50"], notify=notices.append)
    assert (again.model, again.system, again.max_length) == (str(model), "Be brief.", 50)
    assert len(notices) == 1 and "args.json: model, system" in notices[0]
    config = {"r": 16, "base_model_name_or_path": str(model)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    parse(SwiftSftArguments, [*adapter, "--lora_rank", "4", "--lora_alpha", "32"], notify=notices.append)
    assert "--lora_rank 4 has no effect: the adapter in --adapters has 16" in notices
    parse(SwiftSftArguments, [*adapter, "--modules_to_save", "lm_head", "norm"], notify=notices.append)
    assert "--modules_to_save lm_head norm has no effect: the adapter in --adapters has none" in notices
    (tmp_path / "adapter" / "args.json").unlink()
    again = parse(SwiftSftArguments, adapter, notify=notices.append)
    assert (again.model, again.system) == (str(model), None), (
        "of somebody else, its config says what it is for"
    )
    with pytest.raises((UserError, UserErrors), match="--model is missing"):
        parse(SwiftSftArguments, [*adapter, "--load_args", "false"])


def test_an_args_json_of_ms_swift_is_understood(tmp_path):
    theirs = {
        "model": "Qwen/Qwen3-0.6B",  # a name on its hub
        "model_dir": str(tmp_path),
        "model_type": "qwen3_nothinking",
        "train_type": "loha",  # v3's name
        "system": "Hi",
    }
    (tmp_path / "args.json").write_text(json.dumps(theirs))
    args = parse(
        SwiftSftArguments, ["--dataset", "d", "--adapters", str(tmp_path)], notify=lambda notice: None
    )
    assert (args.model, args.tuner_type, args.system) == (str(tmp_path), "loha", "Hi")
    (tmp_path / "args.json").write_text(json.dumps(theirs | {"loss_scale": "hermes"}))
    with pytest.raises(UserError, match="loss_scale hermes.*\n.*give --loss_scale, which then counts"):
        parse(SwiftSftArguments, ["--dataset", "d", "--adapters", str(tmp_path)], notify=lambda notice: None)


def test_auto_resumes_with_the_adapter_of_the_newest_checkpoint(tmp_path):
    auto = ["--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path)]
    assert arguments(*auto).lora_rank == 8, "there is none yet"
    for number, rank in ((5, 4), (10, 6)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"written": 100 - number}))
        given = ("--lora_rank", str(rank), "--target_modules", "q_proj", "v_proj", "--use_rslora", "true")
        arguments(*given, "--lora_dropout", "0.3", "--lorap_lr_ratio", "4").save(folder)
    silent = arguments(*auto)
    assert (silent.lora_dropout, silent.lorap_lr_ratio) == (0.3, 4), "as it was, unless the command says else"
    args = arguments(*auto, "--lora_dropout", "0")
    assert (args.lora_rank, args.use_rslora, args.target_modules) == (4, True, ["q_proj", "v_proj"])
    assert args.lora_dropout == 0 and args.add_version is False
    assert arguments(*auto, "--lora_rank", "4", "--target_modules", "v_proj", "q_proj").lora_rank == 4
    with pytest.raises(UserErrors) as caught:
        arguments(*auto, "--lora_rank", "16", "--tuner_type", "loha", "--target_modules", "all-linear")
    told = str(caught.value)
    assert "--lora_rank 16: the checkpoint that is resumed was trained with 4" in told
    assert "--tuner_type loha" in told and "--target_modules all-linear" in told
    assert arguments(*auto, "--lora_rank", "16", "--load_args", "false").lora_rank == 16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--deepspeed", "zero3"], ["--deepspeed zero3", "--backend fsdp"]),
        (["--learning_rat", "1"], ["did you mean --learning_rate"]),
        (["--tensor_model_parallel_size", "2"], ["`megatron sft`", "`swift sft`"]),
        (["--tuner_type", "longlora"], ["longlora", "--sequence_parallel_size"]),
        (
            ["--tuner_type", "adalora", "--adalora_init_r", "4"],
            ["--adalora_init_r 4", "--adalora_target_r 8"],
        ),
        (["--load_in_8bit", "true", "--quant_bits", "4"], ["--load_in_8bit means", "--quant_bits 8"]),
        (["--load_in_4bit", "true", "--tuner_type", "full"], ["--quant_method", "cannot be trained"]),
        (
            ["--load_in_4bit", "true", "--tuner_type", "loha"],
            ["loha adapters beside quantized", "use --tuner_type lora, ia3"],
        ),
        (
            ["--load_in_4bit", "true", "--init_weights", "olora"],
            ["--init_weights olora", "cannot be changed"],
        ),
        (["--quant_method", "bnb", "--quant_bits", "3"], ["--quant_bits 3", "4, 8"]),
        (["--quant_bits", "4"], ["--quant_bits without --quant_method"]),
        (
            ["--torch_compile", "true", "--backend", "megatron"],
            ["--torch_compile is for transformers models"],
        ),
        (
            ["--gradient_checkpointing_kwargs", '{"reentrant": true}'],
            ["reentrant is not supported", "use_reentrant"],
        ),
        (["--quant_method", "gptq", "--quant_bits", "4"], ["gptq", "already in that form"]),
        (["--bf16", "true"], ["--torch_dtype bfloat16"]),
        (
            ["--backend", "megatron", "--tuner_type", "vera"],
            ["vera with --backend megatron", "--backend fsdp"],
        ),
        (["--backend", "megatron", "--attn_impl", "sdpa"], ["--attn_impl sdpa", "drop --attn_impl"]),
        (["--backend", "ddp", "--fsdp_cpu_offload", "true"], ["--fsdp_cpu_offload", "--backend fsdp"]),
        (["--target_regex", "("], ["--target_regex is no regular expression"]),
        (["-lora_rank", "8"], ["'-lora_rank' is no flag", "--lora_rank, with two plain dashes"]),
        (["\u2014lora_rank", "8"], ["'\u2014lora_rank' is no flag"]),
        (["--optimizer", "lorap"], ["--optimizer lorap", "--lorap_lr_ratio alone"]),
        (["--use_flash_ckpt", "true"], ["--use_flash_ckpt true", "--async_save true"]),
        (["--lr", "1e-4"], ["`megatron sft`", "use --learning_rate"]),
        (["--loss_scale", "last_round+hermes"], ["last_round+hermes", "not supported"]),
        (["--use_dora", "true", "--tuner_type", "ia3"], ["--use_dora is for --tuner_type lora"]),
        (
            ["--backend", "megatron", "--target_parameters", "experts.down_proj"],
            ["--target_parameters", "module"],
        ),
        (["--freeze_parameters", "model"], ["--freeze_parameters is for --tuner_type full"]),
        (["--max_memory", '{"0": "1GB"}'], ["--max_memory", "--device_map auto"]),
        (["--device_map", "auto", "--backend", "ddp"], ["--device_map auto with --backend ddp"]),
        (["--device_map", "auto", "--optim", "lamb"], ["--optim", "muon"]),
        (["--eval_strategy", "epoch"], ["--save_strategy epoch"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(argv, words):
    with pytest.raises((UserError, UserErrors)) as caught:
        arguments(*argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_python_call_takes_the_names_of_the_command():
    from mcore_swift import TrainArguments

    args = TrainArguments(
        model="m", train_type="full", dataset=["a.jsonl#5", "b.jsonl"], columns={"q": "query"}
    )
    assert (args.tuner_type, args.dataset, args.columns) == ("full", ["a.jsonl#5", "b.jsonl"], {"q": "query"})
    import torch

    same = TrainArguments(
        model=Path("m"),
        dataset=("a.jsonl#5", Path("b.jsonl")),
        train_type="full",
        columns='{"q": "query"}',
        torch_dtype=torch.bfloat16,
        adapters=[],
        system=None,
        max_steps=-1,
        packing=False,
    )
    assert dataclasses.replace(same, torch_dtype=None) == args and same.torch_dtype == "bfloat16"
    with pytest.raises((UserError, UserErrors), match="no such flag"):
        TrainArguments(model="m", dataset=["a"], learning_speed=3)


def test_what_a_python_call_cannot_do_is_an_exception(monkeypatch, tmp_path):
    from mcore_swift import PretrainArguments, TrainArguments, pt_main, sft_main

    args = TrainArguments(model=str(tmp_path / "none"), dataset=[str(tmp_path / "rows.jsonl")])
    with pytest.raises(UserErrors) as caught:
        sft_main(args)
    assert "none: no such folder" in str(caught.value) and "rows.jsonl: no such file" in str(caught.value)
    with pytest.raises(UserError, match="for sft_main"):
        pt_main(args)
    assert PretrainArguments(model="m", dataset="d").loss_scale == "all"
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        sft_main(args)


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--model=~/m", "--dataset", "~/a.jsonl#5", "b", "--output_dir=~/out", "--system", "~ is home"]
    args = parse(SwiftSftArguments, argv, notify=lambda notice: None)
    assert (args.model, args.dataset, args.output_dir) == (
        "/home/me/m",
        ["/home/me/a.jsonl#5", "b"],
        "/home/me/out",
    )
    assert args.system == "~ is home"


def test_settings_of_another_tuner_are_noted():
    notices = []
    argv = [
        *NEEDED,
        "--tuner_type",
        "full",
        "--lora_rank",
        "16",
        "--lora_alpha",
        "32",
        "--vera_dropout",
        "0.1",
    ]
    parse(SwiftSftArguments, argv, notify=notices.append)
    assert notices == ["--lora_rank, --vera_dropout: no effect with --tuner_type full"]
    parse(
        SwiftSftArguments, [*NEEDED, "--tuner_type", "adalora", "--lora_alpha", "16"], notify=notices.append
    )
    assert len(notices) == 1


OPT = {"architectures": ["OPTForCausalLM"]}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 1000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "world_size", "memory", "config", "chosen", "why"),
    [
        (["--train_type", "full"], 2, 1e9, {}, "megatron", "known"),
        (["--train_type", "full"], 1, 1e9, {}, "fsdp", "one process"),
        (["--train_type", "full"], 2, 1e6, {}, "fsdp", "GB"),
        (["--train_type", "full"], 2, 1e9, OPT, "ddp", "architecture; a copy of the model"),
        (["--train_type", "full"], 2, 1e4, OPT, "fsdp", "1.6e-05 GB beside activations, which does not fit"),
        (["--train_type", "full", "--neftune_noise_alpha", "5"], 2, 1e9, {}, "ddp", "--neftune_noise_alpha"),
        (["--train_type", "full", "--attn_impl", "sdpa"], 2, 1e9, {}, "ddp", "--attn_impl"),
        ([], 2, 1e9, {}, "ddp", "lora goes with transformers' model; a copy"),
        ([], 2, 1e4, {}, "fsdp", "does not fit into 1e-05 GB"),
        ([], 2, None, {}, "fsdp", "is not known"),
        ([], 1, 1e9, {}, "fsdp", "lora"),
        (["--train_type", "llamapro"], 2, 1e9, {}, "ddp", "which fits"),
        (["--train_type", "full", "--optim", "muon"], 2, 1e3, {}, "ddp", "--optim muon"),
        (["--quant_method", "bnb", "--quant_bits", "4"], 2, 1e3, {}, "ddp", "quantized"),
        (["--train_type", "full", "--backend", "ddp"], 2, 1e9, {}, "ddp", "as --backend says"),
        (["--train_type", "full", "--fsdp_cpu_offload", "true"], 2, 1e9, {}, "fsdp", "--fsdp_cpu_offload"),
    ],
)
def test_the_engine_is_chosen_for_a_reason(tmp_path, argv, world_size, memory, config, chosen, why):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2000)  # a thousand values, by its size
    args = arguments(*argv)
    args.model = str(tmp_path)
    found, reason = choose_backend(args, world_size, memory)
    assert found == chosen and why in reason


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--streaming true", "--max_steps"]),
        (["--max_steps", "5", "--split_dataset_ratio", "0.1"], ["--split_dataset_ratio", "--val_dataset"]),
    ],
)
def test_what_a_stream_cannot_know_is_asked_for(argv, words):
    with pytest.raises(UserError) as caught:
        arguments("--streaming", "true", *argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert arguments("--streaming", "true", "--max_steps", "5").for_loop(1, "fsdp").streaming
