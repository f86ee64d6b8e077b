"""Which ranks draw the same random numbers."""

import pytest
import torch

from mcore_swift.engines.megatron import process_groups


def drawn(monkeypatch, *, tp: int = 0, pp: int = 0, replica: int = 0) -> torch.Tensor:
    """What a rank at this place draws outside of tensor-parallel regions."""
    places = {
        "get_tensor_model_parallel_rank": lambda: tp,
        "get_pipeline_model_parallel_rank": lambda: pp,
        "get_data_parallel_rank": lambda with_context_parallel: replica,
    }
    for name, place in places.items():
        monkeypatch.setattr(process_groups.parallel_state, name, place)
    monkeypatch.setattr(process_groups, "model_parallel_cuda_manual_seed", lambda *args, **more: None)
    process_groups.seed_everything(5)
    return torch.rand(4)


@pytest.mark.parametrize("place", [{"pp": 1}, {"replica": 1}, {"replica": 17, "pp": 3}])
def test_stages_and_replicas_draw_their_own(monkeypatch, place):
    assert not torch.equal(drawn(monkeypatch), drawn(monkeypatch, **place))


def test_tensor_parallel_ranks_draw_the_same(monkeypatch):
    assert torch.equal(drawn(monkeypatch), drawn(monkeypatch, tp=1))
