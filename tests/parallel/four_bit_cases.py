"""Cases of the adapters' grid beside weights in 4 bits (QLoRA)."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from parity_job import ADAM_EPS, LOGITS_ATOL, own_batches, possible, start

from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.models.shards import live_shards
from mcore_swift.objectives.sft import NextToken
from mcore_swift.plan import Layout
from mcore_swift.tuners.attach import adapter_shards
from mcore_swift.tuners.quantized import quantized_layers

FLAGS = {"tuner_type": "lora", "quant_method": "bnb", "quant_bits": 4}


def four_bit_cases(
    folder: Path, layouts: Iterable[Layout], engine_with: Callable
) -> dict[str, Callable[[], None]]:
    """In layouts that divide layers or weights a model that they can divide, packed or with recomputation."""
    cases = {}
    dividing = [
        layout for layout in layouts if layout.cp == 1 and (layout.tp == 1 or layout.sequence_parallel)
    ]
    for number, layout in enumerate(dividing):
        variant = "qwen3-moe" if layout.ep > 1 or (layout.etp or 1) > 1 else "qwen3"
        if possible(layout, folder / variant):
            packed = bool(number % 2)
            engines = partial(engine_with, folder / variant, folder / variant / "all/adapter", layout, packed)
            batches = partial(own_batches, _samples(folder / variant), packed, layout)
            cases[f"{variant} 4 bits {layout}"] = partial(
                is_the_model_of_rounded_weights, engines, batches, layout
            )
    layout = Layout(dp=2)
    engines = partial(engine_with, folder / "qwen3", folder / "qwen3/some/adapter", layout, False)
    batches = partial(own_batches, _samples(folder / "qwen3"), False, layout)
    cases["4 bits as transformers and peft"] = partial(
        agrees_with_transformers, engines, batches, folder / "qwen3"
    )
    return cases


def _samples(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "all/reference.pt", weights_only=False).samples


def is_the_model_of_rounded_weights(
    engine_of: Callable[..., MegatronEngine], batches_of: Callable, layout: Layout
) -> None:
    """Logits and a step of A and B are those of plain layers that hold what 4 bits stand for, digit for digit."""
    start(layout)
    four, plain = engine_of(**FLAGS), engine_of(tuner_type="lora")
    rounded = sum(shard.data.is_meta for shard in live_shards(four.chunks))
    quantized = quantized_layers(four.chunks)
    assert rounded >= len(quantized) > 0, "and nothing of them stays in full precision"
    layers = [module for chunk in plain.chunks for module in _linears(chunk)]
    for layer, ours in zip(layers, quantized, strict=True):
        assert not torch.equal(layer.weight, ours.dense())
        assert (layer.weight - ours.dense()).norm() < 0.2 * layer.weight.norm(), "rounded, and in its place"
        layer.weight.data.copy_(ours.dense())
    batches, _ = batches_of()
    for found, expected in zip(four.logits(batches), plain.logits(batches), strict=True):
        assert torch.equal(found, expected)
    results = [
        engine.train_step(batches, NextToken(), lr=ADAM_EPS, weight_decay=0.0) for engine in (four, plain)
    ]
    assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
    for found, expected in zip(adapter_shards(four.chunks), adapter_shards(plain.chunks), strict=True):
        assert found.key == expected.key and torch.equal(found.data, expected.data)
    for ours, theirs in zip(four.adapted, plain.adapted, strict=True):
        assert torch.equal(ours.merged(), theirs.merged()), "merging adds to what the 4 bits stand for"


def _linears(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    kinds = ("ColumnParallelLinear", "RowParallelLinear", "ExpertRowLinear")
    named = [(name, module) for name, module in chunk.named_modules() if type(module).__name__ in kinds]
    return [module for name, module in named if "linear_" in name]


def agrees_with_transformers(
    engine_of: Callable[..., MegatronEngine], batches_of: Callable, folder: Path
) -> None:
    """Logits equal those of transformers' model with bitsandbytes' layers, some of them with peft's adapters."""
    import peft
    import transformers

    start(Layout(dp=2))
    engine = engine_of(**FLAGS)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config)
    adapted = peft.PeftModel.from_pretrained(model, folder / "some/adapter").eval()
    batches, _ = batches_of()
    for rows, batch in zip(engine.logits(batches), batches, strict=True):
        with torch.no_grad():
            expected = adapted(input_ids=batch.input_ids).logits
        learnt = batch.loss_mask.bool()
        torch.testing.assert_close(rows[learnt], expected[learnt], atol=LOGITS_ATOL, rtol=0)
