"""FLOPs against a count by hand and against torch's own counter; peaks by device name."""

import pytest

from mcore_swift.plan import ModelShape, flops_per_token, forward_flops, peak_tflops, training_flops

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=20, num_heads=4,
    num_query_groups=2, head_dim=3, vocab_size=50,
)  # fmt: skip


def test_a_case_by_hand() -> None:
    # per layer: q 8x12, k and v 8x6 each, output 12x8, gate, up and down 8x20 each
    layer = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 20
    weights = 2 * layer + 50 * 8
    # scores and weighted sum: 2 layers, 2 products, 2 operations, width 12
    attention = 2 * 2 * 2 * 12
    assert forward_flops(SHAPE, [5]) == 2 * weights * 5 + attention * 25
    assert forward_flops(SHAPE, [5, 3]) == 2 * weights * 8 + attention * (25 + 9)
    assert training_flops(SHAPE, [5, 3]) == 3 * forward_flops(SHAPE, [5, 3])


def test_packing_costs_what_its_samples_cost() -> None:
    lengths = [7, 1, 30]
    assert forward_flops(SHAPE, lengths) == sum(forward_flops(SHAPE, [length]) for length in lengths)
    assert forward_flops(SHAPE, [sum(lengths)]) > forward_flops(SHAPE, lengths)


def test_per_token_with_the_length_the_average_token_sees() -> None:
    lengths = [7, 1, 30]
    mean = sum(length**2 for length in lengths) / sum(lengths)
    # float rounding only
    assert flops_per_token(SHAPE, mean) * sum(lengths) == pytest.approx(
        training_flops(SHAPE, lengths), rel=1e-12
    )


def test_against_torchs_counter() -> None:
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64, attn_implementation="eager",
    )  # fmt: skip
    shape = ModelShape.from_config_dict(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 10, dtype=torch.long), use_cache=False)
    counted = counter.get_total_flops()
    # the counter also sees the rotary table's outer product, which is not counted here: under 1 %
    assert forward_flops(shape, [10, 10]) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Intel Xeon", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops
