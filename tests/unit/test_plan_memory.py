"""Memory by hand, and the laws that any layout obeys."""

import dataclasses

import pytest

from mcore_swift.plan import Layout, ModelShape, active_parameters, parameters
from mcore_swift.plan.gpus import GPUS
from mcore_swift.plan.low_rank import LowRank, four_bit_bytes
from mcore_swift.plan.memory import (
    Recompute,
    Run,
    activation_bytes,
    layer_bytes,
    logit_bytes,
    microbatches_in_flight,
    peak_memory,
    stage_memory,
    stages_of,
)
from mcore_swift.plan.search import spread_layers
from mcore_swift.plan.timing import Cluster, layer_time

DENSE = ModelShape(
    family="llama", num_layers=8, hidden_size=64, ffn_hidden_size=160, num_heads=8, num_query_groups=4,
    head_dim=8, vocab_size=1024,
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE, family="qwen3_moe", num_experts=8, num_experts_per_token=2, moe_ffn_hidden_size=48,
    moe_layers=(True,) * 8,
)  # fmt: skip
RUN = Run(
    num_microbatches=16, sequence_length=128, overhead_bytes=0, recompute=Recompute("none", frozenset())
)


def peak(shape: ModelShape, layout: Layout, run: Run = RUN):
    return peak_memory(shape, layout, run, stages_of(shape, layout, spread_layers(shape.num_layers, layout)))


def test_a_dense_model_on_one_gpu_by_hand() -> None:
    memory = peak(DENSE, Layout())
    count = parameters(DENSE)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 12 * count)
    # each layer and token, in bf16: two norm inputs, two norm outputs, q, k, v, q and k with their
    # positions, output, gate, up, product; a number in fp32 for each head
    layer = 2 * (4 * 64 + (64 + 2 * 32) + (64 + 32) + 64 + 3 * 160) + 4 * 8
    assert layer_bytes(DENSE, Layout(), RUN, False)[0] == layer
    working = 2 * 3 * 160 + 2 * 2 * 64
    assert memory.activations == 128 * (8 * layer + 2 * 2 * 64 + working)
    assert memory.logits == 128 * 1024 * (2 + 4 + 4)


def test_a_plain_mlp_has_two_matrices_and_keeps_two_activations() -> None:
    plain = dataclasses.replace(DENSE, gated=False)
    assert parameters(DENSE) - parameters(plain) == 8 * 64 * 160
    kept = layer_bytes(DENSE, Layout(), RUN, False)[0] - layer_bytes(plain, Layout(), RUN, False)[0]
    assert kept == 2 * 160
    cluster = Cluster(GPUS["h100"], gpus_per_node=8)
    gated_s, plain_s = (
        layer_time(shape, Layout(), RUN, 0, cluster).work - layer_time(thin, Layout(), RUN, 0, cluster).work
        for shape, thin in ((each, dataclasses.replace(each, ffn_hidden_size=0)) for each in (DENSE, plain))
    )
    assert plain_s / gated_s == pytest.approx(2 / 3)


def test_experts_and_their_share_by_hand() -> None:
    layout = Layout(tp=2, ep=4, dp=4, sequence_parallel=True)
    stage = stages_of(MOE, layout, [8])[0]
    memory = stage_memory(MOE, layout, RUN, stage)
    expert = 3 * 64 * 48
    experts = 8 * 8 * expert
    whole = 8 * (8 * 64 + 2 * 64) + 64  # routers and norms
    split = 8 * 64 * (64 + 2 * 32 + 64) + 2 * 1024 * 64
    dense = split / 2 + whole
    assert parameters(MOE) == experts + whole + split
    assert active_parameters(MOE) == parameters(MOE) - 8 * 6 * expert
    assert memory.weights == 2 * (dense + experts / 4)
    assert memory.optimizer == 12 * (dense / 4 + experts / 4 / 2)  # dp 4; edp = 2 * 4 / 4
    # half of the tokens are at a rank between tensor parallel regions, and each is copied for two experts
    inside = 12 * 8 / 2 + 2 * (2 / 2) * (64 + 3 * 48)
    attention = (2 * (64 + 2 * 32 + 64 + 32 + 64) + 4 * 8) / 2
    assert layer_bytes(MOE, layout, RUN, True)[0] == attention + 2 * 4 * 64 / 2 + inside


def test_adapters_beside_frozen_weights_by_hand() -> None:
    layout = Layout(tp=2, ep=4, dp=4, sequence_parallel=True)
    stage, full = stages_of(MOE, layout, [8])[0], peak(MOE, layout)
    run = dataclasses.replace(RUN, adapters=LowRank(4))
    memory = stage_memory(MOE, layout, run, stage)
    # of q, k, v A is whole and B divided, of the output projection the other way round; two experts on a rank
    dense = 8 * 4 * (3 * 64 + (64 + 2 * 32) / 2 + 64 / 2 + 64)
    experts = 8 * 4 * 2 * 3 * (64 + 48)
    assert memory.weights == full.weights + 2 * (dense + experts)
    assert memory.gradients == 4 * (dense + experts)
    assert memory.optimizer == 12 * (dense / 4 + experts / 2)
    assert memory.activations == full.activations
    halved = stage_memory(
        MOE, layout, dataclasses.replace(run, adapters=LowRank(4, four_bit_bytes(True))), stage
    )
    quantized = 8 * (64 * (64 + 2 * 32 + 64) / 2 + 2 * 3 * 64 * 48)
    saved = (2 - 0.5 - (1 + 4 / 256) / 64) * quantized - 2 * 64 * 64 / 2
    assert memory.weights - halved.weights == pytest.approx(saved)


def test_full_recomputation_keeps_the_inputs_of_layers() -> None:
    full = dataclasses.replace(RUN, recompute=Recompute("full", frozenset()))
    assert layer_bytes(DENSE, Layout(), full, False)[0] == 2 * 64
    mlp = dataclasses.replace(RUN, recompute=Recompute("selective", frozenset({"mlp"})))
    kept, working = layer_bytes(DENSE, Layout(), RUN, False)
    assert layer_bytes(DENSE, Layout(), mlp, False) == (kept - 2 * 3 * 160, working + 2 * 3 * 160)


def test_latent_attention_keeps_latents_or_what_is_made_of_them() -> None:
    latent = dataclasses.replace(
        DENSE, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=6,
        num_query_groups=8,
    )  # fmt: skip
    again = dataclasses.replace(RUN, recompute=Recompute("selective", frozenset({"mla_up_proj"})))
    saved = layer_bytes(latent, Layout(), RUN, False)[0] - layer_bytes(latent, Layout(), again, False)[0]
    assert saved == 2 * 8 * (8 + 8 + 6)  # queries, keys and values of each head


@pytest.mark.parametrize(
    "layout, rank, expected",
    [
        (Layout(), 0, 1),
        (Layout(pp=4), 0, 4),
        (Layout(pp=4), 3, 1),
        (Layout(pp=4, vpp=2), 0, (2 * 3 + 4 + 1) / 2),  # (1 + (p - 1) / (p m)) p, of Korthikanti et al.: 5.5
        (Layout(pp=4, vpp=2), 3, (0 + 4 + 1) / 2),
    ],
)
def test_microbatches_in_flight(layout: Layout, rank: int, expected: float) -> None:
    assert microbatches_in_flight(layout, rank, 64) == expected
    assert microbatches_in_flight(layout, rank, 1) == 1


def test_the_loss_may_make_the_last_stage_the_worst() -> None:
    layout = Layout(pp=2)
    wide = dataclasses.replace(DENSE, vocab_size=1024 * 128)
    narrow = dataclasses.replace(DENSE, vocab_size=64)
    assert peak(wide, layout).stage == 1 and peak(narrow, layout).stage == 0
    assert logit_bytes(wide, layout, RUN) == 128 * logit_bytes(DENSE, layout, RUN)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_more_ranks_need_less_each(shape: ModelShape) -> None:
    for axis in ("tp", "pp", "cp", "ep"):
        if axis == "ep" and not shape.is_moe:
            continue
        sizes = [
            peak(shape, Layout(**{"dp": 8} | {axis: size}, sequence_parallel=axis == "tp"))
            for size in (1, 2, 4)
        ]
        for more, less in zip(sizes, sizes[1:], strict=False):
            assert less.total < more.total, axis
            if axis in ("tp", "pp", "ep"):
                assert less.weights < more.weights and less.gradients < more.gradients
            if axis in ("tp", "cp"):
                assert less.activations < more.activations
            if axis == "cp":
                assert less.weights == more.weights and less.optimizer < more.optimizer


def test_what_the_flags_save() -> None:
    base = peak(DENSE, Layout(dp=4))
    for change in (
        {"distributed_optimizer": False},
        {"optimizer_states": 1},
        {"gradient_bytes": 2},
        {"weight_bytes": 4},
    ):
        other = peak(DENSE, Layout(dp=4), dataclasses.replace(RUN, **change))
        assert other.total != base.total
    assert peak(DENSE, Layout(dp=4), dataclasses.replace(RUN, distributed_optimizer=False)).optimizer == (
        4 * base.optimizer
    )
    # fp32 weights are their own main weights
    single = peak(DENSE, Layout(), dataclasses.replace(RUN, weight_bytes=4))
    assert single.optimizer == 8 * parameters(DENSE)


def test_tied_embeddings_are_one_table_on_one_stage_and_two_on_several() -> None:
    tied = dataclasses.replace(DENSE, tied=True)
    assert peak(tied, Layout()).weights == 2 * parameters(tied)
    both = [stage_memory(tied, Layout(pp=2), RUN, stage) for stage in stages_of(tied, Layout(pp=2), [4, 4])]
    assert sum(memory.weights for memory in both) == 2 * (parameters(tied) + 1024 * 64)


def test_stages_hold_all_layers_once() -> None:
    for layout in (Layout(pp=3), Layout(pp=2, vpp=2), Layout(pp=5)):
        counts = spread_layers(DENSE.num_layers, layout)
        assert sum(counts) == 8 and max(counts) - min(counts) <= 1
        held = sum(count for stage in stages_of(DENSE, layout, counts) for _, count in stage.kinds)
        assert held == 8
    assert spread_layers(8, Layout(pp=3)) == [3, 3, 2]  # the loss is work too
    assert activation_bytes(DENSE, Layout(pp=2), RUN, stages_of(DENSE, Layout(pp=2), [4, 4])[0]) > 0
