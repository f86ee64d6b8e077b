"""Refused layouts: the reason, the nearest possible one, and that it is possible."""

import re
from types import SimpleNamespace

import pytest

from mcore_swift.plan import Layout, ModelShape, check_layout, nearest_layout, notices

SHAPE = ModelShape(
    family="qwen3", num_layers=12, hidden_size=64, ffn_hidden_size=192, num_heads=12,
    num_query_groups=4, head_dim=16, vocab_size=997, max_position_embeddings=512,
)  # fmt: skip


def args_of(**values: int | bool | None) -> SimpleNamespace:
    flags = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "global_batch_size": 24,
        "max_length": None,
    }
    return SimpleNamespace(**flags | values)


def problems_of(world_size: int, **values: int | bool | None) -> list[str]:
    args = args_of(**values)
    return [
        str(problem) for problem in check_layout(Layout.from_args(args, world_size), SHAPE, args, world_size)
    ]


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (1, {}),
        (
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        ),  # 997 tokens are padded, no problem
        (4, {"tensor_model_parallel_size": 4}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (6, {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 4}),
        (16, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "global_batch_size": 6}),
    ],
)
def test_layouts_that_run(world_size: int, flags: dict) -> None:
    assert problems_of(world_size, **flags) == []


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        # 4 key/value heads, 12 heads, 192: common divisors 1, 2, 4
        (3, {"tensor_model_parallel_size": 3}, ["num_key_value_heads 4", "tensor_model_parallel_size 2"]),
        (8, {"tensor_model_parallel_size": 8}, ["num_attention_heads 12", "tensor_model_parallel_size 4"]),
        (5, {"pipeline_model_parallel_size": 5}, ["12 layers", "pipeline_model_parallel_size 4"]),
        (
            4,
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            ["3 layers of each", "virtual_pipeline_model_parallel_size"],
        ),
        (2, {"virtual_pipeline_model_parallel_size": 2}, ["needs a pipeline"]),
        (6, {"tensor_model_parallel_size": 4}, ["6 processes", "TP4·PP1·CP1", "start 4 or 8"]),
        (2, {"tensor_model_parallel_size": 4}, ["2 processes", "start 4 processes", "is TP2"]),
        (2, {"expert_model_parallel_size": 2}, ["no experts"]),
        (2, {"global_batch_size": 5}, ["no multiple of 2", "4 or 6"]),
        (2, {"global_batch_size": 1, "micro_batch_size": 2}, ["no multiple of 4", "global_batch_size 4"]),
        (
            4,
            {
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 3,
                "global_batch_size": 6,
            },
            ["6 microbatches", "4 at a time", "4 or 8"],
        ),
    ],
)
def test_refusals_name_the_flag_and_the_nearest_possible(world_size: int, flags: dict, words: list) -> None:
    text = "\n".join(problems_of(world_size, **flags))
    for word in words:
        assert word in text
    assert re.search(r"--\w+|processes", text)


def test_problems_come_together() -> None:
    problems = problems_of(8, tensor_model_parallel_size=3, pipeline_model_parallel_size=5)
    assert len(problems) == 3  # heads, layers, processes
    assert "the nearest layout for this model on 8 processes is TP2·PP4" in problems[-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 8, 24])
def test_the_nearest_layout_is_possible(world_size: int) -> None:
    for tp in range(1, 7):
        for pp in range(1, 7):
            for vpp in (None, 2):
                asked = Layout(tp=tp, pp=pp, vpp=vpp, dp=max(1, world_size // (tp * pp)))
                args = args_of()
                nearest = nearest_layout(asked, SHAPE, args, world_size)
                assert nearest is not None and nearest.world_size == world_size
                assert check_layout(nearest, SHAPE, args, world_size) == []
                if not check_layout(asked, SHAPE, args, world_size):
                    assert nearest == asked


def test_a_length_beyond_the_models_positions_is_a_notice() -> None:
    assert "512" in notices(SHAPE, args_of(max_length=1024))[0]
    assert notices(SHAPE, args_of(max_length=512)) == []
