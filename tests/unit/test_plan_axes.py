"""Context, expert and expert-tensor parallelism: what is refused, why, and what would be possible."""

from itertools import product
from types import SimpleNamespace

import pytest

from mcore_swift.plan import Layout, ModelShape, check_layout, nearest_layout, notices

MOE = ModelShape(
    family="qwen3_moe", num_layers=12, hidden_size=64, ffn_hidden_size=192, num_heads=12, num_query_groups=4,
    head_dim=16, vocab_size=997, num_experts=6, num_experts_per_token=2, moe_ffn_hidden_size=40,
    moe_layers=(True,) * 12,
)  # fmt: skip
SHARED = {"shared_ffn_hidden_size": 30}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "num_query_groups": 12}
NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def args_of(**values: object) -> SimpleNamespace:
    flags = dict.fromkeys(NAMES.values(), 1) | {
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": True,
        "micro_batch_size": 1,
        "global_batch_size": 24,
        "max_length": None,
        "cp_comm_type": None,
    }
    short = {NAMES.get(name, name): value for name, value in values.items()}
    return SimpleNamespace(**flags | short)


def text_of(world_size: int, shape: ModelShape = MOE, **values: object) -> str:
    args = args_of(**values)
    return "\n".join(map(str, check_layout(Layout.from_args(args, world_size), shape, args, world_size)))


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (2, {"ep": 2}),
        (6, {"ep": 6}),
        (4, {"tp": 2, "ep": 2, "etp": 2}),
        (8, {"tp": 2, "cp": 2, "ep": 2, "etp": 4}),
        (4, {"cp": 4, "ep": 2, "cp_comm_type": "a2a"}),
        (4, {"cp": 4, "cp_comm_type": ["all_gather"]}),
        (3, {"cp": 3, "cp_comm_type": "a2a"}),  # 4 key heads become 12
        (12, {"pp": 2, "ep": 3, "etp": 2}),
    ],
)
def test_layouts_that_run(world_size: int, flags: dict) -> None:
    assert text_of(world_size, **flags) == ""


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        (4, {"ep": 4}, ["6 experts", "expert_model_parallel_size 2", "nearest layout", "is EP2·DP4"]),
        (4, {"etp": 3}, ["40 wide", "expert_tensor_parallel_size 2"]),
        (
            4,
            {"ep": 3},
            ["3 x --expert_tensor_parallel_size 1 = 3 does not divide the 4", "expert_model_parallel_size 2"],
        ),
        (8, {"pp": 4, "ep": 2, "etp": 2}, ["TP1 x CP1 x DP2", "nearest"]),
        (2, {"tp": 2, "sequence_parallel": False}, ["--sequence_parallel true", "megatron-core"]),
        (
            8,
            {"cp": 8, "cp_comm_type": "a2a"},
            ["num_attention_heads 12 / TP 1 = 12", "context_parallel_size 6"],
        ),
        (
            8,
            {"tp": 4, "cp": 2, "cp_comm_type": ["a2a"]},
            ["num_attention_heads 12 / TP 4 = 3", "context_parallel_size 1"],
        ),
    ],
)
def test_refusals_name_the_flag_and_the_nearest_possible(world_size: int, flags: dict, words: list) -> None:
    text = text_of(world_size, **flags)
    for word in words:
        assert word in text


def test_dense_models_have_nothing_to_spread() -> None:
    dense = ModelShape(**{**vars(MOE), "num_experts": 0, "moe_layers": ()})
    assert "no experts" in text_of(2, dense, ep=2) and "is DP2" in text_of(2, dense, ep=2)
    assert text_of(2, dense, tp=2, sequence_parallel=False) == ""


def test_tensor_parallelism_divides_what_there_is() -> None:
    assert "intermediate_size" not in text_of(8, tp=8)  # every layer has experts
    shared = ModelShape(**{**vars(MOE), **SHARED})
    assert "shared experts 30" in text_of(4, shared, tp=4)
    latent = ModelShape(**{**vars(MOE), **LATENT})
    assert text_of(12, latent, tp=12) == ""  # keys and values are made for every head


def test_export_needs_no_sequence_parallelism() -> None:
    args = args_of(tp=2, sequence_parallel=False, global_batch_size=None)
    assert check_layout(Layout.from_args(args, 2), MOE, args, 2) == []


def test_the_nearest_layout_is_possible() -> None:
    for world_size, tp, cp, ep, etp in product((1, 4, 12, 16), (1, 2, 3), (1, 2), (1, 2, 4, 5), (1, 2, 3)):
        asked = Layout(tp=tp, cp=cp, ep=ep, etp=etp, dp=max(1, world_size // (tp * cp)))
        args = args_of()
        nearest = nearest_layout(asked, MOE, args, world_size)
        assert nearest is not None and nearest.world_size == world_size
        assert check_layout(nearest, MOE, args, world_size) == []


def test_lengths_that_are_padded() -> None:
    (line,) = notices(MOE, args_of(max_length=1001, cp=2, tp=2, sequence_parallel=True))
    assert "multiple of 8" in line and "padded to 1008" in line
    assert notices(MOE, args_of(max_length=1008, cp=2, tp=2)) == []
