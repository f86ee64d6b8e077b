"""Command line and file to arguments: values, precedence, and all mistakes told at once."""

import json
import os

import pytest

from mcore_swift.config import MegatronExportArguments, MegatronPretrainArguments, MegatronSftArguments, parse
from mcore_swift.errors import UserError, UserErrors

MINIMAL = ["--model", "m", "--dataset", "d.jsonl", "--train_iters", "10"]


def sft(*argv, notices=None):
    return parse(
        MegatronSftArguments, [*MINIMAL, *argv], notify=(notices if notices is not None else []).append
    )


def refusal(*argv, cls=MegatronSftArguments, base=MINIMAL):
    with pytest.raises(UserError) as caught:
        parse(cls, [*base, *argv], notify=lambda notice: None)
    return caught.value


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--packing"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--packing=True"], "packing", True),
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--save_steps", "1e3"], "save_steps", 1000),
        (["--save-steps", "7"], "save_steps", 7),
        (["--eval_iters", "-1"], "eval_iters", -1),
        (["--data_seed", "9007199254740993"], "data_seed", 9007199254740993),  # 2**53 + 1: no float holds it
        (["--dataset", "a.jsonl", "b.jsonl#5"], "dataset", ["a.jsonl", "b.jsonl#5"]),
        (["--dataset", '["a b.jsonl", "c"]'], "dataset", ["a b.jsonl", "c"]),
        (["--columns", '{"question": "query"}'], "columns", {"question": "query"}),
        (["--max_length", "none"], "max_length", None),
        (["--system", ""], "system", ""),
        (["--system=--not a flag"], "system", "--not a flag"),
        (["--recompute_granularity", "none"], "recompute_granularity", "none"),
        (["--report_to", "none"], "report_to", []),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
        (["--strict", "false"], "strict", False),
    ],
)
def test_values_have_the_type_of_their_flag(argv, name, value):
    base = [] if name == "dataset" else MINIMAL[2:4]
    args = parse(
        MegatronSftArguments, ["--model", "m", "--train_iters", "1", *base, *argv], notify=lambda _: None
    )
    got = getattr(args, name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "fast"], ["--lr", "a number", "fast"]),
        (["--lr"], ["--lr", "needs a value"]),
        (["--lr", "1", "2"], ["--lr", "one value"]),
        (["--lr", "nan"], ["--lr", "a number"]),
        (["--save_steps", "1.5"], ["--save_steps", "an integer"]),
        (["--save_steps", "0"], ["--save_steps", "at least 1"]),
        (["--save_steps", "true"], ["--save_steps", "an integer"]),
        (["--packing", "maybe"], ["--packing", "true or false"]),
        (["--columns", "{a: b}"], ["--columns", "JSON"]),
        (["--columns", "[1]"], ["--columns", "JSON object"]),
        (["--optimizer", "lion"], ["--optimizer", "lion", "adam, sgd"]),
        (["--optimizer", "muon"], ["--optimizer muon", "not supported"]),
        (["--torch_dtype", "float16"], ["float16", "loss scaling", "bfloat16"]),
        (["--report_to", "tensorboard", "wandb"], ["--report_to", "wandb"]),
        (["--adam_beta1", "1"], ["--adam_beta1", "below 1"]),
        (["--split_dataset_ratio", "-0.1"], ["at least 0"]),
        (["--ddp_timeout", "none"], ["--ddp_timeout", "none"]),
        (["--dataset", "a", "--dataset", "b"], ["--dataset", "twice"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["several configuration files"]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_flag(argv, words):
    text = str(refusal(*argv))
    assert all(word in text for word in words), text


def test_an_unknown_flag_is_told_with_the_nearest_known_one():
    error = refusal("--micro_batchsize", "2")
    assert not isinstance(error, UserErrors)
    assert "--micro_batchsize" in error.message and "--micro_batch_size" in error.remedy


def test_a_mistyped_required_flag_is_one_mistake_and_not_two():
    error = refusal("--datset", "d.jsonl", base=["--model", "m", "--train_iters", "1"])
    assert not isinstance(error, UserErrors)
    assert "--dataset" in error.remedy


def test_unknown_flags_are_only_noticed_on_request():
    notices = []
    args = sft("--frobnicate", "3", "--ignore_args_error", "true", notices=notices)
    assert args.train_iters == 10
    assert any("--frobnicate" in notice for notice in notices)


def test_all_mistakes_are_told_together():
    error = refusal(
        "--lr", "x", "--optimizer", "lion", "--frobnicate", "1", "--fp8_format", "e4m3",
        "--micro_batch_size", "3", "--val_dataset", "v", "--split_dataset_ratio", "0.1", base=["stray"],
    )  # fmt: skip
    assert isinstance(error, UserErrors)
    told = [one.message for one in error.errors]
    for word in (
        "'stray'", "--lr", "lion", "--frobnicate", "--fp8_format e4m3", "--global_batch_size 16",
        "--val_dataset", "--model is missing", "--dataset is missing", "--num_train_epochs",
    ):  # fmt: skip
        assert sum(word in message for message in told) == 1, (word, told)


def test_what_follows_from_a_bad_value_is_not_told():
    error = refusal("--global_batch_size", "many", "--micro_batch_size", "3")
    assert "--global_batch_size" in error.message and not isinstance(error, UserErrors)


def test_the_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: from_file\ndataset:\n  - a.jsonl\n  - b.jsonl\nlr: 1e-3\nsave_interval: 7\npacking: true\n"
        "columns:\n  question: query\ntrain_iters: 1e2\nsystem: null\n"
    )
    for argv in ([str(config), "--lr", "2e-3"], ["--lr=2e-3", "--config", str(config)]):
        args = parse(MegatronSftArguments, argv, notify=lambda _: None)
        assert (args.model, args.lr, args.train_iters, args.packing) == ("from_file", 2e-3, 100, True)
        assert (args.dataset, args.columns, args.system) == (
            ["a.jsonl", "b.jsonl"],
            {"question": "query"},
            None,
        )
        assert args.save_steps == 7
    # an old name in the file gives way to today's name on the command line
    assert (
        parse(MegatronSftArguments, [str(config), "--save_steps", "9"], notify=lambda _: None).save_steps == 9
    )


def test_a_json_file_says_the_same_as_yaml(tmp_path):
    values = {"model": "m", "dataset": ["d.jsonl"], "train_iters": 5, "sequence_parallel": False, "lr": 0.01}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    from_json, from_yaml = (
        parse(MegatronSftArguments, [str(tmp_path / name)]) for name in ("run.json", "run.yml")
    )
    assert from_json == from_yaml and from_json.lr == 0.01


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "model: m\nlr: [1\n", ["a.yaml:3", "YAML"]),
        ("a.json", '{"model": "m",\n}', ["a.json:2", "JSON"]),
        ("a.yaml", "- model\n", ["a.yaml", "list"]),
        ("a.yaml", "lerning_rate: 1\n", ["a.yaml: lerning_rate", "no such flag", "--learning_rate"]),
        ("a.yaml", "lr: fast\n", ["a.yaml: lr", "a number"]),
        ("a.yaml", "ENV: [1]\n", ["a.yaml", "ENV"]),
        ("a.yaml", "lr: 1\nmodel: m\nlr: 2\n", ["a.yaml:3", "lr is given twice"]),
        ("a.json", '{"lr": 1, "lr": 2}', ["a.json", "lr is given twice"]),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    told = str(refusal(str(tmp_path / name), base=[]))
    assert all(word in told for word in words), told


def test_a_missing_file_is_told_with_the_other_mistakes(tmp_path):
    told = str(refusal(str(tmp_path / "no.yaml"), "--lr", "x", base=[]))
    assert "no.yaml" in told and "--lr" in told


def test_the_env_section_sets_what_is_not_set(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("ENV:\n  MCORE_SWIFT_TEST_NEW: 2\n  MCORE_SWIFT_TEST_OLD: theirs\n")
    monkeypatch.setenv("MCORE_SWIFT_TEST_OLD", "mine")
    monkeypatch.setenv("MCORE_SWIFT_TEST_NEW", "")  # so that monkeypatch takes it away again
    monkeypatch.delenv("MCORE_SWIFT_TEST_NEW")
    notices = []
    parse(MegatronSftArguments, [str(config), *MINIMAL], notify=notices.append)
    assert os.environ["MCORE_SWIFT_TEST_NEW"] == "2" and os.environ["MCORE_SWIFT_TEST_OLD"] == "mine"
    assert len(notices) == 1 and "MCORE_SWIFT_TEST_OLD" in notices[0] and "mine" in notices[0]


@pytest.mark.parametrize(
    ("cls", "argv"),
    [
        (
            MegatronSftArguments,
            [*MINIMAL, "--columns", '{"a": "b"}', "--packing", "--resume", "auto", "--system", ""],
        ),
        (
            MegatronSftArguments,
            [*MINIMAL, "--mcore_model", "c", "--finetune", "false", "--sequence_parallel"],
        ),
        (MegatronSftArguments, [*MINIMAL, "--report_to", "none", "--recompute_granularity", "full"]),
        (MegatronPretrainArguments, [*MINIMAL, "--truncation_strategy", "split", "--lr", "3e-4"]),
        (MegatronExportArguments, ["--model", "m", "--to_mcore", "true"]),
    ],
)
def test_args_json_reads_back_equal(cls, argv, tmp_path):
    args = parse(cls, argv)
    path = args.save(tmp_path)
    assert json.loads(path.read_text())["command"] == cls.COMMAND
    assert cls.load(tmp_path) == args


def test_the_model_and_its_text_come_from_the_checkpoint_that_is_resumed(tmp_path):
    parse(MegatronSftArguments, [*MINIMAL, "--system", "be brief", "--max_length", "64", "--lr", "1"]).save(
        tmp_path
    )
    notices = []
    argv = ["--dataset", "e.jsonl", "--train_iters", "5", "--resume", str(tmp_path)]
    args = parse(MegatronSftArguments, [*argv, "--max_length", "32"], notify=notices.append)
    assert (args.model, args.system, args.max_length, args.lr) == ("m", "be brief", 32, 1e-5)
    assert any("model" in notice and "args.json" in notice for notice in notices)
    assert "--model is missing" in str(refusal(*argv, "--load_args", "false", base=[]))


def test_the_newest_run_of_an_output_folder_tells_its_arguments(tmp_path):
    for age, name in enumerate(("v1-20260102-000000", "v0-20260101-000000")):
        (tmp_path / name).mkdir()
        path = parse(MegatronSftArguments, [*MINIMAL, "--system", name]).save(tmp_path / name)
        os.utime(path, (1e9 - age, 1e9 - age))
    args = parse(MegatronSftArguments, [*MINIMAL, "--resume", str(tmp_path)], notify=lambda _: None)
    assert args.system == "v1-20260102-000000"


def test_an_args_json_that_is_broken_is_one_more_mistake(tmp_path):
    (tmp_path / "args.json").write_text('{"model": "m",')
    told = str(refusal("--mcore_model", str(tmp_path), "--lr", "x"))
    assert "args.json" in told and "--lr" in told


def test_export_needs_only_the_checkpoint(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    parse(MegatronSftArguments, MINIMAL).save(tmp_path / "checkpoint-5")
    args = parse(
        MegatronExportArguments, ["--mcore_model", str(tmp_path / "checkpoint-5"), "--to_hf", "true"]
    )
    assert args.model == "m" and args.output_dir == str(tmp_path / "checkpoint-5-hf")


def test_a_flag_of_another_command_is_named_as_such():
    assert "megatron export" in refusal("--to_hf", "true").message
    error = refusal("--lr", "1", cls=MegatronExportArguments, base=["--model", "m", "--to_mcore", "true"])
    assert "--lr" in error.message and "megatron sft" in error.message
