"""Command lines that cannot run: each is refused with its reason, and what the message says to do instead runs."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_swift.config import MegatronPretrainArguments, parse
from mcore_swift.config.plan import PlanArguments
from mcore_swift.errors import UserError, UserErrors
from mcore_swift.plan import preflight
from mcore_swift.plan.planner import make_plan

SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 4, "vocab_size": 101, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "dense": SIZES | {"architectures": ["Qwen3ForCausalLM"]},
    "experts": SIZES
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    },
    "predicting": SIZES
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_nextn_predict_layers": 1,
    },
}
NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
    "batch": "global_batch_size",
    "micro": "micro_batch_size",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
    "letters": "pipeline_model_parallel_layout",
    "embedding": "account_for_embedding_in_pipeline_split",
    "exchange": "cp_comm_type",
    "mtp": "mtp_num_layers",
}
LAYOUT = ("tp", "pp", "vpp", "cp", "ep", "etp", "sp")
Flags = dict[str, object]

# model, processes, flags, words of the reason
IMPOSSIBLE: list[tuple[str, int, Flags, str]] = [
    ("dense", 3, {"tp": 3}, "does not divide the model's num_key_value_heads 4"),
    ("dense", 8, {"tp": 8}, "num_attention_heads 12, num_key_value_heads 4"),
    ("predicting", 2, {"tp": 5, "sp": "true"}, "intermediate_size 96"),
    ("dense", 4, {"pp": 4}, "does not divide the model's 6 layers"),
    ("dense", 8, {"pp": 8}, "does not divide the model's 6 layers"),
    ("dense", 4, {"pp": 2, "vpp": 2}, "does not divide the 3 layers of each pipeline stage"),
    ("dense", 2, {"vpp": 2}, "needs a pipeline"),
    ("dense", 2, {"pp": 2, "vpp": 3, "batch": 3}, "3 microbatches, and an interleaved pipeline of 2 stages"),
    ("dense", 2, {"pp": 2, "first": 6}, "0 of the model's 6 layers are left"),
    ("dense", 3, {"pp": 3, "first": 1, "last": 6}, "which 1 stage cannot share"),
    ("dense", 2, {"pp": 2, "embedding": "true"}, "6 layers + 1"),
    ("dense", 2, {"pp": 2, "letters": "Ett|ttL"}, "has 4 decoder layers (t), and the model has 6"),
    ("dense", 1, {"letters": "EttttttL"}, "needs a pipeline"),
    ("predicting", 2, {"pp": 2, "letters": "Ettt|tttL"}, "0 layers of multi-token prediction (m)"),
    (
        "predicting",
        4,
        {"pp": 4, "letters": "Ettttttm|L||"},
        "is in stage 1, and must be in one of the last 3",
    ),
    ("predicting", 1, {"mtp": 2}, "the model has 1 multi-token layers"),
    ("dense", 2, {"tp": 4}, "2 processes cannot be divided into copies of 4"),
    ("dense", 6, {"tp": 4}, "6 processes cannot be divided into copies of 4"),
    ("experts", 7, {"tp": 2, "ep": 2, "sp": "true"}, "7 processes cannot be divided"),
    ("dense", 6, {"cp": 4}, "6 processes cannot be divided into copies of 4 (TP1·PP1·CP4)"),
    ("dense", 8, {"cp": 8, "exchange": "a2a"}, "does not divide num_attention_heads 12"),
    ("dense", 2, {"ep": 2}, "this model has no experts"),
    ("experts", 4, {"ep": 4}, "does not divide the model's 6 experts"),
    ("experts", 4, {"ep": 3}, "does not divide the 4 processes of a pipeline stage"),
    ("experts", 4, {"etp": 8}, "does not divide the 20 wide experts"),
    ("experts", 2, {"ep": 2, "etp": 2}, "= 4 does not divide the 2 processes of a pipeline stage"),
    ("experts", 2, {"tp": 2}, "needs sequence parallelism"),
    (
        "experts",
        1,
        {"moe_expert_capacity_factor": 4, "moe_pad_expert_input_to_capacity": "true"},
        "beyond all tokens",
    ),
    ("dense", 5, {"batch": 16}, "is no multiple of 5"),
    ("dense", 4, {"batch": 6, "micro": 2}, "is no multiple of 8"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def problems(model: Path, processes: int, flags: Flags) -> str:
    """What `megatron pt` says of it before any process starts; nothing if it would run."""
    given = {"batch": 24, "train_iters": 1} | flags
    argv = [part for name, value in given.items() for part in (f"--{NAMES.get(name, name)}", str(value))]
    argv += ["--model", str(model), "--dataset", "data.jsonl", "--perform_initialization", "true"]
    try:
        args = parse(MegatronPretrainArguments, argv, notify=lambda notice: None)
    except (UserError, UserErrors) as error:
        return str(error)
    return "\n".join(map(str, preflight(args, processes)))


def remedies(text: str, processes: int, flags: Flags) -> Iterator[tuple[int, Flags]]:
    """The changes that a message names, as (processes, flags)."""
    plain = {name: value for name, value in flags.items() if name not in LAYOUT}
    for layout in re.findall(r"nearest layout for this model on \d+ processes is (\S+)", text):
        sizes = dict(re.findall(r"([A-Z]+?)(\d+)(?:·|$)", layout.replace("SP", "SP1")))
        named = {name.lower(): size for name, size in sizes.items() if name != "DP"}
        yield processes, plain | named | ({"sp": "true"} if "SP" in layout else {})
    for change in re.findall(r"(?:nearest possible is|add|use|give) ((?:--\w+ (?:'[^']+'|\w+),? ?)+)", text):
        words = shlex.split(change.replace(",", ""))
        yield processes, flags | _short(dict(zip(words[::2], words[1::2], strict=True)))
    for flag in re.findall(r"(?:leave|drop) --(\w+)", text):
        yield processes, {name: value for name, value in flags.items() if NAMES.get(name, name) != flag}
    for count in re.findall(r"start (\d+)", text):
        yield int(count), flags


def _short(flags: dict[str, str]) -> Flags:
    short = {f"--{long}": name for name, long in NAMES.items()}
    return {short.get(flag, flag.removeprefix("--")): value for flag, value in flags.items()}


@pytest.mark.parametrize(
    "model, processes, flags, reason", IMPOSSIBLE, ids=lambda value: str(value).replace(" ", "")[:40]
)
def test_refused_with_the_reason_and_something_near_that_runs(models, model, processes, flags, reason):
    text = problems(models / model, processes, flags)
    assert reason in text
    changes = list(remedies(text, processes, flags))
    assert changes, text
    # of several mistakes each has a remedy, and the layout at the end is for all of them
    assert "" in [problems(models / model, *change) for change in changes], text


@pytest.mark.parametrize(
    "model, flags, reason, nearest",
    [
        ("dense", {"tp": 3}, "num_key_value_heads 4", "on 8 processes is TP4·SP·DP2"),
        ("dense", {"pp": 5}, "6 layers", "on 8 processes is PP2·DP4"),
        ("dense", {"vpp": 2, "pp": 1}, "needs a pipeline", "on 8 processes is DP8"),
        (
            "dense",
            {"vpp": 8, "pp": 2},
            "does not divide the 3 layers",
            "--virtual_pipeline_model_parallel_size 3",
        ),
        ("experts", {"ep": 4}, "6 experts", "expert_model_parallel_size 2"),
        ("dense", {"tp": 2, "pp": 2, "cp": 4}, "copies of 16", "start 16 processes"),
        ("dense", {"batch": 4, "micro": 3}, "no multiple of 24", "--global_batch_size 24"),
    ],
)
def test_plan_refuses_sizes_that_leave_no_layout(models, model, flags, reason, nearest):
    argv = [part for name, value in flags.items() for part in (f"--{NAMES[name]}", str(value))]
    argv += ["--model", str(models / model), "--gpu", "h100", "--num_gpus", "8"]
    with pytest.raises((UserError, UserErrors)) as refused:
        make_plan(parse(PlanArguments, argv, notify=lambda notice: None))
    assert reason in str(refused.value) and nearest in str(refused.value)
