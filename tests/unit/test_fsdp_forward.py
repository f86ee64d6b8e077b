"""Around the forward pass of a transformers model: its loss, samples taken out of a row, names in files."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from mcore_swift.data.batch import Batch
from mcore_swift.engines.fsdp import token_nll
from mcore_swift.engines.fsdp.forward import Forward, samples_of, unpacked
from mcore_swift.engines.fsdp.model import blocks_of, untied
from mcore_swift.engines.fsdp.rope_lengths import length_limit
from mcore_swift.engines.fsdp.weights import names_on_disk
from mcore_swift.errors import UserError
from mcore_swift.models.without_memory import parameters_on_meta

LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "original_max_position_embeddings": 4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}


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
    rows = unpacked(batch, mask.reshape(-1).nonzero().squeeze(-1), *samples_of(batch))
    assert rows.input_ids.tolist() == [[7, 8, 9], [4, 5, 0]]
    assert rows.position_ids is None, "the model's own"
    assert rows.learnt.tolist() == [1, 3] and rows.places.tolist() == [1, 3]


def padded_batch(ids: list[list[int]]) -> Batch:
    """Rows padded with 9; a loss on every token but the last of each."""
    width = max(map(len, ids))
    rows = torch.tensor([row + [9] * (width - len(row)) for row in ids])
    lengths = torch.tensor([[len(row)] for row in ids])
    columns = torch.arange(width).expand(len(ids), width)
    mask = (columns < lengths - 1).float()
    labels = torch.where(mask > 0, rows.roll(-1, 1), 0)
    total = int(lengths.sum())
    return Batch(rows, labels, mask, columns, None, None, len(ids), total, columns >= lengths)


def tiny(architecture: str, **settings):
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=1, **settings
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def losses_alone(model, batch: Batch) -> torch.Tensor:
    """transformers' losses of each sample by itself, in the order of the batch's learnt places."""
    found = []
    for ids, labels, mask, padding in zip(
        batch.input_ids, batch.labels, batch.loss_mask, batch.padding, strict=True
    ):
        length = int((~padding).sum())
        nll = cross_entropy(model(ids[None, :length]).logits[0], labels[:length], reduction="none")
        found.append(nll[mask[:length] > 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Roberta", {"is_decoder": True}),  # positions begin behind the padding token's id
        (
            "Phi3",
            {"original_max_position_embeddings": 4, "rope_parameters": LONG},
        ),  # other angles beyond 4 tokens
    ],
)
def test_a_sample_in_a_batch_has_transformers_own_loss(architecture, settings):
    model = tiny(architecture, **settings)
    batch = padded_batch([[3, 5, 2, 7, 8, 6, 4], [4, 2, 6], [5, 8, 2, 3, 3, 5]])
    limit = length_limit(model.config, max_length=7)
    assert limit == (4 if architecture == "Phi3" else None)
    nll = Forward(model, "sdpa", length_limit=limit).token_nll(batch)
    expected = losses_alone(model, batch)
    assert torch.allclose(nll[batch.loss_mask > 0], expected, rtol=1e-5), "sums of fp32 in another order"


def test_angles_that_depend_on_the_length_of_other_texts_are_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = tiny("Llama", max_position_embeddings=8, rope_parameters=dynamic).config
    assert length_limit(config, 8) is None
    with pytest.raises(UserError, match=r"--max_length 9: beyond 8 tokens (.|\n)*use --max_length 8"):
        length_limit(config, 9)


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    with pytest.raises(UserError, match='is not causal.*\n.*"is_decoder": true'):
        Forward(tiny("Bert"), "sdpa").settle([padded_batch([[3, 5, 2]])])


def test_samples_are_taken_apart_for_layers_that_count_from_the_start_of_a_row():
    """Llama 4's chunks are too long to be tried out; windows are not."""
    packed = replace(padded_batch([[3, 5, 2]]), cu_seqlens=torch.tensor([0, 3]))
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 16, "head_dim": 8, "attention_chunk_size": 64}
    windows = {"use_sliding_window": True, "max_window_layers": 1}
    for architecture, settings, apart in (("Llama4Text", experts, False), ("Qwen2", windows, True)):
        forward = Forward(tiny(architecture, num_key_value_heads=2, **settings), "sdpa")
        forward.settle([packed])
        assert forward._keeps_apart is apart


def test_a_tied_parameter_is_gathered_in_one_place():
    """BERT's embeddings are a block of their own, and its output layer has their matrix."""
    model = tiny("Bert", is_decoder=True)
    blocks = blocks_of(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.embeddings in blocks
    assert untied(blocks, model) == [block for block in blocks if block is not model.bert.embeddings]


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
