"""Rank maps: laws that any division of processes obeys, and agreement with megatron-core's."""

from types import SimpleNamespace

import pytest

from mcore_swift.plan import Layout

LAYOUTS = [
    Layout(),
    Layout(tp=2, dp=3),
    Layout(tp=2, pp=2, vpp=2, dp=2, sequence_parallel=True),
    Layout(tp=2, pp=3, cp=2, dp=2),
    Layout(tp=2, pp=2, cp=2, ep=4, etp=1, dp=2),
    Layout(tp=4, pp=2, ep=2, etp=2, dp=2),
    Layout(pp=4, cp=3, ep=3, dp=1),
]
KINDS = {
    "tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "mp": "tp-pp", "dp_cp": "dp-cp", "tp_cp": "tp-cp",
}  # fmt: skip
EXPERT_KINDS = {"etp": "tp", "ep": "ep", "edp": "dp"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *EXPERT_KINDS])
def test_every_rank_is_in_exactly_one_group_of_each_kind(layout: Layout, kind: str) -> None:
    groups = layout.groups(kind)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert len({len(group) for group in groups}) == 1
    assert all(layout.group_of(kind, rank) == group for group in groups for rank in group)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_megatron_cores(layout: Layout) -> None:
    from megatron.core.parallel_state import RankGenerator

    dense = RankGenerator(
        tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp"
    )
    expert = RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order="tp-cp-ep-dp-pp"
    )
    for kind, token in KINDS.items():
        assert layout.groups(kind) == dense.get_ranks(token), kind
    for kind, token in EXPERT_KINDS.items():
        assert layout.groups(kind) == expert.get_ranks(token), kind


def test_a_case_by_hand() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.coordinates(6) == {"tp": 0, "cp": 0, "dp": 1, "pp": 1}
    assert (layout.world_size, layout.model_parallel_size) == (8, 4)
    with pytest.raises(IndexError):
        layout.coordinates(8)
    with pytest.raises(KeyError):
        layout.groups("xp")


def test_names() -> None:
    assert str(Layout()) == "DP1"
    assert str(Layout(tp=2)) == "TP2"
    assert str(Layout(tp=2, pp=2, vpp=2, dp=2, sequence_parallel=True)) == "TP2·PP2·VPP2·SP·DP2"


def test_experts_that_do_not_divide_a_stage() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        Layout(tp=2, dp=2, ep=3).groups("ep")


def test_from_args_takes_what_is_left_for_data_parallelism() -> None:
    args = SimpleNamespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )
    layout = Layout.from_args(args, 8)
    assert (layout.dp, layout.world_size) == (4, 8)
    assert not layout.sequence_parallel  # nothing to split at TP 1
    args.tensor_model_parallel_size = 3
    assert Layout.from_args(args, 8).world_size == 6  # what divides; the check says so
