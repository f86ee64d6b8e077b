"""Around the forward pass of a transformers model: its loss, samples taken out of a row, names in files."""

import torch
from torch.nn.functional import cross_entropy

from mcore_swift.data.batch import Batch
from mcore_swift.engines.fsdp import token_nll
from mcore_swift.engines.fsdp.forward import unpacked
from mcore_swift.engines.fsdp.weights import names_on_disk
from mcore_swift.models.without_memory import parameters_on_meta


def test_the_loss_and_its_gradient_are_torchs_own_in_any_chunks(monkeypatch):
    monkeypatch.setattr(token_nll, "_CHUNK", 3 * 11)  # rows of 11, three at a time
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64).requires_grad_()
    labels, weights = torch.randint(11, (7,)), torch.rand(7)
    expected = cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    found = token_nll.nll_of_logits(logits, labels)
    (own,) = torch.autograd.grad((found * weights).sum(), logits)
    assert torch.allclose(found.double(), expected, rtol=1e-6)  # fp32 inside
    assert torch.allclose(own, gradient, atol=1e-6)
    nothing = token_nll.nll_of_logits(logits[:0], labels[:0])
    assert nothing.shape == (0,) and torch.autograd.grad(nothing.sum(), logits)[0].eq(0).all()


def test_samples_of_a_row_become_rows_and_padding_is_left_out():
    row = torch.tensor([[7, 8, 9, 4, 5, 0, 0]])
    mask = torch.tensor([[0.0, 1, 0, 1, 0, 0, 0]])
    batch = Batch(
        row, row, mask, row, torch.tensor([0, 3, 5, 7], dtype=torch.int32), 3, num_samples=2, num_tokens=5
    )
    rows = unpacked(batch, mask.reshape(-1).nonzero().squeeze(-1))
    assert rows.input_ids.tolist() == [[7, 8, 9], [4, 5, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert rows.learnt.tolist() == [1, 3] and rows.places.tolist() == [1, 3]


def test_names_in_files_may_lack_the_prefix_of_the_model():
    class Model:
        base_model_prefix = "transformer"

    wanted = {"transformer.wte.weight": (5, 2), "lm_head.bias": (5,)}
    stored = {"wte.weight": (5, 2), "lm_head.bias": (5,), "unused": (1,)}
    assert names_on_disk(wanted, stored, Model()) == {
        "transformer.wte.weight": "wte.weight",
        "lm_head.bias": "lm_head.bias",
    }
    assert names_on_disk(wanted | {"more": (1,)}, stored, Model()) is None
    assert names_on_disk(wanted | {"lm_head.bias": (6,)}, stored, Model()) is None


def test_a_model_is_declared_without_memory_but_with_its_buffers():
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

    with parameters_on_meta():
        block = Block()
    assert all(parameter.is_meta for parameter in block.parameters())
    assert block.frequencies.tolist() == [0, 1, 2]
    assert not torch.nn.Linear(2, 2).weight.is_meta, "and nothing after it"
