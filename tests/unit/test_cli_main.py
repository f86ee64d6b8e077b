"""The commands: which there are, what they refuse, and that mistakes are found before anything starts."""

import json
import subprocess
import sys

import pytest

import launch
from mcore_swift.cli.main import main, megatron_main, swift_main
from mcore_swift.config import COMMANDS
from mcore_swift.config.fields import flags_of

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The environment of a user who has set none of the launch variables."""
    for name in (
        "NPROC_PER_NODE",
        "NNODES",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    """A model folder with whole (if empty) weights, and a data set of one row."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (model / "tokenizer.json").write_text("{}")
    data = tmp_path / "data.jsonl"
    data.write_text('{"query": "1+1?", "response": "2"}\n')
    return model, data


@pytest.fixture
def launched(monkeypatch):
    """What would have been launched."""
    calls = []

    def run(command, argv, target):
        calls.append((command, list(argv), target))
        return 0

    monkeypatch.setattr(launch, "run", run)
    return calls


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        (main, ["--help"], ["mcore-swift <command>", "sft", "doctor", "list-models"]),
        (main, [], ["mcore-swift <command>"]),
        (main, ["megatron", "--help"], ["megatron <command>", "export", "rlhf"]),
        (megatron_main, ["--help"], ["megatron <command>", "pt"]),
        (swift_main, ["--help"], ["swift <command>", "infer", "megatron sft"]),
        (main, ["doctor", "--help"], ["--json"]),
        (main, ["--version"], ["mcore-swift 0."]),
    ],
)
def test_help_shows_the_commands(program, argv, words, capsys):
    assert program(argv) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize("command", ["sft", "pt", "export"])
def test_help_of_a_command_lists_every_flag_in_its_group(command, capsys):
    assert megatron_main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in flags_of(COMMANDS[command]).values():
        assert f"\n  --{flag.name} " in shown and f"\n{flag.group}\n" in shown
    assert "TITLE" not in shown and max(map(len, shown.splitlines())) < 140


@pytest.mark.parametrize(
    "argv", [["--help"], ["megatron", "sft", "--help"], ["list-models"], ["doctor", "--help"]]
)
def test_help_imports_nothing_heavy(argv):
    code = (
        f"import sys; from mcore_swift.cli.main import main; main({argv!r}); "
        "heavy = {'torch', 'transformers', 'megatron', 'numpy', 'datasets', 'yaml'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        (swift_main, ["sft", "--model", "m", "--dataset", "d"], ["--model m: no such folder"]),
        (swift_main, ["rlhf"], ["swift rlhf", "megatron sft"]),
        (swift_main, ["merge_lora", "--model", "m"], ["--adapters is missing"]),
        (swift_main, ["web-ui"], ["web-ui"]),
        (
            swift_main,
            ["export", "--adapters", "a", "--merge_lora", "true"],
            ["--adapters a: no such folder"],
        ),
        (
            swift_main,
            ["export", "--quant_bits", "4"],
            ["--quant_bits 4: quantizing", "quantizes while it trains"],
        ),
        (swift_main, ["export", "--adapters", "a"], ["nothing is asked for", "--to_hf", "--merge_lora true"]),
        (megatron_main, ["rlhf", "--rlhf_type", "dpo"], ["megatron rlhf", "not supported yet"]),
        (main, ["megatron", "rlhf"], ["megatron rlhf"]),
        (main, ["trane"], ["trane", "the commands are"]),
        (main, ["exprt"], ["exprt", "did you mean mcore-swift export"]),
        (main, ["doctor", "--fast"], ["--fast", "--json"]),
        (main, ["list-models", "--all"], ["--all"]),
    ],
)
def test_what_is_not_there_is_refused_by_name_with_what_to_use(program, argv, words, capsys):
    assert program(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert all(word in captured.err for word in words), captured.err


def test_swift_export_converts_as_megatron_export_does(files, launched, tmp_path):
    argv = ["--model", str(files[0]), "--to_mcore", "true", "--output_dir", str(tmp_path / "out")]
    assert swift_main(["export", *argv]) == megatron_main(["export", *argv]) == 0
    assert launched[0] == launched[1] == ("export", argv, "mcore_swift.cli.export:convert")


def test_one_of_several_processes_merges(monkeypatch, tmp_path):
    from mcore_swift.cli.merge_lora import merge

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    argv = ["--model", "m", "--adapters", str(tmp_path / "adapter"), "--merge_lora", "true"]
    assert merge(argv) == 0, "the second has nothing to do, and does not miss the model"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("program", "prefix"), [(main, []), (main, ["megatron"]), (megatron_main, [])])
def test_a_sound_command_is_launched_with_its_own_words(program, prefix, files, launched, capsys):
    argv = ["--model", str(files[0]), "--dataset", str(files[1]), "--train_iters", "1"]
    assert program([*prefix, "sft", *argv]) == 0
    assert launched == [("sft", argv, "mcore_swift.cli.sft:train")]
    assert capsys.readouterr().err == ""


def test_mistakes_in_flags_files_and_layout_are_told_together(files, launched, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"query": "1+1?"\n')
    argv = ["--model", str(files[0]), "--dataset", str(tmp_path / "no.jsonl"), str(broken), "--lr", "x"]
    argv += ["--mcore_modle", "c", "--tensor_model_parallel_size", "3", "--resume", str(tmp_path / "gone")]
    assert main(["sft", *argv, "--train_iters", "1"]) == 2
    told = capsys.readouterr().err
    assert launched == [] and "Traceback" not in told
    for word in (
        "--lr",
        "--mcore_modle",
        "no.jsonl",
        "broken.jsonl:1",
        "--tensor_model_parallel_size 3",
        "gone",
    ):
        assert word in told, (word, told)
    assert told.count("error: ") == 6, told


def test_a_bare_command_says_what_it_needs(launched, capsys):
    assert main(["sft", "--model_type", "qwen3"]) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 3 and "--model is missing" in told and "--dataset is missing" in told


def test_a_truncated_weight_file_is_found_before_the_launch(files, launched, capsys):
    model, data = files
    (model / "model.safetensors").write_bytes((999).to_bytes(8, "little") + b"{}")
    argv = ["sft", "--model", str(model), "--dataset", str(data), "--train_iters", "1"]
    assert main(argv) == 2
    assert "model.safetensors" in capsys.readouterr().err and launched == []
    assert main([*argv, "--check_model", "false"]) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [("qwen3", ()), ("llama", ("error: --model_type llama", "says qwen3"))],
)
@pytest.mark.parametrize("command", ["megatron", "swift"])
def test_a_model_type_is_what_the_model_must_be(files, launched, capsys, command, given, words):
    argv = [command, "sft", "--model", str(files[0]), "--dataset", str(files[1])]
    argv += ["--train_iters", "1"] if command == "megatron" else []
    assert main([*argv, "--model_type", given]) == (2 if words else 0)
    told = capsys.readouterr().err
    assert all(word in told for word in words) and told.count("error: ") == bool(words)
    assert main([*argv, "--model_type", "qwen3_nothinking"]) == 0, "one of ms-swift's many names"
    assert "note: --model_type qwen3_nothinking" in capsys.readouterr().err


def test_folders_given_to_the_wrong_flag_are_told_where_they_belong(files, launched, capsys, tmp_path):
    model, data = map(str, files)
    adapter = tmp_path / "run" / "checkpoint-5"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    (adapter / "manifest.json").write_text("{}")

    def told(*argv):
        assert main(["swift", "sft", "--dataset", data, *argv]) == 2 and launched == []
        return capsys.readouterr().err

    assert f"give it to --adapters, and its base {model} to --model" in told("--model", str(adapter))
    assert "give it to --model, without --adapters" in told("--model", model, "--adapters", model)
    assert f"such as {adapter}" in told("--model", model, "--adapters", str(tmp_path / "run"))
    assert f"did you mean {model}?" in told("--model", model[:-1])
    assert f"did you mean {model}?" in told("--model", str(tmp_path))
    assert "start from its weights" in told("--model", model, "--resume_from_checkpoint", model)
    assert main(["megatron", "export", "--to_hf", "true", "--model", model, "--mcore_model", model]) == 2
    assert "is a Hugging Face checkpoint\n  remedy: give it to --model" in capsys.readouterr().err
    (files[0] / "tokenizer.json").unlink()
    assert "holds no tokenizer" in told("--model", model)


def test_export_does_not_write_into_a_folder_that_holds_something(files, launched, capsys):
    argv = ["export", "--model", str(files[0]), "--to_mcore", "true", "--output_dir", str(files[1].parent)]
    assert main(argv) == 2
    assert "not empty" in capsys.readouterr().err and launched == []
    assert main([*argv, "--exist_ok", "true"]) == 0


def test_a_file_of_flags_may_say_how_many_processes(files, launched, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NPROC_PER_NODE", "")  # for monkeypatch to take away again what the file sets
    monkeypatch.delenv("NPROC_PER_NODE")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {files[0]}\ndataset: {files[1]}\ntrain_iters: 1\nENV:\n  NPROC_PER_NODE: 3\n")
    assert main(["sft", str(config), "--tensor_model_parallel_size", "2"]) == 2
    assert "3 processes" in capsys.readouterr().err and launched == []


def test_under_torchrun_the_checks_run_in_every_process(files, monkeypatch, capsys):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["sft", "--model", str(files[0]), "--dataset", "no.jsonl", "--train_iters", "1"]) == 2
    assert capsys.readouterr().err.count("no.jsonl") == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_an_interrupt_has_the_exit_code_of_a_shell(error, code, monkeypatch):
    import os

    from mcore_swift.cli import list_models

    def stop(argv):
        raise error

    monkeypatch.setattr(list_models, "run", stop)
    monkeypatch.setattr(os, "dup2", lambda *fds: None)  # pytest reads this process's output
    assert main(["list-models"]) == code


def test_list_models_names_architectures_and_what_is_proven(capsys):
    assert main(["list-models", "--json"]) == 0
    rows = {row["family"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["qwen3"]["architectures"] == ["Qwen3ForCausalLM"] and "TP" in rows["qwen3"]["proven"]
    assert "soft caps" in rows["gemma2"]["features"]
    assert main(["list-models"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("Gemma3ForCausalLM"))
    assert "gemma3" in line and "TP SP PP" in line and "sliding window" in line
