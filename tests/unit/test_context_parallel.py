"""Attention over context-parallel ranks (threads here) is attention on one rank, and so are its gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_attention import dense

from mcore_swift.engines.megatron import context_parallel
from mcore_swift.errors import UserError
from mcore_swift.models import collectives
from mcore_swift.models.attention import flex
from mcore_swift.models.attention.blockwise import Form
from mcore_swift.models.attention.exchange import gather_keys, share_heads, unite_heads
from mcore_swift.models.attention.kernels import attend_pieces
from mcore_swift.models.segments import Segments
from mcore_swift.models.specs import choose_cp_comm_type

CPU = torch.device("cpu")


class Rank:
    """A thread's place in a group of threads, with the calls of torch.distributed that attention makes."""

    def __init__(self, rank: int, barrier: threading.Barrier, sent: list):
        self._rank, self._barrier, self._sent = rank, barrier, sent

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self._sent)

    def exchange(self, tensor):
        self._sent[self._rank] = tensor
        self._barrier.wait()
        received = list(self._sent)
        self._barrier.wait()
        return received

    @staticmethod
    def all_gather_into_tensor(out, tensor, group):
        out.copy_(torch.cat(group.exchange(tensor)))

    @staticmethod
    def reduce_scatter_tensor(out, tensor, group):
        out.copy_(sum(sent.chunk(group.size())[group.rank()] for sent in group.exchange(tensor)))

    @staticmethod
    def all_to_all_single(out, tensor, group):
        out.copy_(torch.cat([sent.chunk(group.size())[group.rank()] for sent in group.exchange(tensor)]))

    @staticmethod
    def all_reduce(tensor, group):
        tensor.copy_(sum(group.exchange(tensor.clone())))


def on_ranks(size: int, work) -> list:
    """work(group) on each of `size` threads; results by rank."""
    barrier, sent = threading.Barrier(size, timeout=60), [None] * size

    def run(rank: int):
        try:
            return work(Rank(rank, barrier, sent))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result(60) for future in [pool.submit(run, rank) for rank in range(size)]]


def on_one_rank(inputs, lengths, form):
    """Each segment by the definition; inputs `[s, b, heads, d]`."""
    parts = zip(*(tensor.permute(1, 2, 0, 3).split(lengths, dim=2) for tensor in inputs[:3]), strict=True)
    return torch.cat([dense(*part, form, *inputs[3:]) for part in parts], dim=2).permute(2, 0, 1, 3)


FEATURES = {"plain": {}, "all": {"window": 7, "softcap": 3.0, "sinks": True}}
SHAPES = {"heads": (8, 8, 8, 8), "groups": (8, 2, 8, 8), "latent": (4, 4, 12, 8)}  # heads, groups, dk, dv


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("comm", ["all_gather", "a2a"])
def test_parts_of_rows_give_what_whole_rows_give(comm, shape, features, size, monkeypatch):
    monkeypatch.setattr(collectives, "dist", Rank)
    traits = dict(FEATURES[features])
    heads, groups, dk, dv = SHAPES[shape]
    lengths, b = ([8, 24, 16], 1) if shape == "groups" else ([24], 2)
    form = Form(0.3, traits.get("window"), traits.get("softcap"))
    torch.manual_seed(0)
    sizes = [(sum(lengths), b, heads, dk), (sum(lengths), b, groups, dk), (sum(lengths), b, groups, dv)]
    sizes += [(heads,)] * traits.get("sinks", False)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in sizes]
    expected = on_one_rank(inputs, lengths, form)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)

    def part(group):
        segments = Segments(lengths, CPU, size, group.rank())
        mine = segments.held_by(group.rank())
        own = [tensor.detach()[mine].requires_grad_() for tensor in inputs[:3]]
        sinks = [tensor.detach().clone().requires_grad_() for tensor in inputs[3:]]
        if comm == "a2a":
            shared = share_heads(*own, segments, group)
            assert shared[0].shape == (sum(lengths), b, heads // size, dk)
            some = [tensor.chunk(size)[group.rank()] for tensor in sinks]
            out = unite_heads(attend_pieces(*shared, segments.whole, form, *some), segments, group)
        else:
            keys, values = gather_keys(*own[1:], segments, group)
            out = attend_pieces(own[0], keys, values, segments, form, *sinks)
        return mine, out, torch.autograd.grad((out * weight[mine]).sum(), [*own, *sinks])

    found = on_ranks(size, part)
    assert sorted(torch.cat([mine for mine, *_ in found]).tolist()) == list(range(sum(lengths)))
    for mine, out, own in found:
        # fp64 sums of 24 terms
        torch.testing.assert_close(out, expected[mine], atol=1e-12, rtol=1e-10)
        for actual, right in zip(own[:3], gradients[:3], strict=True):
            torch.testing.assert_close(actual, right[mine], atol=1e-12, rtol=1e-10)
    if "sinks" in traits:
        torch.testing.assert_close(sum(own[3] for *_, own in found), gradients[3], atol=1e-12, rtol=1e-10)


def test_a_rank_holds_a_chunk_from_the_start_and_one_from_the_end_of_each_segment():
    segments = Segments([8, 16], CPU, 2, 1)
    assert segments.held_by(0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert segments.held_by(1).tolist() == [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19]
    assert segments.positions.tolist() == [2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11]
    assert segments.by_rank[segments.natural].tolist() == list(range(24))
    # causal work: keys that the queries of a rank see are as many on every rank
    seen = [
        sum(sum(range(last - n + 1, last + 1)) for n, _, last in Segments([16], CPU, 2, rank).pieces)
        for rank in range(2)
    ]
    assert seen[0] == seen[1]


def test_runs_for_a_kernel_over_many_segments_hold_each_querys_keys():
    segments = Segments([8, 16], CPU, 2, 1)
    runs = segments.for_varlen
    assert runs.queries.tolist() == [0, 2, 4, 8, 12]
    assert runs.keys.tolist() == [0, 4, 10, 18, 30]
    assert (runs.longest_query, runs.longest_key) == (4, 12)
    keys = [runs.index[a:b].tolist() for a, b in zip(runs.keys[:-1], runs.keys[1:], strict=True)]
    assert keys == [[*range(4)], [*range(6)], [*range(8, 16)], [*range(8, 20)]]


def test_lengths_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="4 chunks"):
        Segments([8, 6], CPU, 2, 0)


@pytest.mark.parametrize("features", FEATURES)
def test_flex_attention_is_told_the_same(features, monkeypatch):
    """Uncompiled, as it runs on a CPU: the masks, the soft-capping and the share of the sinks are what is tested."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(flex, "_kernels", lambda: (flex_attention, create_block_mask))
    traits = dict(FEATURES[features])
    sinks = [torch.randn(8)] if traits.pop("sinks", False) else [None]
    form, lengths = Form(0.3, **traits), [8, 24, 16]
    torch.manual_seed(0)
    inputs = [torch.randn(48, 1, heads, 16) for heads in (8, 2, 2)]
    expected = on_one_rank([*inputs, *sinks], lengths, form)
    for rank in range(2):
        segments = Segments(lengths, CPU, 2, rank)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
        out = flex.flex_pieces(query[:, :, segments.held], key, value, segments, form, *sinks)
        # fp32 sums of 24 terms of order 1
        torch.testing.assert_close(out.permute(2, 0, 1, 3), expected[segments.held], atol=1e-5, rtol=0)


def test_the_mean_of_a_microbatch_is_over_all_ranks_tokens(monkeypatch):
    """With --calculate_per_token_loss false: schedules divide sums by counts, and gradients are averaged over ranks."""
    here = threading.local()
    state = SimpleNamespace(
        get_context_parallel_world_size=lambda: here.group.size(),
        get_context_parallel_group=lambda: here.group,
    )
    monkeypatch.setattr(context_parallel, "dist", Rank)
    monkeypatch.setattr(context_parallel, "parallel_state", state)
    sums, counts = [6.0, 0.0, 3.0], [3, 0, 1]

    def mean(group):
        here.group = group
        loss, count = torch.tensor(sums[group.rank()]), torch.tensor(counts[group.rank()])
        scaled, divisor = context_parallel.of_whole_rows(loss, count)
        return (scaled / divisor).item()

    assert sum(on_ranks(3, mean)) / 3 == pytest.approx(9 / 4)


def test_only_transformer_engine_goes_round_in_a_ring():
    assert choose_cp_comm_type(None, "local") == "all_gather"
    assert choose_cp_comm_type("a2a", "local") == "a2a"
    assert choose_cp_comm_type(None, "transformer_engine") == "p2p"
    with pytest.raises(UserError) as refusal:
        choose_cp_comm_type("p2p", "local")
    assert "--cp_comm_type p2p" in str(refusal.value)
    assert "--cp_comm_type all_gather or a2a" in refusal.value.remedy
