"""FLOPs against a count by hand and against torch's own counter; peaks by device name."""

import pytest

from mcore_swift.plan import ModelShape, flops_per_token, forward_flops, peak_tflops, training_flops
from mcore_swift.plan.count import matmul_parameters

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


def test_experts_latent_attention_and_token_prediction_by_hand() -> None:
    shape = ModelShape(
        family="deepseek_v3", num_layers=2, hidden_size=8, ffn_hidden_size=20, num_heads=2, num_query_groups=2,
        head_dim=6, vocab_size=10, kv_lora_rank=5, q_lora_rank=7, qk_nope_head_dim=4, qk_rope_head_dim=2,
        v_head_dim=3, num_experts=4, num_experts_per_token=2, moe_ffn_hidden_size=6, shared_ffn_hidden_size=6,
        moe_layers=(False, True), num_mtp_layers=1,
    )  # fmt: skip
    queries = 8 * 7 + 7 * 12
    keys_values = 8 * (5 + 2) + 5 * 2 * (4 + 3)
    attention = queries + keys_values + 2 * 3 * 8
    dense, experts = 3 * 8 * 20, 3 * 8 * 6 * (2 + 1) + 4 * 8
    assert matmul_parameters(shape) == 2 * attention + dense + experts + 10 * 8
    predicted = attention + experts + 2 * 8 * 8 + 10 * 8
    scores = 3 * (2 * 5 * 5 * 2 * (6 + 3))  # three layers, five tokens, two heads of 6 and 3
    assert forward_flops(shape, [5]) == 2 * 5 * (matmul_parameters(shape) + predicted) + scores


def test_a_window_leaves_out_what_it_does_not_see() -> None:
    sizes = {
        **vars(SHAPE),
        "sliding_window": 4,
        "sliding_layers": (True,) + (False,) * (SHAPE.num_layers - 1),
    }
    windowed = ModelShape(**sizes)
    width = 4 * SHAPE.query_size
    # the causal triangle of s rows counts s^2; what a window leaves out is the triangle of the other s - w rows
    assert forward_flops(SHAPE, [10]) - forward_flops(windowed, [10]) == width * (10 - 4) ** 2
    assert forward_flops(windowed, [3]) == forward_flops(SHAPE, [3])
    assert training_flops(windowed, [10, 10]) == pytest.approx(20 * flops_per_token(windowed, 10))
