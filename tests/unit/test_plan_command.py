"""`mcore-swift plan`: its answers, the commands it prints, and what it says when nothing fits."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_swift.cli.main import main
from mcore_swift.config import MegatronPretrainArguments, MegatronSftArguments, read
from mcore_swift.plan import Layout, ModelShape, check_layout
from mcore_swift.plan.gpus import GPUS
from mcore_swift.plan.memory import GIB, Recompute, Run, stages_of
from mcore_swift.plan.planner import memory_notice, of_driver
from mcore_swift.plan.search import Wish, layouts, spread_layers
from mcore_swift.plan.timing import Cluster, step_time

DENSE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "max_position_embeddings": 40960,
}  # fmt: skip
# flags of training that others may still be at work on; the planner is to be right about their names
_COMING = ("context_parallel_size", "expert_")


@pytest.fixture
def dense(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    return str(tmp_path)


@pytest.fixture
def moe(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MOE))
    return str(path)


def plan(capsys: pytest.CaptureFixture, *argv: object, expect: int = 0) -> dict:
    assert main(["plan", *map(str, argv), "--json"]) == expect
    return json.loads(capsys.readouterr().out)


def test_adapters_fit_where_the_whole_model_does_not(dense: str, capsys: pytest.CaptureFixture) -> None:
    asked = ("--model", dense, "--gpu", "a100-40g", "--num_gpus", 1, "--global_batch_size", 8)
    plan(capsys, *asked, expect=2)
    lora = plan(capsys, *asked, "--tuner_type", "lora")["layouts"][0]
    assert "--tuner_type lora --lora_rank 8" in lora["command"]
    asked += ("--tuner_type", "lora", "--load_in_4bit", "true")
    four = plan(capsys, *asked, "--micro_batch_size", 1)["layouts"][0]
    assert "--load_in_4bit true" in four["command"]
    assert four["memory_bytes"]["weights"] < 0.5 * lora["memory_bytes"]["weights"]


def test_a_dense_model(dense: str, capsys: pytest.CaptureFixture) -> None:
    answer = plan(
        capsys, "--model", dense, "--gpu", "h100", "--num_gpus", 16, "--max_length", 8192, "--top", 4
    )
    assert answer["parameters"] == answer["active_parameters"] == 8030261248  # Llama-3 8B
    speeds = [layout["tokens_per_s_per_gpu"] for layout in answer["layouts"]]
    assert len(speeds) == 4 and speeds == sorted(speeds, reverse=True)
    for layout in answer["layouts"]:
        assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == 16
        parts = layout["memory_bytes"]
        names = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
        assert parts["total"] == pytest.approx(sum(parts[name] for name in names))
        assert parts["total"] <= answer["capacity_bytes"]
        step = layout["step_s"]
        assert step["total"] == pytest.approx(sum(step.values()) - step["total"])
        # tokens of a step over its time
        assert 256 * 8192 / step["total"] / 16 == pytest.approx(layout["tokens_per_s_per_gpu"])
        assert 0.1 < layout["mfu"] < 0.7
        assert_accepted(layout["command"], MegatronSftArguments)


def test_experts_and_fixed_sizes(moe: str, capsys: pytest.CaptureFixture) -> None:
    argv = ("--model", moe, "--gpu", "h100", "--num_gpus", 64, "--command", "pt")
    answer = plan(capsys, *argv, "--expert_model_parallel_size", 8, "--pipeline_model_parallel_size", 4)
    assert answer["parameters"] > 8 * answer["active_parameters"]
    for layout in answer["layouts"]:
        assert (layout["ep"], layout["pp"]) == (8, 4)
        assert sum(layout["layers_of_stages"]) == 46  # no multiple of 4: the pipeline is uneven
        assert "pipeline_model_parallel_layout" in layout["command"]
        assert_accepted(layout["command"], MegatronPretrainArguments)


def test_what_is_asked_for_is_in_the_command(dense: str, capsys: pytest.CaptureFixture) -> None:
    asked = ["--recompute_granularity", "selective", "--recompute_modules", "mlp", "layernorm"]
    asked += ["--torch_dtype", "float32", "--optimizer", "sgd", "--use_distributed_optimizer", "false"]
    argv = ["--model", dense, "--gpu", "h200", "--num_gpus", 8, "--context_parallel_size", 1, *asked]
    for layout in plan(capsys, *argv)["layouts"]:
        assert "--recompute_modules layernorm mlp" in layout["command"]
        assert_accepted(layout["command"], MegatronSftArguments)


def assert_accepted(command: str, cls: type) -> None:
    """Our own parser takes the command line as it is printed."""
    words = shlex.split(command)
    assert words[0].startswith("NPROC_PER_NODE=")
    flags = words[words.index("megatron") + 2 :]
    flags[flags.index("<data>")] = "data.jsonl"
    errors = [str(error) for error in read(cls, flags).errors]
    assert [error for error in errors if not any(name in error for name in _COMING)] == []
    assert not any("no such flag" in error for error in errors)


def test_the_table(dense: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--model", dense, "--gpu", "H200", "--num_gpus", "8", "--top", "2"]) == 0
    printed = capsys.readouterr().out
    assert "8.03 billion parameters" in printed and "tok/s/GPU" in printed
    assert printed.count("megatron sft") == 2 and "Estimates, not measurements" in printed


def test_nothing_fits(dense: str, capsys: pytest.CaptureFixture) -> None:
    argv = ["--model", dense, "--gpu", "a10", "--num_gpus", "2", "--global_batch_size", "8"]
    assert main(["plan", *argv]) == 2
    printed = capsys.readouterr().out
    assert "Nothing fits" in printed and "GPUs of this kind" in printed and "GPUs with" in printed
    answer = plan(capsys, *argv, expect=2)
    assert answer["layouts"] == [] and answer["closest"]["memory_bytes"]["total"] > 22 * GIB
    enough = answer["enough_gpus"]
    assert enough > 2
    assert plan(capsys, *argv[:5], enough, "--global_batch_size", max(8, enough))["layouts"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu", "h1000"], ["--gpu h1000", "h100, "]),
        (["--tensor_model_parallel_size", "3"], ["num_attention_heads 32", "tensor_model_parallel_size 2"]),
        (["--expert_model_parallel_size", "2"], ["no experts"]),
        (["--num_gpus", "0"], ["--num_gpus"]),
        (["--global_batch_size", "7", "--pipeline_model_parallel_size", "1"], ["--global_batch_size 7"]),
        (["--model", "missing.json"], ["missing.json"]),
        (["--num_gpu", "8"], ["did you mean --num_gpus"]),
    ],
)
def test_mistakes(dense: str, flags: list, words: list, capsys: pytest.CaptureFixture) -> None:
    fixed = ["--context_parallel_size", "1", "--virtual_pipeline_model_parallel_size", "1"]
    argv = {"--model": dense, "--gpu": "h100", "--num_gpus": "8"} | dict(
        zip(flags[::2], flags[1::2], strict=True)
    )
    if "--global_batch_size" in argv:
        fixed += ["--tensor_model_parallel_size", "1"]
    assert main(["plan", *[word for pair in argv.items() for word in pair], *fixed]) == 2
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.err + printed.out


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from mcore_swift.cli.main import main; main(['plan', '--help']); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--num_gpus INTEGER  (required)" in done.stdout and done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_layout_that_is_tried_is_one_that_runs(config: dict) -> None:
    shape = ModelShape.from_config_dict(config)
    wish = Wish(16, 64, Run(sequence_length=4096))
    args = wish.args()
    tried = list(layouts(shape, wish, Cluster(GPUS["h100"], 8)))
    assert len(tried) == len(set(tried)) > 10
    for layout in tried:
        assert layout.world_size == 16 and layout.edp >= 1
        if shape.num_layers % (layout.pp * (layout.vpp or 1)) == 0 and 64 % (layout.dp * layout.pp) == 0:
            assert check_layout(layout, shape, args) == []


def test_laws_of_time() -> None:
    shape = ModelShape.from_config_dict(DENSE)
    cluster = Cluster(GPUS["h100"], 8)

    def time(layout: Layout, **change: object):
        run = dataclasses.replace(Run(num_microbatches=16, sequence_length=4096), **change)
        stages = stages_of(shape, layout, spread_layers(shape.num_layers, layout))
        return step_time(shape, layout, run, stages, cluster)

    once, twice = time(Layout(dp=8)), time(Layout(dp=8), num_microbatches=32)
    assert once.tokens_per_s_per_gpu < twice.tokens_per_s_per_gpu  # the optimizer steps less often
    assert time(Layout(dp=8), recompute=Recompute("full", frozenset())).total > 1.2 * once.total
    assert once.tp == once.cp == once.ep == once.pp == once.bubble_share == 0
    plain, interleaved = time(Layout(pp=4, dp=2)), time(Layout(pp=4, vpp=4, dp=2))
    assert plain.bubble_share == pytest.approx(3 / (16 + 3))
    assert interleaved.bubble_share == pytest.approx(0.75 / (16 + 0.75))
    inside, across = time(Layout(tp=8, sequence_parallel=True)), time(Layout(tp=16, sequence_parallel=True))
    assert across.tp > inside.tp and across.tokens_per_s_per_gpu < inside.tokens_per_s_per_gpu


def test_a_run_that_is_about_to_need_too_much_is_told_so() -> None:
    shape = ModelShape.from_config_dict(DENSE)
    gpu = of_driver("NVIDIA H100 80GB HBM3, 81559 MiB")
    assert gpu.memory_gib == pytest.approx(79.6, abs=0.1) and gpu.hbm_tbs == 3.35
    assert of_driver("Some GPU, 10240 MiB").memory_gib == 10
    words = ["--model", "m", "--dataset", "d", "--num_train_epochs", "1", "--max_length", "8192"]
    args = read(MegatronSftArguments, [*words, "--global_batch_size", "64"]).args
    small = memory_notice(args, shape, 8, gpu)
    assert small is not None and "estimated to need" in small and "estimated to fit" in small
    args = dataclasses.replace(args, tensor_model_parallel_size=4, sequence_parallel=True)
    assert memory_notice(args, shape, 8, gpu) is None
    args = dataclasses.replace(args, tensor_model_parallel_size=2, max_length=12288)
    assert memory_notice(args, shape, 8, gpu, "bfloat16") is None
    assert memory_notice(args, shape, 8, gpu, "float32") is not None  # activations are twice as large
    heavy = {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Et*26|tt|tt|ttL"}
    args = dataclasses.replace(
        args, tensor_model_parallel_size=1, sequence_parallel=False, max_length=8192, **heavy
    )
    assert memory_notice(args, shape, 8, gpu) is not None
    even = dataclasses.replace(args, pipeline_model_parallel_layout=None, recompute_granularity="full")
    assert memory_notice(even, shape, 8, gpu) is None
